"""What loops in a model's own text is found, and weighed against."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from training.batches import Batches
from training.own_loops import PROMPT, TEXT, looping, own_loops
from training.recall import UNSCORED
from training.recipe import Recipe
from training.trainer import Trainer


@given(
    before=st.lists(st.integers(0, 9), max_size=10, unique=True),
    piece=st.lists(st.integers(10, 99), min_size=1, max_size=20, unique=True),
    copies=st.integers(1, 5),
    after=st.lists(st.integers(100, 109), max_size=10, unique=True),
)
def test_what_comes_a_third_time_in_a_row_loops(
    before: list[int], piece: list[int], copies: int, after: list[int]
) -> None:
    found = looping(before + piece * copies + after)
    second = len(before) + 2 * len(piece)
    end = len(before) + copies * len(piece)
    assert [n for n, loops in enumerate(found) if loops] == list(range(second, end))


def test_the_likeliest_continuations_are_scored_only_where_they_loop(
    recipe: Recipe, batches: Batches
) -> None:
    parameters = Trainer(recipe).parameters
    prompts = [
        batches.batch(step).inputs[0, :length].tolist() for step, length in enumerate((9, 4))
    ]
    texts = own_loops(parameters, recipe.config, prompts, 3.0)
    for prompt, text in zip(prompts, texts, strict=True):
        assert len(text.ids) == TEXT
        assert text.ids[: len(prompt)] == prompt
        assert text.weights[: len(prompt)] == [UNSCORED] + [1.0] * (len(prompt) - 1)
        loops = looping(text.ids[len(prompt) :])
        assert text.weights[len(prompt) :] == [-3.0 if found else UNSCORED for found in loops]


def test_a_text_of_the_models_own_does_not_depend_on_those_beside_it(
    recipe: Recipe, batches: Batches
) -> None:
    parameters = Trainer(recipe).parameters
    prompts = [batches.batch(0).inputs[0, :length].tolist() for length in (16, 3)]
    together = own_loops(parameters, recipe.config, prompts, 3.0)
    assert together == [own_loops(parameters, recipe.config, [p], 3.0)[0] for p in prompts]


def test_the_models_own_texts_of_a_step_are_the_same_again(
    recipe: Recipe, batches: Batches
) -> None:
    parameters = Trainer(recipe).parameters
    own, again = (batches.own_texts(3, parameters) for _ in range(2))
    assert own.inputs.shape == (recipe.own_texts, TEXT - 1)
    assert not own.is_recall.any()
    assert all(torch.equal(a, b) for a, b in zip(own.tensors, again.tensors, strict=True))
    scored_as_text = own.is_text.sum(dim=1) + 1
    assert PROMPT[0] <= int(scored_as_text.min()) < int(scored_as_text.max()) <= PROMPT[1]


def test_steps_behind_the_others_have_a_lower_rate_that_ends_at_zero(recipe: Recipe) -> None:
    polished = replace(recipe, own_loop_steps=10, own_loop_pace=0.3)
    paces = [polished.pace(recipe.steps + step) for step in range(10)]
    assert paces == sorted(paces, reverse=True)
    assert paces[0] < 0.3
    assert 0 < paces[-1] < 0.03
    assert polished.all_steps == recipe.steps + 10
