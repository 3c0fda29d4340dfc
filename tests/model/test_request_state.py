"""A state is copied out without being disturbed, and is taken in only if it fits."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from shared.errors import SegmentShapeError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot


@pytest.fixture
def state(engine: Engine) -> Iterator[RequestState]:
    """A state of 70 tokens with room for 200, in pages that are not neighbours."""
    holes = [engine.new_state(64) for _ in range(6)]
    for hole in holes[::2]:
        hole.release()
    with engine.new_state(200) as state:
        for hole in holes[1::2]:
            hole.release()
        engine.prefill([list(range(70))], [state])
        yield state


@pytest.fixture
def other(engine: Engine) -> Iterator[RequestState]:
    """An empty state to import into."""
    with engine.new_state(200) as other:
        yield other


def take_in(state: RequestState, snapshot: KdaSnapshot, latents: Tensor) -> None:
    state.import_latents(latents)
    state.import_snapshot(snapshot)


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
    engine.prefill([list(range(50))], [state])
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


def test_importing_is_the_inverse_of_exporting(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    snapshot = state.snapshot()
    for start in range(0, 70, 30):
        other.import_latents(state.export_latents(start, min(start + 30, 70)))
    other.import_snapshot(snapshot)
    assert other.length == 70
    assert torch.equal(other.snapshot().recurrent, snapshot.recurrent)
    assert torch.equal(other.snapshot().convolution, snapshot.convolution)
    assert torch.equal(other.export_latents(0, 70), state.export_latents(0, 70))
    assert torch.equal(engine.decode([5], [state]), engine.decode([5], [other]))


def test_a_cleared_state_is_as_a_new_one(engine: Engine, other: RequestState) -> None:
    expected = engine.prefill([[1, 2, 3]], [other])
    other.clear()
    assert other.length == 0
    assert torch.equal(engine.prefill([[1, 2, 3]], [other]), expected)


def test_an_import_that_broke_off_can_begin_anew(state: RequestState, other: RequestState) -> None:
    other.import_latents(state.export_latents(0, 40))
    other.clear()
    take_in(other, state.snapshot(), state.export_latents(0, 70))
    assert torch.equal(other.export_latents(0, 70), state.export_latents(0, 70))


def test_the_room_of_a_released_state_is_given_to_others_clean(engine: Engine) -> None:
    with engine.new_state(100) as first:
        expected = engine.prefill([[7, 8, 9]], [first])
    with engine.new_state(100) as second:
        assert torch.equal(engine.prefill([[7, 8, 9]], [second]), expected)


def damaged(snapshot: KdaSnapshot, latents: Tensor) -> dict[str, tuple[KdaSnapshot, Tensor]]:
    return {
        "recurrent": (replace(snapshot, recurrent=snapshot.recurrent[1:]), latents),
        "recurrent dtype": (replace(snapshot, recurrent=snapshot.recurrent.bfloat16()), latents),
        "convolution": (replace(snapshot, convolution=snapshot.convolution[..., 1:]), latents),
        "latents": (snapshot, latents[..., 1:]),
        "latents dtype": (snapshot, latents.bfloat16()),
    }


@pytest.mark.parametrize(
    "damage", ["recurrent", "recurrent dtype", "convolution", "latents", "latents dtype"]
)
def test_a_state_of_another_shape_or_dtype_is_refused_by_name(
    state: RequestState, other: RequestState, damage: str
) -> None:
    snapshot, latents = damaged(state.snapshot(), state.export_latents(0, 70))[damage]
    with pytest.raises(SegmentShapeError, match=f"^{damage.removesuffix(' dtype')} state is"):
        take_in(other, snapshot, latents)
    assert other.length == 0


def test_latents_without_dimensions_are_refused(other: RequestState) -> None:
    with pytest.raises(SegmentShapeError, match="latents"):
        other.import_latents(torch.zeros(3))


def test_a_snapshot_of_another_length_than_the_latents_is_refused(
    state: RequestState, other: RequestState
) -> None:
    with pytest.raises(SegmentShapeError, match="at 70 tokens with latents of 69"):
        take_in(other, state.snapshot(), state.export_latents(0, 69))


def test_a_snapshot_of_no_tokens_is_refused(other: RequestState) -> None:
    with pytest.raises(SegmentShapeError, match="0 tokens"):
        other.import_snapshot(other.snapshot())


def test_more_latents_than_there_is_room_for_are_refused(
    engine: Engine, state: RequestState
) -> None:
    with (
        engine.new_state(69) as small,
        pytest.raises(SegmentShapeError, match="70 tokens, there is room for 69"),
    ):
        small.import_latents(state.export_latents(0, 70))
