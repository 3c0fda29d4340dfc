"""A state is copied out without being disturbed, and is taken in only if it fits."""

from collections.abc import Callable, Iterator
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
from shared.kimi_linear.model import LayerPassed
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
    state.import_latents(0, latents)
    state.import_snapshot(snapshot)
    state.finish_import(snapshot.length)


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
        other.import_latents(start, state.export_latents(start, min(start + 30, 70)))
    other.import_snapshot(snapshot)
    assert other.length == 0
    other.finish_import(70)
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
    other.import_latents(0, state.export_latents(0, 40))
    other.import_snapshot(state.snapshot())
    other.clear()
    assert not other.importing
    with pytest.raises(SegmentShapeError, match="latents of 0"):
        other.finish_import(40)
    take_in(other, state.snapshot(), state.export_latents(0, 70))
    assert torch.equal(other.export_latents(0, 70), state.export_latents(0, 70))


def damaged(snapshot: KdaSnapshot, latents: Tensor) -> dict[str, tuple[KdaSnapshot, Tensor]]:
    return {
        "recurrent": (replace(snapshot, recurrent=snapshot.recurrent[:, 1:]), latents),
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
        other.import_latents(0, state.export_latents(0, 9)[:1].bfloat16())
    assert str(refusal.value) == (
        "latents state is torch.bfloat16 (1, 9, 80), expected torch.float32 (2, 9, 80)"
    )


def test_latents_without_dimensions_are_refused(other: RequestState) -> None:
    with pytest.raises(SegmentShapeError, match="latents"):
        other.import_latents(0, torch.zeros(3))


def test_a_state_with_tokens_takes_in_latents_only_after_it_was_cleared(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    engine.prefill([[1, 2, 3]], [other])
    before, latents = other.export_latents(0, 3), state.export_latents(0, 70)
    with pytest.raises(ValueError, match="seen 3 tokens, not cleared"):
        other.import_latents(0, latents)
    assert torch.equal(other.export_latents(0, 3), before)
    other.clear()
    take_in(other, state.snapshot(), latents)
    with pytest.raises(ValueError, match="seen 70 tokens, not cleared"):
        other.import_latents(0, latents)


def test_a_snapshot_for_a_state_with_tokens_is_refused(
    state: RequestState, other: RequestState
) -> None:
    take_in(other, state.snapshot(), state.export_latents(0, 70))
    with pytest.raises(ValueError, match="seen 70 tokens, not cleared"):
        other.import_snapshot(state.snapshot())


def test_a_state_of_no_tokens_is_not_finished(other: RequestState) -> None:
    other.import_snapshot(other.snapshot())
    with pytest.raises(SegmentShapeError, match="0 tokens"):
        other.finish_import(0)


# --- import in pieces ----------------------------------------------------------------------


def test_pieces_come_in_any_order_and_may_overlap(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    snapshot = state.snapshot()
    *first_layers, last_layer = snapshot.split(1)
    assert first_layers, "the model has one KDA layer, which proves nothing"
    other.import_snapshot(last_layer)
    for start, stop in ((0, 40), (10, 30), (40, 40), (35, 65), (64, 70)):
        other.import_latents(start, state.export_latents(start, stop))
    for piece in reversed(first_layers):
        other.import_snapshot(piece)
    other.finish_import(70)
    assert torch.equal(other.snapshot().recurrent, snapshot.recurrent)
    assert torch.equal(other.snapshot().convolution, snapshot.convolution)
    assert torch.equal(other.export_latents(0, 70), state.export_latents(0, 70))
    here, there = engine.decode([5], [state]), engine.decode([5], [other])
    torch.testing.assert_close(here, there, rtol=0, atol=SAME_MODEL_LOGITS)


def test_what_is_imported_again_replaces_what_was_there(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    """As where a cached prefix is followed by the states at the end of the prompt."""
    other.import_latents(0, torch.zeros(engine.layout.latents_shape(64)))
    other.import_snapshot(replace(state.snapshot(), length=64))
    take_in(other, state.snapshot(), state.export_latents(0, 70))
    assert torch.equal(other.export_latents(0, 70), state.export_latents(0, 70))


def test_latents_behind_a_gap_or_before_the_first_token_are_refused(
    state: RequestState, other: RequestState
) -> None:
    other.import_latents(0, state.export_latents(0, 10))
    for start in (11, -1):
        with pytest.raises(SegmentShapeError, match=f"from {start} on, with latents of 10"):
            other.import_latents(start, state.export_latents(11, 20))


def test_more_latents_than_the_state_has_tokens_do_no_harm(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    with engine.new_state(200) as shorter:
        engine.prefill([list(range(64))], [shorter])
        other.import_latents(0, state.export_latents(0, 70))
        other.import_snapshot(shorter.snapshot())
        other.finish_import(64)
        here, there = engine.decode([5], [shorter]), engine.decode([5], [other])
    torch.testing.assert_close(here, there, rtol=0, atol=SAME_MODEL_LOGITS)


@pytest.mark.parametrize("length", [69, 71])
def test_an_import_is_not_finished_at_another_length(
    state: RequestState, other: RequestState, length: int
) -> None:
    other.import_latents(0, state.export_latents(0, 70))
    other.import_snapshot(state.snapshot())
    with pytest.raises(SegmentShapeError, match=f"a state of {length} tokens with"):
        other.finish_import(length)
    assert other.importing
    other.finish_import(70)
    assert not other.importing


def test_an_import_without_one_of_its_layers_is_not_finished(
    state: RequestState, other: RequestState
) -> None:
    first, *others = state.snapshot().split(1)
    other.import_latents(0, state.export_latents(0, 70))
    for piece in others:
        other.import_snapshot(piece)
    with pytest.raises(SegmentShapeError, match="layer 0 missing"):
        other.finish_import(70)
    other.import_snapshot(replace(first, length=69))
    with pytest.raises(SegmentShapeError, match="layer 0 at 69 tokens"):
        other.finish_import(70)


def test_an_import_without_latents_is_not_finished(
    state: RequestState, other: RequestState
) -> None:
    other.import_snapshot(state.snapshot())
    with pytest.raises(SegmentShapeError, match="70 tokens with latents of 0"):
        other.finish_import(70)


def test_layers_that_the_model_does_not_have_are_refused(
    state: RequestState, other: RequestState
) -> None:
    snapshot = state.snapshot()
    for first_layer in (1, -1):
        with pytest.raises(SegmentShapeError, match=f"layers {first_layer} to"):
            other.import_snapshot(replace(snapshot, first_layer=first_layer))
    assert not other.importing


def test_a_state_with_some_parts_is_not_computed_on(
    engine: Engine, state: RequestState, other: RequestState
) -> None:
    parts: list[Callable[[], object]] = [
        lambda: other.import_latents(0, state.export_latents(0, 70)),
        lambda: other.import_snapshot(state.snapshot().split(1)[0]),
    ]
    computations: list[Callable[[], object]] = [
        lambda: engine.prefill([[1, 2]], [other]),
        lambda: engine.prefill_all_logits([1, 2], other),
        lambda: engine.decode([1, 2], [state, other]),
    ]
    for take_in_a_part in parts:
        take_in_a_part()
        for compute in computations:
            with pytest.raises(ValueError, match="still being imported"):
                compute()
        assert state.length == 70
        other.clear()
    engine.prefill([[1, 2]], [other])


def test_a_snapshot_is_split_into_views_of_successive_layers(state: RequestState) -> None:
    snapshot = state.snapshot()
    layer_bytes = snapshot.recurrent[0].nbytes + snapshot.convolution[0].nbytes
    for most_bytes in (1, layer_bytes, 2 * layer_bytes, 2 * layer_bytes + 1, 2**40):
        pieces = snapshot.split(most_bytes)
        layers = [piece.layers for piece in pieces]
        assert [piece.first_layer for piece in pieces] == [
            sum(layers[:number]) for number in range(len(layers))
        ]
        assert max(layers) <= max(1, most_bytes // layer_bytes)
        assert max(layers) - min(layers) <= 1
        assert all(piece.length == 70 for piece in pieces)
        assert torch.equal(torch.cat([piece.recurrent for piece in pieces]), snapshot.recurrent)
        assert pieces[-1].convolution[-1].data_ptr() == snapshot.convolution[-1].data_ptr()
    again = snapshot.split(2 * layer_bytes)[-1].split(1)
    assert again[-1].first_layer == snapshot.layers - 1


def test_pieces_without_room_for_a_byte_are_refused(state: RequestState) -> None:
    with pytest.raises(ValueError, match="0 bytes hold nothing"):
        state.snapshot().split(0)


def test_more_latents_than_there_is_room_for_are_refused(
    engine: Engine, state: RequestState
) -> None:
    with (
        engine.new_state(69) as small,
        pytest.raises(SegmentShapeError, match="70 tokens, there is room for 69"),
    ):
        small.import_latents(0, state.export_latents(0, 70))


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
    other.import_latents(0, latents)
    state.release()
    other.release()
    with engine.new_state(1024):
        for use in (
            state.snapshot,
            state.clear,
            lambda: state.export_latents(0, 70),
            lambda: other.import_latents(0, latents),
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

    def __call__(
        self, tokens: Tensor, pool: StatePool, batch: Batch, passed: LayerPassed
    ) -> Tensor:
        slots = batch.slots
        pool.recurrent[:, slots] = 5.0
        pool.convolution[:, slots] = 5.0
        raise _BrokenError


def test_layers_are_final_when_their_prefill_says_so(engine: Engine) -> None:
    prompt = list(range(1, 71))
    kinds = engine.config.layer_kinds
    pieces: list[KdaSnapshot] = []
    with engine.new_state(len(prompt)) as state:

        def passed(layer: int) -> None:
            if kinds[layer] == "kda":
                first = sum(piece.layers for piece in pieces)
                pieces.append(state.snapshot_of(range(first, first + 1), len(prompt)))

        engine.prefill([prompt], [state], passed)
        whole = state.snapshot()
    assert [piece.first_layer for piece in pieces] == list(range(whole.layers))
    assert {piece.length for piece in pieces} == {len(prompt)}
    assert torch.equal(torch.cat([piece.recurrent for piece in pieces]), whole.recurrent)
    assert torch.equal(torch.cat([piece.convolution for piece in pieces]), whole.convolution)
