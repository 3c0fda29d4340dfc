"""Random models are written in the published layout and behave like a model."""

from pathlib import Path

import pytest
import torch

from shared.errors import CheckpointError
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.fingerprint import fingerprint
from shared.kimi_linear.presets import EOS, PRESETS, VOCABULARY, write_random_checkpoint
from shared.kimi_linear.tokenizer.loading import load_tokenizer


@pytest.fixture(scope="module")
def tiny_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "tiny"
    write_random_checkpoint(directory, "tiny", seed=0)
    return directory


@pytest.fixture(scope="module")
def tiny(tiny_directory: Path) -> Engine:
    return Engine.load(tiny_directory, "float32", threads=1)


def test_the_directory_says_what_the_preset_says(tiny_directory: Path) -> None:
    config = KimiLinearConfig.from_directory(tiny_directory)
    tokenizer = load_tokenizer(tiny_directory, VOCABULARY)
    assert config == PRESETS["tiny"].config
    assert config.eos_token_ids == (EOS,)
    assert tokenizer is not None
    assert tokenizer.vocab_size == config.vocab_size


def test_a_preset_and_a_seed_are_one_model(tiny_directory: Path, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "again", "tiny", seed=0)
    write_random_checkpoint(tmp_path / "other", "tiny", seed=1)
    assert fingerprint(tmp_path / "again") == fingerprint(tiny_directory)
    assert fingerprint(tmp_path / "other") != fingerprint(tiny_directory)


def test_a_directory_with_anything_in_it_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="not empty"):
        write_random_checkpoint(tmp_path, "tiny")
    assert [path.name for path in tmp_path.iterdir()] == ["keep.txt"]


def test_the_greedy_text_is_printable_and_does_not_repeat_itself(
    tiny: Engine, tiny_directory: Path
) -> None:
    tokenizer = load_tokenizer(tiny_directory, VOCABULARY)
    assert tokenizer is not None
    state = tiny.new_state(200)
    logits = tiny.prefill([tokenizer.encode("The quick brown fox")], [state])[0]
    tokens = []
    for _ in range(100):
        tokens.append(int(logits.argmax()))
        logits = tiny.decode([tokens[-1]], [state])[0]
    assert len(set(tokens)) > 30
    assert tokenizer.decode(tokens).isprintable()


def test_a_long_prompt_stays_finite(tiny: Engine) -> None:
    state = tiny.new_state(4096)
    tokens = torch.randint(0, 256, (4096,)).tolist()
    assert tiny.prefill([tokens], [state]).isfinite().all()
    assert state.snapshot().recurrent.abs().max() < 100


def test_the_small_preset_loads_in_bfloat16(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path / "small", "small")
    engine = Engine.load(tmp_path / "small", "bfloat16")
    state = engine.new_state(4)
    assert engine.prefill([[1, 2, 3]], [state]).isfinite().all()
    assert engine.decode([4], [state]).isfinite().all()
