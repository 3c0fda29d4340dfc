"""Every error that crosses a module's edge, with the HTTP status or the retry decision it implies.

Raised near the cause, handled at the edge: the gateway turns an error into OpenAI's error object by
`http_status`, `kind`, `param` and `code`; a worker asks `retryable` whether another attempt may
succeed.
"""

from typing import ClassVar


class PrfaasError(Exception):
    """Root of the tree: something failed inside the system."""

    http_status: ClassVar[int] = 500
    kind: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None
    retryable: ClassVar[bool] = False


# --- what a client did -----------------------------------------------------------------------


class InvalidRequestError(PrfaasError):
    """The request cannot be served as it is written; `param` names the offending field."""

    http_status = 400
    kind = "invalid_request_error"

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(InvalidRequestError):
    """The request names a model that is not served here."""

    http_status = 404
    code = "model_not_found"


class RequestTooLargeError(InvalidRequestError):
    """The request body is larger than the gateway accepts."""

    http_status = 413


# --- what the system cannot do now -----------------------------------------------------------


class OverloadedError(PrfaasError):
    """The backlog is full; after `retry_after` seconds it is worth trying again."""

    http_status = 429
    kind = "rate_limit_error"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class UnavailableError(PrfaasError):
    """A part that the request needs does not answer."""

    http_status = 503
    kind = "unavailable_error"
    retryable = True


class DeadlineExceededError(PrfaasError):
    """The request did not end within the time it may take."""

    http_status = 504
    kind = "timeout_error"


class GenerationError(PrfaasError):
    """The request was given up by the workers; the message says why."""


class BrokenLogitsError(GenerationError):
    """The model computed logits that are not numbers for `rows` of a batch."""

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


# --- what a job can run into -----------------------------------------------------------------


class MessageError(PrfaasError):
    """Bytes from the wire are not the message they should be."""


class AttemptEndedError(PrfaasError):
    """This attempt at a job may have no further effect."""


class SupersededError(AttemptEndedError):
    """Another attempt with a higher epoch owns the job now."""


class CancelledJobError(AttemptEndedError):
    """The job's request was cancelled, or nobody is left to read its tokens."""


class NoRoomError(PrfaasError):
    """An engine has no room for another request's state now."""

    retryable = True


class CheckpointError(PrfaasError):
    """A model directory is incomplete, damaged or of another architecture."""


class UnsupportedDeviceError(PrfaasError):
    """The engine cannot compute as it was told to on this machine."""


class IncompatibleWorkerError(PrfaasError):
    """A worker's model or state is not the one of the workers that it would work with."""


class StateLostError(PrfaasError):
    """A published state cannot be had (any more) and has to be computed again."""

    retryable = True


class LostSegmentError(StateLostError):
    """The segment `key` cannot be used; `cause` says why. A cache that has it has to forget it."""

    def __init__(self, cause: StateLostError, key: str, *, of_snapshot: bool) -> None:
        super().__init__(str(cause))
        self.cause = cause
        self.key = key
        self.of_snapshot = of_snapshot


class StateStoreFullError(PrfaasError):
    """The KV store refused a segment for want of memory."""

    retryable = True


# --- why a state segment was refused ---------------------------------------------------------


class SegmentError(StateLostError):
    """A segment was refused; it is recomputed, never guessed."""


class SegmentTruncatedError(SegmentError):
    """The bytes end before the lengths in the header say so, or go on after them."""


class SegmentMagicError(SegmentError):
    """The bytes are not a state segment."""


class SegmentVersionError(SegmentError):
    """The segment has a format version, codec or kind that this reader does not know."""


class SegmentTooLargeError(SegmentError):
    """A declared size is above the limit."""


class SegmentChecksumError(SegmentError):
    """The content does not match its checksum."""


class SegmentSignatureError(SegmentError):
    """The segment is not signed with this reader's key."""


class SegmentMetadataError(SegmentError):
    """The metadata is not what the format says it is."""


class SegmentForeignError(SegmentError):
    """The segment belongs to another model, request, attempt or prompt."""


class SegmentShapeError(SegmentError):
    """Layout, dtype or shape differ from what this reader's model needs."""


class SegmentPayloadError(SegmentError):
    """The payload is not an encoding of as many bytes as the tensor needs."""


def first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """What went wrong first in a group of tasks; the group has cancelled the rest."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
