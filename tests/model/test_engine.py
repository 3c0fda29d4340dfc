"""What the engine says of its model, and what it refuses before it computes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from shared.errors import InvalidRequestError
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.fingerprint import fingerprint

WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]


def test_it_names_its_model_and_the_layout_of_its_states(
    engine: Engine, reference_directory: Path
) -> None:
    assert engine.fingerprint == fingerprint(reference_directory)
    assert engine.layout == engine.config.state_layout("float32")
    assert engine.new_state().length == 0


def test_a_token_outside_the_vocabulary_is_refused_and_nothing_changes(engine: Engine) -> None:
    state = engine.new_state()
    for tokens in ([1, engine.config.vocab_size], [-1], []):
        with pytest.raises(InvalidRequestError):
            engine.prefill(tokens, state)
    with pytest.raises(InvalidRequestError, match=r"\[0, 512\), found 512 to 512"):
        engine.decode([512], [state])
    assert state.length == 0


def test_a_full_context_is_refused(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    directory = write_checkpoint(reference_tensors, {**reference_config, "model_max_length": 4})
    engine = Engine.load(directory, "float32")
    state = engine.new_state()
    with pytest.raises(InvalidRequestError, match="context of 4"):
        engine.prefill([1, 2, 3, 4, 5], state)
    engine.prefill([1, 2, 3, 4], state)
    with pytest.raises(InvalidRequestError, match="1 tokens after 4"):
        engine.decode([5], [state])


def test_bfloat16_computes_about_the_same_in_half_the_memory(
    engine: Engine, reference_directory: Path
) -> None:
    narrow = Engine.load(reference_directory, "bfloat16")
    tokens = list(range(100))
    wide_logits = engine.prefill_all_logits(tokens, engine.new_state())
    state = narrow.new_state()
    narrow_logits = narrow.prefill_all_logits(tokens, state)
    decoded = narrow.decode([7], [state])
    assert narrow_logits.dtype == decoded.dtype == torch.float32
    assert state.export_latents(0, 101).dtype == torch.bfloat16
    assert state.snapshot().recurrent.dtype == torch.float32
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
    expected = untied.prefill([1, 2, 3], untied.new_state())
    del reference_tensors["lm_head.weight"]
    directory = write_checkpoint(
        reference_tensors, {**reference_config, "tie_word_embeddings": True}
    )
    tied = Engine.load(directory, "float32")
    assert torch.equal(tied.prefill([1, 2, 3], tied.new_state()), expected)


def test_every_layer_may_be_of_either_kind(engine: Engine, reference_directory: Path) -> None:
    assert engine.config.layer_kinds == ("kda", "kda", "kda", "mla") * 2
