"""When a child process that died is started again. Pure: times in, a pause out."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

BAD_SETTINGS_STATUS: Final = 2
"""Exit status of a service whose settings or files are wrong: it would only end again."""


@dataclass(frozen=True, slots=True)
class RestartPolicy:
    """Pauses double with every recent death, until there were too many. All times in seconds."""

    first_pause: float = 0.5
    longest_pause: float = 10.0
    most_deaths: int = 5
    window: float = 60.0
    """How long a death counts."""

    def pause_after(self, deaths: Sequence[float], exit_status: int) -> float | None:
        """Tell how long to wait before the next start, or None to give up.

        Args:
            deaths: when the child died, oldest first, the death just seen included.
            exit_status: of that last death.
        """
        recent = sum(deaths[-1] - death < self.window for death in deaths)
        if exit_status == BAD_SETTINGS_STATUS or recent >= self.most_deaths:
            return None
        pause = self.first_pause * 2.0 ** (recent - 1)
        return min(pause, self.longest_pause)
