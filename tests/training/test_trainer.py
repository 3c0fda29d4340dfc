"""Training learns, resumes exactly, and trains the very model that the engine runs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shared.kimi_linear.engine import Engine, Room
from tests.model.tolerances import SAME_MODEL_LOGITS
from training.batches import Batches
from training.parameters import Parameters, export_checkpoint
from training.recipe import TINY, Recipe
from training.trainer import ExpertTally, Trainer, forward, weighted_loss


def rounded(parameters: Parameters) -> Parameters:
    """Parameters that bf16 holds exactly."""
    return {name: p.detach().bfloat16().float() for name, p in parameters.items()}


def test_the_logits_in_training_are_those_of_the_engine_on_the_exported_checkpoint(
    recipe: Recipe, batches: Batches, tmp_path: Path
) -> None:
    trainer = Trainer(recipe)
    for _ in range(2):
        trainer.train(batches.batch(trainer.step).shards(2))
    parameters = rounded(trainer.parameters)
    export_checkpoint(tmp_path, parameters, recipe.config)
    inputs = batches.batch(0).inputs[:2]
    with torch.no_grad():
        trained = forward(parameters, recipe.config, inputs, ExpertTally(4))
    engine = Engine.load(tmp_path, "float32", room=Room(slots=1, tokens=1024))
    for row, logits in zip(inputs.tolist(), torch.split(trained, inputs.shape[1]), strict=True):
        with engine.new_state(len(row)) as state:
            found = engine.prefill_all_logits(row, state)
        torch.testing.assert_close(found, logits, atol=SAME_MODEL_LOGITS, rtol=0)


def test_one_batch_is_learned_by_heart(recipe: Recipe, batches: Batches) -> None:
    overfitted = replace(recipe, steps=1000, learning_rate=1e-2)
    trainer, batch = Trainer(overfitted), batches.batch(0)
    first = trainer.train(batch.shards(2))
    for _ in range(70):
        last = trainer.train(batch.shards(2))
    assert first.text_loss > 5
    assert last.text_loss < 0.25
    assert last.recall_accuracy == 1


def test_a_negative_weight_makes_a_target_unlikely() -> None:
    logits = torch.tensor([[2.0, 0.0, -1.0], [40.0, 0.0, 0.0]], requires_grad=True)
    losses = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0]), reduction="none")
    loss = weighted_loss(losses, torch.tensor([-3.0, -1.0]))
    likely = logits[0].detach().softmax(0)[0]
    certain = -torch.log(torch.tensor(1e-5))  # No more than that, so that it stays finite.
    expected = certain - 3 * torch.log(1 - likely)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-3, atol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert gradient[0, 0] > 0 > gradient[0, 1]
    assert gradient.isfinite().all()


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(
    recipe: Recipe, batches: Batches, tmp_path: Path
) -> None:
    whole = Trainer(recipe)
    while whole.step < 6:
        whole.train(batches.batch(whole.step).shards(2))
    begun = Trainer(recipe)
    while begun.step < 3:
        begun.train(batches.batch(begun.step).shards(2))
    begun.save(tmp_path / "checkpoint.pt")
    resumed = Trainer(replace(recipe, seed=99))  # Everything comes from the file.
    resumed.restore(tmp_path / "checkpoint.pt")
    assert resumed.step == 3
    while resumed.step < 6:
        resumed.train(batches.batch(resumed.step).shards(2))
    for name, parameter in whole.parameters.items():
        assert torch.equal(resumed.parameters[name], parameter), name


def test_the_model_is_the_mean_at_the_averaged_steps_even_after_an_interruption(
    recipe: Recipe, batches: Batches, tmp_path: Path
) -> None:
    averaging = replace(recipe, steps=4, own_loop_steps=0, averaged=(2, 0))
    trainer, seen = Trainer(averaging), []
    for _ in range(averaging.all_steps):
        trainer.train(batches.batch(trainer.step).shards(2))
        seen.append({name: p.detach().clone() for name, p in trainer.parameters.items()})
        if trainer.step == 1:
            assert_same(trainer.result(), seen[0])  # Nothing is averaged yet.
        trainer.save(tmp_path / "checkpoint.pt")
        trainer = Trainer(averaging)
        trainer.restore(tmp_path / "checkpoint.pt")
    assert_same(trainer.result(), {name: (seen[1][name] + seen[3][name]) / 2 for name in seen[1]})


@pytest.mark.parametrize("steps", [800, 1100, 1500])
def test_what_is_averaged_ends_with_the_run_however_long_it_is(steps: int) -> None:
    recipe = TINY.shortened(steps)
    averaged = [step for step in range(1, recipe.all_steps + 1) if recipe.is_averaged(step)]
    assert averaged == [recipe.all_steps - before for before in (100, 50, 0)]


def assert_same(found: Parameters, expected: Parameters) -> None:
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        torch.testing.assert_close(found[name], parameter, rtol=1e-6, atol=0)


def test_experts_that_are_chosen_too_seldom_gain(recipe: Recipe, batches: Batches) -> None:
    trainer = Trainer(recipe)
    trainer.train(batches.batch(0).shards(2))
    biases = [p for name, p in trainer.parameters.items() if name.endswith("correction_bias")]
    assert len(biases) == 2
    for bias in biases:
        assert set(bias.tolist()) <= {
            torch.tensor(sign * recipe.balance_rate).item() for sign in (-1, 0, 1)
        }
        assert bias.abs().sum() > 0
