"""The life of a job, in one table. The scripts in `shared/streams/lua` are its only writers."""

from enum import StrEnum
from typing import Final


class JobState(StrEnum):
    """Where a job stands in its queue."""

    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"
    """Ended with an error that another attempt cannot mend."""
    CANCELLED = "cancelled"
    DEAD = "dead"
    """Quarantined: it ended its attempts, or was no job at all."""


TRANSITIONS: Final[dict[JobState, frozenset[JobState]]] = {
    JobState.QUEUED: frozenset({JobState.RUNNING, JobState.CANCELLED, JobState.DEAD}),
    JobState.RUNNING: frozenset(
        {
            JobState.RUNNING,  # taken over from a dead worker
            JobState.QUEUED,  # handed back
            JobState.DONE,
            JobState.FAILED,
            JobState.CANCELLED,
            JobState.DEAD,
        }
    ),
    # A state that was lost after it was published is asked for again.
    JobState.DONE: frozenset({JobState.QUEUED}),
    # The client is told of the failure first, then the job is kept for whoever looks into it.
    JobState.FAILED: frozenset({JobState.DEAD}),
    JobState.CANCELLED: frozenset(),
    JobState.DEAD: frozenset(),
}
