"""What one request keeps is never touched by another, whoever came and went before."""

import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor

from shared.kernels.batch import PAGE_TOKENS
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_layout import StateLayout
from shared.kimi_linear.state_pool import StatePool

SLOTS, PAGES = 4, 12
LAYOUT = StateLayout(
    kda_layers=2,
    kda_heads=1,
    kda_head_dim=2,
    convolution_taps=3,
    mla_layers=2,
    latent_dim=3,
    latent_dtype="float32",
    convolution_dtype="float32",
)

Content = tuple[KdaSnapshot, Tensor]


class StatesOfRequests(RuleBasedStateMachine):
    """Requests come with contents of their own, and go."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = StatePool(LAYOUT, SLOTS, PAGES * PAGE_TOKENS, torch.device("cpu"))
        self.held: list[tuple[RequestState, Content]] = []
        self.drawn = 0

    def content(self, tokens: int) -> Content:
        """Numbers that no other content has."""
        self.drawn += 1
        generator = torch.Generator().manual_seed(self.drawn)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        snapshot = KdaSnapshot(
            tokens, random(*LAYOUT.recurrent_shape), random(*LAYOUT.convolution_shape)
        )
        return snapshot, random(*LAYOUT.latents_shape(tokens))

    @rule(tokens=st.integers(1, 5 * PAGE_TOKENS), more=st.integers(0, 100), cut=st.floats(0, 1))
    def come(self, tokens: int, more: int, cut: float) -> None:
        if not self.pool.has_room(tokens + more):
            return
        state = RequestState(self.pool, tokens + more)
        snapshot, latents = content = self.content(tokens)
        first = int(cut * tokens)
        for piece in snapshot.split(1):
            state.import_snapshot(piece)
        state.import_latents(0, latents[:, :first])
        state.import_latents(first, latents[:, first:])
        state.finish_import(tokens)
        self.held.append((state, content))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def go(self, data: st.DataObject) -> None:
        state, _ = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        state.release()

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def begin_anew(self, data: st.DataObject) -> None:
        number = data.draw(st.integers(0, len(self.held) - 1))
        state, (snapshot, _) = self.held[number]
        state.clear()
        content = self.content(snapshot.length)
        state.import_latents(0, content[1])
        state.import_snapshot(content[0])
        state.finish_import(snapshot.length)
        self.held[number] = (state, content)

    @invariant()
    def each_has_what_it_came_with(self) -> None:
        for state, (snapshot, latents) in self.held:
            found = state.snapshot()
            assert found.length == state.length == snapshot.length
            assert torch.equal(found.recurrent, snapshot.recurrent)
            assert torch.equal(found.convolution, snapshot.convolution)
            assert torch.equal(state.export_latents(0, state.length), latents)


StatesOfRequests.TestCase.settings = settings(max_examples=40, deadline=None)
TestStatesOfRequests = StatesOfRequests.TestCase
