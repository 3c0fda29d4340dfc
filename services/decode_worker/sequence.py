"""One request while it is being decoded: what it has said so far, and when it has said enough."""

from time import monotonic

from shared.kimi_linear.sampling import Draw
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.messages import FinishReason, Job, Manifest, Timings, Token, TokenEvent
from shared.streams.job_queue import Attempt


def finish_reason(job: Job, generated: int, token_id: int) -> FinishReason | None:
    """Tell whether a text ends with the token that would be its `generated`-th, and why."""
    if token_id in job.stop_token_ids:
        return "stop"
    return "length" if generated >= job.max_tokens else None


class Sequence:
    """The growing text of one attempt; `tokens` were emitted before, by whichever worker."""

    def __init__(self, attempt: Attempt, manifest: Manifest, tokens: list[Token]) -> None:
        self.attempt = attempt
        self.manifest = manifest
        self.tokens = list(tokens)
        self.block_snapshot: KdaSnapshot | None = None
        """The state at the last whole block that decode has reached."""
        self._draw: Draw | None = None
        self.finished = False
        self._transfer_seconds = 0.0
        self._raw_bytes = 0
        self._wire_bytes = 0
        self._decoding_since = monotonic()

    def restored(self, transfer_seconds: float, *, raw_bytes: int, wire_bytes: int) -> None:
        """Note what it took to get the prompt's state: decoding begins now."""
        self._transfer_seconds = transfer_seconds
        self._raw_bytes = raw_bytes
        self._wire_bytes = wire_bytes
        self._decoding_since = monotonic()

    def reached_block(self, snapshot: KdaSnapshot) -> None:
        """Note the state at a whole block, in place of that at the one before."""
        self.block_snapshot = snapshot

    @property
    def job(self) -> Job:
        """What was asked for."""
        return self.attempt.job

    @property
    def last_token_id(self) -> int:
        """The token that the next step consumes."""
        return self.tokens[-1].token_id

    @property
    def draw(self) -> Draw:
        """What the next token is drawn by; the first look goes through prompt and text."""
        if self._draw is None:
            text = [token.token_id for token in self.tokens]
            self._draw = Draw.of(self.job.sampling, self.job.prompt, text)
        return self._draw

    def accept(self, token: Token) -> TokenEvent:
        """Take the next token; gives the event that tells of it.

        A token that stops the text is not part of it.
        """
        index = len(self.tokens)
        reason = finish_reason(self.job, index + 1, token.token_id)
        emitted = () if reason == "stop" else (token,)
        self.tokens.append(token)
        if self._draw is not None:
            self._draw = self._draw.followed_by(token.token_id)
        self.finished = reason is not None
        return TokenEvent(
            request_id=self.job.request_id,
            index=index,
            tokens=emitted,
            finish_reason=reason,
            cached_tokens=None if index else self.manifest.cached_tokens,
            timings=self._timings() if reason else None,
        )

    def _timings(self) -> Timings:
        return Timings(
            queued=self.manifest.queued,
            prefill=self.manifest.prefill,
            transfer=self._transfer_seconds * 1000,
            decode=(monotonic() - self._decoding_since) * 1000,
            state_raw_bytes=self._raw_bytes,
            state_wire_bytes=self._wire_bytes,
            attempts=self.attempt.epoch,
        )
