"""The time of a link: it stands still while the link stalls."""

import asyncio
from time import monotonic


class LinkClock:
    """Seconds that a link has been at work."""

    def __init__(self) -> None:
        self._offset = 0.0
        self._stopped_at: float | None = None
        self._goes = asyncio.Event()
        self._goes.set()

    @property
    def is_stopped(self) -> bool:
        """Whether the link stalls."""
        return self._stopped_at is not None

    def now(self) -> float:
        """Give the time; it never goes back."""
        return self._stopped_at if self._stopped_at is not None else monotonic() - self._offset

    def stop(self) -> None:
        """Let time stand still."""
        self._stopped_at = self.now()
        self._goes.clear()

    def go_on(self) -> None:
        """Let time pass again, from where it stopped."""
        if self._stopped_at is not None:
            self._offset = monotonic() - self._stopped_at
            self._stopped_at = None
            self._goes.set()

    async def pass_by(self, seconds: float) -> None:
        """Wait until so much time has passed, for ever if the link stalls for ever."""
        until = self.now() + seconds
        while (left := until - self.now()) > 0 or self.is_stopped:
            await self._goes.wait()
            await asyncio.sleep(left)
