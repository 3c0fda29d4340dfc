"""A state is copied out without being disturbed, and is taken in only if it fits."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.errors import SegmentShapeError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot


@pytest.fixture
def state(engine: Engine) -> RequestState:
    state = engine.new_state()
    engine.prefill(list(range(70)), state)
    return state


def test_exports_have_the_layouts_shapes_and_dtypes(engine: Engine, state: RequestState) -> None:
    layout, snapshot, latents = engine.layout, state.snapshot(), state.export_latents(10, 70)
    assert snapshot.length == state.length == 70
    assert tuple(snapshot.recurrent.shape) == layout.recurrent_shape
    assert tuple(snapshot.convolution.shape) == layout.convolution_shape
    assert tuple(latents.shape) == layout.latents_shape(60)
    exported = (snapshot.recurrent, snapshot.convolution, latents)
    assert all(tensor.is_contiguous() for tensor in exported)
    assert sum(tensor.nbytes for tensor in exported) == layout.state_bytes(60)


def test_exports_are_copies(engine: Engine, state: RequestState) -> None:
    snapshot, latents = state.snapshot(), state.export_latents(0, 70)
    before = [tensor.clone() for tensor in (snapshot.recurrent, snapshot.convolution, latents)]
    engine.prefill(list(range(50)), state)
    after = (snapshot.recurrent, snapshot.convolution, latents)
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    assert torch.equal(state.export_latents(0, 70), latents)


def test_latents_can_be_exported_piece_by_piece(state: RequestState) -> None:
    pieces = [state.export_latents(start, min(start + 16, 70)) for start in range(0, 70, 16)]
    assert torch.equal(torch.cat(pieces, dim=1), state.export_latents(0, 70))
    assert state.export_latents(70, 70).shape[1] == 0


@pytest.mark.parametrize(("start", "stop"), [(-1, 5), (5, 4), (0, 71)])
def test_tokens_that_were_not_seen_cannot_be_exported(
    state: RequestState, start: int, stop: int
) -> None:
    with pytest.raises(ValueError, match="in a state of 70"):
        state.export_latents(start, stop)


def test_restoring_is_the_inverse_of_exporting_and_copies_nothing_large(
    engine: Engine, state: RequestState
) -> None:
    snapshot, latents = state.snapshot(), state.export_latents(0, 70)
    restored = RequestState.restore(engine.layout, snapshot, latents)
    assert restored.recurrent.data_ptr() == snapshot.recurrent.data_ptr()
    again = restored.snapshot()
    assert again.length == 70
    assert torch.equal(again.recurrent, state.snapshot().recurrent)
    assert torch.equal(again.convolution, state.snapshot().convolution)
    assert torch.equal(restored.export_latents(0, 70), latents)


def test_a_restored_state_does_not_share_latents_with_another_after_growing(
    engine: Engine, state: RequestState
) -> None:
    restored = RequestState.restore(engine.layout, state.snapshot(), state.export_latents(0, 70))
    assert torch.equal(engine.decode([5], [state]), engine.decode([5], [restored]))
    assert torch.equal(state.export_latents(0, 71), restored.export_latents(0, 71))


def damaged(snapshot: KdaSnapshot, latents: Tensor) -> dict[str, tuple[KdaSnapshot, Tensor]]:
    return {
        "recurrent": (replace(snapshot, recurrent=snapshot.recurrent[1:]), latents),
        "recurrent dtype": (replace(snapshot, recurrent=snapshot.recurrent.bfloat16()), latents),
        "convolution": (replace(snapshot, convolution=snapshot.convolution[..., 1:]), latents),
        "latents": (snapshot, latents[:, 1:]),
        "latents dtype": (snapshot, latents.bfloat16()),
    }


@pytest.mark.parametrize(
    "damage", ["recurrent", "recurrent dtype", "convolution", "latents", "latents dtype"]
)
def test_a_state_of_another_shape_or_dtype_is_refused_by_name(
    engine: Engine, state: RequestState, damage: str
) -> None:
    snapshot, latents = damaged(state.snapshot(), state.export_latents(0, 70))[damage]
    with pytest.raises(SegmentShapeError, match=f"^{damage.removesuffix(' dtype')} state is"):
        RequestState.restore(engine.layout, snapshot, latents)


def test_a_state_of_another_layout_is_refused(engine: Engine, state: RequestState) -> None:
    layout = replace(engine.layout, latent_dtype="bfloat16")
    with pytest.raises(SegmentShapeError, match="latents"):
        RequestState.restore(layout, state.snapshot(), state.export_latents(0, 70))


def test_a_snapshot_of_no_tokens_is_refused(engine: Engine) -> None:
    empty = engine.new_state()
    with pytest.raises(SegmentShapeError, match="0 tokens"):
        RequestState.restore(engine.layout, empty.snapshot(), empty.export_latents(0, 0))


def test_growing_copies_the_latents_rarely(engine: Engine) -> None:
    state = RequestState.empty(engine.layout)
    buffers = set()
    for _ in range(4000):
        new = torch.zeros(1, engine.layout.latent_dim)
        for layer in range(engine.layout.mla_layers):
            buffers.add(state.append_latents(layer, new).untyped_storage().data_ptr())
        state.advance(1)
    assert len(buffers) < 16
