"""A state is copied out without being disturbed, and is taken in only if it fits."""

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.exactness import scattered_state
from shared.errors import SegmentShapeError
from shared.kernels.batch import Batch
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.request_state import RequestState
from shared.kimi_linear.snapshot import KdaSnapshot
from shared.kimi_linear.state_pool import StatePool
from tests.model.tolerances import SAME_MODEL_LOGITS


@pytest.fixture(scope="module")
def engine(reference_directory: Path) -> Engine:
    """An engine that has no other requests than a test's own."""
    return Engine.load(reference_directory, "float32", room=Room(slots=10, tokens=1024))


@pytest.fixture
def state(engine: Engine) -> Iterator[RequestState]:
    """A state of 70 tokens with room for 200, in pages that are not neighbours."""
    with ExitStack() as held:
        state = scattered_state(engine, 200, held)
        engine.prefill([list(range(70))], [state])
        yield state


@pytest.fixture
def other(engine: Engine) -> Iterator[RequestState]:
    """An empty state to import into, in neighbouring pages."""
    with engine.new_state(200) as other:
        yield other


def test_the_two_lie_as_differently_as_they_can(state: RequestState, other: RequestState) -> None:
    with state.in_use() as scattered, other.in_use() as together:
        assert len(scattered.extents) == len(scattered.pages) == 4
        assert len(together.extents) == 1


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
    here, there = engine.decode([5], [state]), engine.decode([5], [other])
    torch.testing.assert_close(here, there, rtol=0, atol=SAME_MODEL_LOGITS)


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


def test_a_refusal_says_what_was_found_and_what_was_expected(
    state: RequestState, other: RequestState
) -> None:
    with pytest.raises(SegmentShapeError) as refusal:
        other.import_latents(state.export_latents(0, 9)[:1].bfloat16())
    assert str(refusal.value) == (
        "latents state is torch.bfloat16 (1, 9, 80), expected torch.float32 (2, 9, 80)"
    )


def test_latents_without_dimensions_are_refused(other: RequestState) -> None:
    with pytest.raises(SegmentShapeError, match="latents"):
        other.import_latents(torch.zeros(3))


def test_a_state_with_tokens_takes_in_latents_only_after_it_was_cleared(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    engine.prefill([[1, 2, 3]], [other])
    before, latents = other.export_latents(0, 3), state.export_latents(0, 70)
    with pytest.raises(ValueError, match="seen 3 tokens, not cleared"):
        other.import_latents(latents)
    assert torch.equal(other.export_latents(0, 3), before)
    other.clear()
    take_in(other, state.snapshot(), latents)
    with pytest.raises(ValueError, match="seen 70 tokens, not cleared"):
        other.import_latents(latents)


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


# --- release -------------------------------------------------------------------------------


def test_the_room_of_a_released_state_is_given_to_others_clean(engine: Engine) -> None:
    with engine.new_state(100) as first, first.in_use() as placement:
        expected = engine.prefill([[7, 8, 9]], [first])
    with engine.new_state(100) as second, second.in_use() as same_placement:
        assert same_placement == placement
        assert torch.equal(engine.prefill([[7, 8, 9]], [second]), expected)


def test_releasing_twice_is_releasing_once(engine: Engine) -> None:
    state = engine.new_state(1024)
    state.release()
    state.release()
    with engine.new_state(1024):
        state.release()
        assert not engine.has_room(1), "it gave back what another request has now"


def test_a_released_state_is_neither_read_nor_written(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    snapshot, latents = state.snapshot(), state.export_latents(0, 70)
    other.import_latents(latents)
    state.release()
    other.release()
    with engine.new_state(1024):
        for use in (
            state.snapshot,
            state.clear,
            lambda: state.export_latents(0, 70),
            lambda: other.import_latents(latents),
            lambda: other.import_snapshot(snapshot),
            lambda: engine.prefill([[1, 2]], [state]),
            lambda: engine.decode([1], [state]),
        ):
            with pytest.raises(ValueError, match="the state was released"):
                use()


def test_room_that_is_released_in_use_comes_back_with_the_last_use(engine: Engine) -> None:
    state, freed = engine.new_state(1024), list[bool]()
    engine.watch_room(lambda: freed.append(engine.has_room(1024)))
    with state.in_use():
        with state.in_use():
            state.release()
            assert not engine.has_room(1)
        assert not engine.has_room(1)
        assert freed == []
    assert freed == [True]


def test_a_computation_that_breaks_off_leaves_its_states_to_be_cleared_or_released(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine.new_state(100) as expected_state, engine.new_state(100) as state:
        expected = engine.prefill([[1, 2, 3]], [expected_state])
        with monkeypatch.context() as patch:
            patch.setattr(engine, "_model", _Broken())
            with pytest.raises(_BrokenError):
                engine.prefill([[1, 2, 3]], [state])
        state.clear()
        assert torch.equal(engine.prefill([[1, 2, 3]], [state]), expected)
    assert engine.has_room(1024)


class _BrokenError(Exception):
    pass


class _Broken:
    """A model that fails in the middle of its work: states are written to, logits do not come."""

    def __call__(self, tokens: Tensor, pool: StatePool, batch: Batch) -> Tensor:
        slots = batch.slots
        pool.recurrent[:, slots] = 5.0
        pool.convolution[:, slots] = 5.0
        raise _BrokenError
