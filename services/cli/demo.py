"""`prfaas demo`: starts a system, completes one prompt, shows where the time went, stops."""

from typing import Final

from services.cli.complete import show_completion
from services.cli.completion_stream import CompletionOptions
from services.cli.console import say
from services.cli.interruption import run_until_signal
from services.cli.up import running_system
from shared.settings import UpSettings, load_settings

INTERRUPTED_STATUS: Final = 130

_PROMPT: Final = "And it came to pass in those days, that the king said unto the people,"
_DEFAULTS: Final = ("--port=0", "--log-level=error")


def run(arguments: list[str]) -> int:
    """Run the demonstration, with the flags of `prfaas up`; gives the exit status."""
    settings = load_settings(UpSettings, "prfaas demo", [*_DEFAULTS, *arguments])
    interrupted = run_until_signal(_demonstrate(settings))
    return INTERRUPTED_STATUS if interrupted else 0


async def _demonstrate(settings: UpSettings) -> None:
    async with running_system(settings) as url:
        say(f"ready: {url}\n")
        say(f"> {_PROMPT}")
        await show_completion(
            CompletionOptions(url, _PROMPT, max_tokens=64, temperature=0.8, seed=7)
        )
        say("")
    say("stopped")
