"""Every message that crosses the wire between services, defined once.

A message is a frozen model; on the wire it is msgpack `[protocol version, type name, fields]`.
Token ids travel packed, four bytes each. A reader refuses what it does not know exactly.
"""

import struct
from typing import Annotated, Final, Literal, TypeVar

import msgpack
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
)

from shared.errors import MessageError

PROTOCOL_VERSION: Final = 3
MAX_MESSAGE_BYTES: Final = 64 * 2**20
MOST_BIASED_TOKENS: Final = 300
LARGEST_BIAS: Final = 100


def _pack_token_ids(token_ids: tuple[int, ...]) -> bytes:
    return struct.pack(f"<{len(token_ids)}I", *token_ids)


def _unpack_token_ids(value: object) -> object:
    if not isinstance(value, bytes):
        return value
    if len(value) % 4:
        raise ValueError("packed token ids are four bytes each")
    return struct.unpack(f"<{len(value) // 4}I", value)


TokenId = Annotated[int, Field(ge=0, lt=2**32)]
TokenIds = Annotated[
    tuple[TokenId, ...], BeforeValidator(_unpack_token_ids), PlainSerializer(_pack_token_ids)
]
Milliseconds = Annotated[float, Field(ge=0)]
Identifier = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9_.-]+$")]
Epoch = Annotated[int, Field(ge=1)]
PrefixName = Annotated[bytes, Field(min_length=16, max_length=16)]
"""Name of the first tokens of a prompt, see `shared/state_blob/prefix_hash.py`."""
CodecName = Annotated[str, Field(min_length=1, max_length=32, pattern=r"^[a-z0-9-]+$")]
Bias = Annotated[float, Field(ge=-LARGEST_BIAS, le=LARGEST_BIAS)]
Penalty = Annotated[float, Field(ge=-2, le=2)]


class Message(BaseModel):
    """Base of all messages: immutable, and without fields that a reader does not know."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- gateway -> prefill and decode workers ---------------------------------------------------


class Sampling(Message):
    """How a token is drawn; with position, logits and the tokens so far it determines the token."""

    temperature: Annotated[float, Field(ge=0)]
    top_p: Annotated[float, Field(gt=0, le=1)]
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)]
    top_k: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Most likely tokens to draw from; 0 is all of them."""
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Least probability to draw a token at, as a part of the most likely one's."""
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    """Of tokens in prompt or text; 1 is none."""
    presence_penalty: Penalty = 0.0
    """Of tokens in the text."""
    frequency_penalty: Penalty = 0.0
    """Of tokens in the text, for each time."""
    logit_bias: Annotated[
        tuple[tuple[TokenId, Bias], ...], Field(max_length=MOST_BIASED_TOKENS)
    ] = ()
    """What is added to the logits of which tokens, each of them once."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Alternatives to report beside each token; None reports no log probabilities at all."""


class Job(Message):
    """One completion to generate: the same message asks for its prefill and for its decode."""

    request_id: Identifier
    gateway_id: Identifier
    prompt: Annotated[TokenIds, Field(min_length=1)]
    sampling: Sampling
    max_tokens: Annotated[int, Field(ge=1)]
    stop_token_ids: TokenIds = ()
    """Tokens that end the text and are not part of it; empty when they are to be ignored."""
    tenant: Annotated[bytes, Field(max_length=32)] = b""
    """Salt of the names of its prefixes: requests of unlike tenants share no cached state."""


# --- prefill worker -> decode worker ---------------------------------------------------------


class Token(Message):
    """One sampled token."""

    token_id: TokenId
    logprob: float | None = None
    top_logprobs: tuple[tuple[TokenId, float], ...] = ()


class SegmentDescriptor(Message):
    """Where a published state segment lies and what it must be."""

    key: Annotated[str, Field(min_length=1, max_length=256)]
    kind: Literal["mla", "kda"]
    producer: Identifier
    """The request that it was written for, which need not be the one that uses it."""
    epoch: Epoch
    """The attempt of that request."""
    first_layer: Annotated[int, Field(ge=0)] = 0
    """First layer of its kind that the segment covers."""
    layers: Annotated[int, Field(ge=1)]
    codec: CodecName
    start: Annotated[int, Field(ge=0)]
    """First token the segment covers; a KDA snapshot covers none: its start is its stop."""
    stop: Annotated[int, Field(ge=1)]
    wire_bytes: Annotated[int, Field(ge=1)]
    raw_bytes: Annotated[int, Field(ge=0)]
    checksum: Annotated[bytes, Field(min_length=16, max_length=16)]


class Manifest(Message):
    """Closes a state: everything a decode worker needs to continue the prompt."""

    fingerprint: Identifier
    segments: Annotated[tuple[SegmentDescriptor, ...], Field(min_length=1)]
    first_token: Token
    cached_tokens: Annotated[int, Field(ge=0)] = 0
    """Tokens of the prompt whose state was there before and not computed again."""
    queued: Milliseconds
    """From the job's arrival in the queue to the start of this attempt (clock of the queue)."""
    prefill: Milliseconds
    """From the start of the attempt to the first token."""


class PrefillStarted(Message):
    """An attempt at the prefill began; what earlier epochs announced is void."""

    epoch: Epoch


class SegmentReady(Message):
    """A segment can be pulled, while the rest of the prompt is still being prefilled."""

    epoch: Epoch
    segment: SegmentDescriptor


class PrefillDone(Message):
    """The whole state can be pulled."""

    epoch: Epoch
    manifest: Manifest


class PrefillFailed(Message):
    """The prefill ended for good without a state."""

    epoch: Epoch
    reason: str


class PrefixNode(Message):
    """Consecutive whole blocks of some prompt, as the prefix cache of a region keeps them.

    Nodes form a tree: each begins where its parent ends.
    """

    parent: PrefixName
    """Name of the tokens before the node's first."""
    blocks: Annotated[tuple[PrefixName, ...], Field(min_length=1)]
    """Names of the prefixes that end with each of the node's blocks; the last names the node."""
    latents: SegmentDescriptor
    """MLA latents of all tokens of the node."""
    snapshot: tuple[SegmentDescriptor, ...] = ()
    """KDA state at the end of the node, in pieces; none where it was not kept."""

    @property
    def name(self) -> bytes:
        """Name of the prefix that ends with the node."""
        return self.blocks[-1]


PrefillEvent = PrefillStarted | SegmentReady | PrefillDone | PrefillFailed


# --- decode worker -> gateway ----------------------------------------------------------------


class Timings(Message):
    """Where the time of one request went, and what its state weighed."""

    queued: Milliseconds
    prefill: Milliseconds
    transfer: Milliseconds
    """From the end of prefill to the restored state: what the network added to the latency."""
    decode: Milliseconds
    """From the restored state to the last token."""
    state_raw_bytes: Annotated[int, Field(ge=0)]
    state_wire_bytes: Annotated[int, Field(ge=0)]
    attempts: Annotated[int, Field(ge=1)]
    """Decode attempts, 1 unless a worker was replaced."""


FinishReason = Literal["stop", "length", "error"]


class TokenEvent(Message):
    """Consecutive tokens of one request, the first of them at `index` of its output."""

    request_id: Identifier
    index: Annotated[int, Field(ge=0)]
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None = None
    error: str | None = None
    cached_tokens: Annotated[int, Field(ge=0)] | None = None
    """Of the prompt, see `Manifest`; comes with the first token."""
    timings: Timings | None = None


# --- worker -> everyone who looks ------------------------------------------------------------


class WorkerRegistration(Message):
    """What a live worker says of itself with every heartbeat."""

    worker_id: Identifier
    role: Literal["prefill", "decode"]
    fingerprint: Identifier
    layout: Annotated[str, Field(max_length=512)]
    """The shapes of the states it reads or writes; both sides must name the same ones."""
    signing: Annotated[str, Field(max_length=64)] = "no key"
    """What names the key that states are signed with, without telling it."""
    codecs: Annotated[tuple[CodecName, ...], Field(max_length=32)] = ()
    """Codecs of segments that it can read."""
    slots: Annotated[int, Field(ge=1)]


MessageT = TypeVar("MessageT", bound=Message)


def encode(message: Message) -> bytes:
    """Turn a message into its bytes on the wire."""
    packed: bytes = msgpack.packb(
        [PROTOCOL_VERSION, type(message).__name__, message.model_dump(exclude_defaults=True)]
    )
    return packed


def decode(data: bytes, *expected: type[MessageT]) -> MessageT:
    """Read a message that has to be of one of the expected types.

    Raises:
        MessageError: too large, not msgpack, another protocol version, another type, or fields
            that are missing, unknown or out of range.
    """
    if len(data) > MAX_MESSAGE_BYTES:
        raise MessageError(f"message of {len(data)} bytes is over the limit of {MAX_MESSAGE_BYTES}")
    try:
        envelope = msgpack.unpackb(data, use_list=False)
    except (ValueError, msgpack.UnpackException) as error:
        raise MessageError(f"message is not msgpack: {error}") from None
    if not (isinstance(envelope, tuple) and len(envelope) == 3):
        raise MessageError("message is not a [version, type, fields] triple")
    version, name, fields = envelope
    if version != PROTOCOL_VERSION:
        raise MessageError(f"message has protocol version {version!r}, not {PROTOCOL_VERSION}")
    message_type = next((candidate for candidate in expected if candidate.__name__ == name), None)
    if message_type is None:
        names = ", ".join(candidate.__name__ for candidate in expected)
        raise MessageError(f"message is a {name!r:.80}, expected {names}")
    try:
        return message_type.model_validate(fields, strict=True)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise MessageError(f"{message_type.__name__}.{where}: {first['msg']}") from None
