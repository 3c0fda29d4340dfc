"""The Triton kernels of Kimi Delta Attention compute the recurrence, whatever the decay."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.kernels.reference import kda_recurrence
from shared.kernels.triton.kda_decode import kda_decode
from shared.kernels.triton.kda_prefill import kda_prefill

REFERENCE = Path(__file__).parents[2] / "reference" / "kda_ops.npz"
CASES = [
    "single_token",
    "below_chunk",
    "over_chunk",
    "wide_head",
    "no_decay",
    "strong_decay",
    "very_strong_decay",
]
SLOTS = 6


@dataclass(frozen=True)
class Packed:
    """Tokens of several requests, the states of all slots before them, and which slots are theirs.

    The operands are those of `kda_prefill`; request r has `counts[r]` tokens.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    g: Tensor
    beta: Tensor
    states: Tensor
    counts: tuple[int, ...]
    slots: tuple[int, ...]

    @property
    def operands(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v, self.g, self.beta

    def rows(self, start: int, stop: int) -> Self:
        """Some tokens of the only request."""
        q, k, v, g, beta = (x[start:stop] for x in self.operands)
        return replace(self, q=q, k=k, v=v, g=g, beta=beta, counts=(stop - start,))

    def rounded(self) -> Self:
        """With activations in bf16."""
        return replace(self, q=self.q.bfloat16(), k=self.k.bfloat16(), v=self.v.bfloat16())

    def prefill(self, device: str) -> tuple[Tensor, Tensor]:
        """Outputs of the kernel, and the states of all slots after it."""
        states = self.states.to(device, copy=True)
        q, k, v, g, beta = (x.to(device) for x in self.operands)
        starts = np.cumsum((0, *self.counts)).tolist()
        bounds = torch.tensor(starts, dtype=torch.int32, device=device)
        slots = torch.tensor(self.slots, dtype=torch.int32, device=device)
        return kda_prefill(q, k, v, g, beta, states, bounds, slots).cpu(), states.cpu()

    def decode(self, device: str) -> tuple[Tensor, Tensor]:
        """The same by steps, for requests that have equally many tokens."""
        states = self.states.to(device, copy=True)
        slots = torch.tensor(self.slots, dtype=torch.int32, device=device)
        q, k, v, g, beta = (
            x.to(device).view(len(self.counts), -1, *x.shape[1:]).transpose(0, 1).contiguous()
            for x in self.operands
        )
        steps = [
            kda_decode(*operands, states, slots) for operands in zip(q, k, v, g, beta, strict=True)
        ]
        return torch.stack(steps, dim=1).flatten(0, 1).cpu(), states.cpu()

    def recurrence(self) -> tuple[Tensor, Tensor]:
        """What is expected: every request by itself in float64, the other slots as they were."""
        states = self.states.double()
        requests = zip(
            *(torch.split(x.double(), list(self.counts)) for x in self.operands), strict=True
        )
        outputs = []
        for slot, (q, k, v, g, beta) in zip(self.slots, requests, strict=True):
            o, state = kda_recurrence(
                q[None], k[None], v[None], g[None], beta[None], states[slot][None]
            )
            outputs.append(o[0])
            states[slot] = state[0]
        return torch.cat(outputs), states


def packed(
    counts: Sequence[int], *, decay: float, heads: int = 1, key: int = 16, value: int = 32
) -> Packed:
    tokens = sum(counts)
    return Packed(
        q=functional.normalize(torch.randn(tokens, heads, key), dim=-1),
        k=functional.normalize(torch.randn(tokens, heads, key), dim=-1),
        v=torch.randn(tokens, heads, value),
        g=-decay * torch.rand(tokens, heads, key),
        beta=torch.rand(tokens, heads),
        states=torch.randn(SLOTS, heads, key, value),
        counts=tuple(counts),
        slots=tuple(torch.randperm(SLOTS)[: len(counts)].tolist()),
    )


SMALL = packed([4], decay=1.0)


def assert_computes_the_recurrence(requests: Packed, found: tuple[Tensor, Tensor]) -> None:
    for result, expected in zip(found, requests.recurrence(), strict=True):
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), expected, rtol=1e-4, atol=1e-5)


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("case", CASES)
def test_prefill_agrees_with_the_float64_reference(case: str, device: str) -> None:
    with np.load(REFERENCE) as arrays:
        q, k, v, g, beta, initial_state, o, final_state = (
            torch.from_numpy(arrays[f"{case}/{name}"])[0]
            for name in ("q", "k", "v", "g", "beta", "initial_state", "o", "final_state")
        )
    states = initial_state.expand(SLOTS, -1, -1, -1)
    requests = Packed(q, k, v, g, beta, states, counts=(q.shape[0],), slots=(2,))
    found_o, found_states = requests.prefill(device)
    assert relative_error(found_o, o) < 1e-4
    assert relative_error(found_states[2], final_state) < 1e-4


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 63, 64, 65, 130])
def test_prefill_takes_any_length_around_its_blocks_and_chunks(tokens: int, device: str) -> None:
    requests = packed([tokens], decay=1.0)
    assert_computes_the_recurrence(requests, requests.prefill(device))


def test_packed_requests_are_each_computed_as_alone_and_other_slots_stay(device: str) -> None:
    requests = packed([66, 3, 17], decay=0.5, heads=2)
    o, states = requests.prefill(device)
    assert_computes_the_recurrence(requests, (o, states))
    others = [slot for slot in range(SLOTS) if slot not in requests.slots]
    assert torch.equal(states[others], requests.states[others])


def test_a_request_without_tokens_keeps_its_state(device: str) -> None:
    requests = packed([5, 0, 4], decay=1.0)
    _, states = requests.prefill(device)
    assert torch.equal(states[requests.slots[1]], requests.states[requests.slots[1]])


def test_a_weak_decay_after_a_strong_one_keeps_its_digits(device: str) -> None:
    requests = packed([40], decay=0.01)
    g = requests.g.clone()
    g[::7] = -50_000.0
    requests = replace(requests, g=g)
    assert_computes_the_recurrence(requests, requests.prefill(device))


def test_a_prefill_may_be_continued_by_another(device: str) -> None:
    whole = packed([70], decay=1.0)
    first, between = whole.rows(0, 20).prefill(device)
    second, states = replace(whole.rows(20, 70), states=between).prefill(device)
    assert_computes_the_recurrence(whole, (torch.cat((first, second)), states))


def test_rows_may_be_cut_out_of_wider_ones(device: str) -> None:
    requests = packed([20], decay=1.0, heads=2, value=16)
    q, k, v = torch.cat((requests.q, requests.k, requests.v), dim=1).tensor_split(3, dim=1)
    cut = replace(requests, q=q, k=k, v=v)
    assert not cut.k.is_contiguous()
    assert_computes_the_recurrence(requests, cut.prefill(device))


def test_decode_computes_half_precision_operands_in_fp32(device: str) -> None:
    half = packed([20], decay=1.0).rounded()
    assert_computes_the_recurrence(half, half.decode(device))


@pytest.mark.parametrize("decay", [0.0, 0.1, 5.0, 500.0])
def test_prefill_of_half_precision_operands_errs_less_than_their_rounding(
    decay: float, device: str
) -> None:
    requests = packed([130], decay=decay, key=64)
    half = requests.rounded()
    expected = half.recurrence()
    for found, exact, unrounded in zip(
        half.prefill(device), expected, requests.recurrence(), strict=True
    ):
        assert found.dtype == torch.float32
        assert relative_error(found, exact) < relative_error(exact, unrounded)


@pytest.mark.parametrize("decay", [0.0, 0.1, 5.0, 500.0])
def test_repeated_decode_steps_are_the_recurrence(decay: float, device: str) -> None:
    requests = packed([8, 8, 8], decay=decay, heads=2, value=64)
    assert_computes_the_recurrence(requests, requests.decode(device))


def test_a_decode_step_has_heads_of_the_published_size(device: str) -> None:
    requests = packed([2], decay=1.0, key=128, value=128)
    assert_computes_the_recurrence(requests, requests.decode(device))


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        (replace(SMALL, q=torch.zeros(4, 1, 24)), "q has 24 channels"),
        (replace(SMALL, v=torch.zeros(4, 1, 8)), "v has 8 channels"),
        (replace(SMALL, k=SMALL.v[..., ::2]), "channels of k do not lie next to each other"),
        (replace(SMALL, g=SMALL.v[..., ::2]), "g is not contiguous"),
        (replace(SMALL, beta=SMALL.v[..., 0]), "beta is not contiguous"),
        (replace(SMALL, states=SMALL.states.mT), "states is not contiguous"),
    ],
)
def test_tensors_that_lie_otherwise_are_refused(
    requests: Packed, message: str, device: str
) -> None:
    with pytest.raises(ValueError, match=message):
        requests.prefill(device)


@pytest.mark.gpu
def test_prefill_and_decode_are_the_recurrence_at_the_published_size(device: str) -> None:
    requests = packed([700, 1, 323], decay=0.1, heads=32, key=128, value=128)
    assert_computes_the_recurrence(requests, requests.prefill(device))
    steps = packed([3] * 4, decay=0.1, heads=32, key=128, value=128)
    assert_computes_the_recurrence(steps, steps.decode(device))
