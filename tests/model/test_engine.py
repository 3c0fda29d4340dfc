"""What the engine says of its model, and what it refuses before it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import InvalidRequestError, NoRoomError
from shared.kimi_linear.engine import Engine, Room
from shared.kimi_linear.fingerprint import fingerprint

WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]


def test_it_names_its_model_and_the_layout_of_its_states(
    engine: Engine, reference_directory: Path
) -> None:
    assert engine.fingerprint == fingerprint(reference_directory)
    assert engine.layout == engine.config.state_layout("float32")
    assert engine.dtype == "float32"
    with engine.new_state(10) as state:
        assert state.length == 0
        assert state.capacity == 10


def test_a_token_outside_the_vocabulary_is_refused_and_nothing_changes(engine: Engine) -> None:
    with engine.new_state(10) as state:
        for tokens in ([1, engine.config.vocab_size], [-1], []):
            with pytest.raises(InvalidRequestError):
                engine.prefill([tokens], [state])
        with pytest.raises(InvalidRequestError, match=r"\[0, 512\), found 512 to 512"):
            engine.decode([512], [state])
        with pytest.raises(InvalidRequestError, match="no tokens"):
            engine.prefill([], [])
        assert state.length == 0


def test_a_full_context_is_refused(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    directory = write_checkpoint(reference_tensors, {**reference_config, "model_max_length": 4})
    engine = Engine.load(directory, "float32")
    state = engine.new_state(100)
    with pytest.raises(InvalidRequestError, match="5 tokens after 0 are more than the 4"):
        engine.prefill([[1, 2, 3, 4, 5]], [state])
    engine.prefill([[1, 2, 3, 4]], [state])
    with pytest.raises(InvalidRequestError, match="1 tokens after 4"):
        engine.decode([5], [state])


def test_more_tokens_than_a_state_has_room_for_are_refused(engine: Engine) -> None:
    with engine.new_state(3) as state:
        with pytest.raises(InvalidRequestError, match="more than the 3 there is room for"):
            engine.prefill([[1, 2, 3, 4]], [state])
        assert state.length == 0


def test_an_engine_has_the_room_that_it_was_given(reference_directory: Path) -> None:
    engine = Engine.load(reference_directory, "float32", room=Room(slots=2, tokens=130))
    assert engine.capacity == 192, "whole pages of 64"
    with engine.new_state(64), engine.new_state(64):
        assert not engine.has_room(1), "no slot is left"
    with engine.new_state(100):
        assert engine.has_room(64)
        assert not engine.has_room(65)
        with pytest.raises(NoRoomError, match="no room for 65 tokens: 1 slots and 64 of 192"):
            engine.new_state(65)


def test_without_a_number_there_is_room_for_the_whole_context(engine: Engine) -> None:
    assert engine.capacity >= engine.config.model_max_length


def test_bfloat16_computes_about_the_same_in_half_the_memory(
    engine: Engine, reference_directory: Path
) -> None:
    narrow = Engine.load(reference_directory, "bfloat16")
    tokens = list(range(100))
    with engine.new_state(100) as state:
        wide_logits = engine.prefill_all_logits(tokens, state)
    state = narrow.new_state(101)
    narrow_logits = narrow.prefill_all_logits(tokens, state)
    decoded = narrow.decode([7], [state])
    assert narrow_logits.dtype == decoded.dtype == torch.float32
    assert narrow.layout == engine.layout, "states are fp32 whatever the weights"
    assert state.export_latents(0, 101).dtype == torch.float32
    # Not everywhere: rounding tips near ties between experts, and random experts are unalike.
    agreement = functional.cosine_similarity(wide_logits, narrow_logits)
    assert agreement.median() > 0.98


def test_tied_embeddings_serve_as_the_head(
    engine: Engine,
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    reference_tensors["lm_head.weight"] = reference_tensors["model.embed_tokens.weight"].clone()
    directory = write_checkpoint(reference_tensors, reference_config)
    untied = Engine.load(directory, "float32")
    expected = untied.prefill([[1, 2, 3]], [untied.new_state(3)])
    del reference_tensors["lm_head.weight"]
    directory = write_checkpoint(
        reference_tensors, {**reference_config, "tie_word_embeddings": True}
    )
    tied = Engine.load(directory, "float32")
    assert torch.equal(tied.prefill([[1, 2, 3]], [tied.new_state(3)]), expected)


def test_every_layer_may_be_of_either_kind(engine: Engine, reference_directory: Path) -> None:
    assert engine.config.layer_kinds == ("kda", "kda", "kda", "mla") * 2


@pytest.mark.parametrize("room", [Room(slots=1, tokens=64), Room(slots=4, tokens=4096)])
def test_an_engine_warms_up_in_any_room_and_leaves_it_free(
    reference_directory: Path, room: Room
) -> None:
    engine = Engine.load(reference_directory, "float32", room=room)
    engine.warm_up()
    assert engine.has_room(engine.capacity)
