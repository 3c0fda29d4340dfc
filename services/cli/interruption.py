"""How Ctrl-C and its kin end a command: by cancelling its work, once more each time they come."""

import asyncio
import signal
from collections.abc import Coroutine
from typing import Any, Final

from services.cli.console import warn

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Run work to its end, or until it has unwound from a signal; tells whether one came."""
    return asyncio.run(_cancelled_by_signals(work))


async def _cancelled_by_signals(work: Coroutine[Any, Any, None]) -> bool:
    task = asyncio.ensure_future(work)
    interrupted = False

    def interrupt() -> None:
        nonlocal interrupted
        if not interrupted:
            warn("prfaas: stopping; once more stops at once")
        interrupted = True
        task.cancel()

    loop = asyncio.get_running_loop()
    handled = [number for number in _SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    for number in handled:
        loop.add_signal_handler(number, interrupt)
    try:
        await task
    except asyncio.CancelledError:
        if not interrupted:
            raise
    finally:
        for number in handled:
            loop.remove_signal_handler(number)
    return interrupted
