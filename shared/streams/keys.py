"""The name of every key in Redis. Keys of one request share a hash tag: `{request id}`."""

from typing import Final

GROUP: Final = "workers"
"""The consumer group of every job stream."""

STATE_LEASES: Final = "prfaas:state:leases"
"""Sorted set: request id by the time (ms, Redis clock) at which its published state expires."""

STATE_TERMS: Final = "prfaas:{state-terms}:held"
"""String: model, shapes and key of the states that the live workers around them agree on."""

READER_CODECS: Final = "prfaas:{state-terms}:reader-codecs"
"""Sorted set: codecs that a kind of reader knows, by the time (ms) until which one is alive."""

ANY_SEGMENT: Final = "prfaas:state:segment:{*}:*"
"""Pattern of the keys of all published segments."""

PREFIX_INDEX: Final = "prfaas:prefix:index:{prefix}"
"""Hash: the prefix cache of a region. It is one key, so that Redis loses all of it or nothing.

| field | value |
|---|---|
| `node:` and a name | the `PrefixNode`, and what scripts read of it |
| `snapshot:` and a node's name | the same of its snapshot's pieces |
| `used:` and a node's name | when the node was last used (ms, Redis clock) |
| `snapshot-used:` and a node's name | when its snapshot was last continued from |
| `block:` and a name | number of nodes that contain the block |
| `segment:` and a segment's key | the name of its node |
| `nodes`, `snapshots`, `bytes` | totals |
"""

PREFIX_OPEN: Final = "prfaas:prefix:open:{prefix}"
"""Capacity of the prefix cache in bytes; exists as long as its kv_store shows signs of life."""

PREFIX_COUNTS: Final = "prfaas:prefix:counts:{prefix}"
"""Hash: matches of prompts by reason, tokens they hit, and evictions."""

PREFIX_CHILDREN: Final = "prfaas:prefix:children:{prefix}:"
"""With a node's name: set of the names of the nodes that begin where it ends."""

PREFIX_PINNED: Final = "prfaas:prefix:pinned:{prefix}:"
"""With a node's name: set of the requests that pin it, each for as long as it has a lease."""

LINKS: Final = "prfaas:links"
"""Sorted set: name of a link by the time (ms, Redis clock) at which its statistics expire."""


def job_stream(queue: str) -> str:
    """Stream of the jobs that are not finished yet."""
    return f"prfaas:{queue}:jobs"


def dead_letters(queue: str) -> str:
    """Stream of quarantined jobs, with their reasons."""
    return f"prfaas:{queue}:dead"


def job_record(queue: str, request_id: str) -> str:
    """Hash: state, entry, epoch and number of emitted tokens of one job."""
    return f"prfaas:{queue}:job:{{{request_id}}}"


def worker_alive_prefix(queue: str) -> str:
    """Prefix of the keys that exist as long as a worker shows signs of life."""
    return f"prfaas:{queue}:alive:"


def gateway_alive(gateway_id: str) -> str:
    """Exists as long as somebody reads the gateway's token stream."""
    return f"prfaas:gateway:{gateway_id}:alive"


def token_stream(gateway_id: str) -> str:
    """Stream of token events for the requests of one gateway."""
    return f"prfaas:gateway:{gateway_id}:tokens"


def token_log(request_id: str) -> str:
    """List of all token events of one request: what a replacement worker resumes from."""
    return f"prfaas:token-log:{{{request_id}}}"


def prefill_events(request_id: str) -> str:
    """Stream of what the prefill of one request announces."""
    return f"prfaas:prefill:events:{{{request_id}}}"


def state_segments(request_id: str) -> str:
    """Hash: key of each published segment of one request, and its size in bytes."""
    return f"prfaas:state:segments:{{{request_id}}}"


def prefix_pins(request_id: str) -> str:
    """Set: names of the nodes of the prefix cache that one request pins."""
    return f"prfaas:prefix:pins:{{prefix}}:{request_id}"


def link(name: str) -> str:
    """Hash: what is known of the speed of one link between two regions."""
    return f"prfaas:link:{name}"


def request_of(key: str) -> str:
    """The request that a key with a hash tag belongs to."""
    return key[key.index("{") + 1 : key.index("}")]


def segment(owner: str, epoch: int, number: int) -> str:
    """One published segment. The epoch is part of the name: attempts never overwrite another."""
    return f"prfaas:state:segment:{{{owner}}}:{epoch}:{number}"
