"""`prfaas doctor`: says what is missing or misconfigured, and how to mend it."""

import argparse
import asyncio
from pathlib import Path

from services.cli.checks import (
    Finding,
    check_compose,
    check_environment,
    check_gateway,
    check_model,
    check_python,
    check_redis,
    check_torch,
    check_valkey,
)
from services.cli.complete import DEFAULT_URL
from services.cli.console import say


def run(arguments: list[str]) -> int:
    """Print one line a check; gives status 1 if something is wrong without which nothing works."""
    given = _parser().parse_args(arguments)
    findings = asyncio.run(examine(given.url, given.redis_url, given.model))
    for finding in findings:
        say(line_of(finding))
    return 1 if any(finding.remedy and finding.required for finding in findings) else 0


async def examine(url: str | None, redis_url: str | None, model: Path | None) -> list[Finding]:
    """Run all checks that apply: a server or a model that is not named is not looked at.

    A system that nobody named need not run.
    """
    findings = [check_python(), check_torch(), check_environment(), await check_valkey()]
    if model is not None:
        findings.append(check_model(model))
    if redis_url is not None:
        findings.append(await check_redis(redis_url))
    gateway_url = (url or DEFAULT_URL).rstrip("/")
    findings.append(await check_gateway(gateway_url, required=url is not None))
    return [*findings, await check_compose()]


def line_of(finding: Finding) -> str:
    """Write a finding as one line."""
    if finding.remedy is None:
        return f"ok       {finding.name:<15} {finding.found}"
    state = "missing " if finding.required else "optional"
    return f"{state} {finding.name:<15} {finding.found} -> {finding.remedy}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="prfaas doctor",
        description="Say what is missing or misconfigured, and how to mend it.",
    )
    parser.add_argument("--url", help=f"gateway that has to be ready (looked for: {DEFAULT_URL})")
    parser.add_argument("--redis-url", help="Redis or Valkey to check")
    parser.add_argument("--model", type=Path, help="checkpoint directory to check")
    return parser
