"""A worker that cannot work with the others is refused when it starts, before any work."""

import asyncio
import sys
from pathlib import Path

import pytest

from shared.kimi_linear.presets import write_random_checkpoint
from tests.system.conftest import System

pytestmark = pytest.mark.asyncio


@pytest.mark.parametrize("service", ["prefill_worker", "decode_worker"])
async def test_a_worker_of_another_model_ends_with_the_reason(
    system: System, service: str, tmp_path: Path
) -> None:
    write_random_checkpoint(tmp_path / "other", "tiny", seed=99)
    flags = ["--model", str(tmp_path / "other"), "--threads", "1"]
    urls = system.flags(service)[: 2 if service == "prefill_worker" else 4]
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"services.{service}", *urls, *flags),
        stderr=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        _, errors = await process.communicate()
    assert process.returncode == 2
    assert "this worker has model" in errors.decode()
    answer = await system.complete(prompt=[1, 2, 3], max_tokens=2)
    assert answer["usage"]["completion_tokens"] == 2, "the others go on"
