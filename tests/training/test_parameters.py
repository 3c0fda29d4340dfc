"""An untrained model has every tensor of the published layout, and heads that look up."""

from pathlib import Path

import torch
from torch.nn import functional

from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine, Room
from training.parameters import export_checkpoint, initial_parameters
from training.recipe import TINY, Recipe


def test_the_same_seed_gives_the_same_parameters(recipe: Recipe) -> None:
    one, same = initial_parameters(recipe.config, 1), initial_parameters(recipe.config, 1)
    other = initial_parameters(recipe.config, 2)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


def test_an_exported_model_reads_back(recipe: Recipe, tmp_path: Path) -> None:
    export_checkpoint(tmp_path, initial_parameters(recipe.config, 1), recipe.config)
    assert KimiLinearConfig.from_directory(tmp_path) == recipe.config
    engine = Engine.load(tmp_path, "float32", room=Room(slots=1, tokens=64))
    with engine.new_state(4) as state:
        assert engine.prefill([[1, 2, 3]], [state]).isfinite().all()


def test_the_shipped_recipe_fits_in_25_megabytes() -> None:
    parameters = initial_parameters(TINY.config, TINY.seed)
    count = sum(tensor.numel() for tensor in parameters.values())
    assert 7e6 < count < 12.5e6


def test_a_head_keys_a_token_by_the_one_before_and_asks_with_it(recipe: Recipe) -> None:
    """At init, a query for a token is the key of what came right after that token."""
    parameters = initial_parameters(recipe.config, 1)
    prefix, width = "model.layers.0.self_attn", recipe.config.linear_attn_config.head_dim
    x = torch.randn(20, recipe.config.hidden_size)
    x[15] = x[4]
    found = {}
    for name in "qk":
        projected = x @ parameters[f"{prefix}.{name}_proj.weight"].T
        taps = parameters[f"{prefix}.{name}_conv1d.weight"]
        inputs = functional.pad(projected, (0, 0, taps.shape[1] - 1, 0))
        convolved = sum(inputs[n : n + 20] * taps[:, n] for n in range(taps.shape[1]))
        assert isinstance(convolved, torch.Tensor)
        found[name] = functional.normalize(functional.silu(convolved)[:, :width], dim=-1)
    matches = found["k"][:15] @ found["q"][15]
    assert int(matches.argmax()) == 5
