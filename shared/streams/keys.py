"""The name of every key in Redis. Keys of one request share a hash tag: `{request id}`."""

from typing import Final

GROUP: Final = "workers"
"""The consumer group of every job stream."""

STATE_LEASES: Final = "prfaas:state:leases"
"""Sorted set: request id by the time (ms, Redis clock) at which its published state expires."""


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


def request_of(key: str) -> str:
    """The request that a key with a hash tag belongs to."""
    return key[key.index("{") + 1 : key.index("}")]


def segment(request_id: str, epoch: int, number: int) -> str:
    """One published segment. The epoch is part of the name: attempts never overwrite another."""
    return f"prfaas:state:segment:{{{request_id}}}:{epoch}:{number}"
