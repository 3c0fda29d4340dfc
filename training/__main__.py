"""Prepares the data, trains, and writes the model directory.

    python -m training prepare DIRECTORY
    nice -n 19 python -m training run DIRECTORY [--steps N]
    python -m training export DIRECTORY MODEL

DIRECTORY, outside the repository, keeps the text, the tokenizer, the checkpoint and the log.
"""

import argparse
import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import torch

from shared.kernels.cpu.memory import keep_freed_memory
from shared.kimi_linear.config import GENERATION_CONFIG_FILE
from shared.kimi_linear.tokenizer.tiktoken_format import (
    TIKTOKEN_FILE,
    TOKENIZER_CONFIG_FILE,
    TiktokenTokenizer,
)
from training.batches import Batches, TrainingBatch, tokenized
from training.corpus import (
    HELD_OUT_FILE,
    TRAIN_FILE,
    documents,
    fetch,
    read_documents,
    split,
    write_documents,
)
from training.held_out import bits_per_byte
from training.parameters import export_checkpoint
from training.recipe import TINY, VOCABULARY
from training.tokenizer import train_ranks, write_tokenizer
from training.trainer import Trainer

CHECKPOINT_FILE: Final = "checkpoint.pt"
LOG_FILE: Final = "log.jsonl"
SAVE_EVERY: Final = 50
MEASURE_EVERY: Final = 100
"""Steps."""
MEMORY_KEPT: Final = 2**31 - 1
"""Bytes: a step frees, and the next one needs, well over a gigabyte."""


def prepare(directory: Path) -> None:
    """Fetch the text, divide it, and make the tokenizer."""
    directory.mkdir(parents=True, exist_ok=True)
    train, held_out = split(documents(fetch(directory)))
    write_documents(directory / TRAIN_FILE, train)
    write_documents(directory / HELD_OUT_FILE, held_out)
    ranks = train_ranks((document.text for document in train), VOCABULARY)
    write_tokenizer(directory, ranks)


def run(directory: Path, steps: int) -> None:
    """Train from the checkpoint on, or from the start where there is none."""
    torch.set_num_threads(1)  # each shard has a thread of its own
    torch.use_deterministic_algorithms(True)
    keep_freed_memory(MEMORY_KEPT)
    tokenizer = TiktokenTokenizer.from_directory(directory, VOCABULARY)
    works = tokenized(read_documents(directory / TRAIN_FILE), tokenizer)
    held_out = tokenized(read_documents(directory / HELD_OUT_FILE), tokenizer)
    recipe = TINY.shortened(steps)
    trainer, checkpoint = Trainer(recipe), directory / CHECKPOINT_FILE
    if checkpoint.exists():
        trainer.restore(checkpoint)
    batches = Batches(recipe, works, tokenizer)
    while trainer.step < recipe.all_steps:
        started, used = time.monotonic(), time.process_time()
        report = trainer.train(_shards(trainer, batches))
        entry: dict[str, Any] = {
            "step": trainer.step,
            **asdict(report),
            "seconds": time.monotonic() - started,
            "processor_seconds": time.process_time() - used,
        }
        if trainer.step % MEASURE_EVERY == 0:
            entry["held_out"] = bits_per_byte(
                trainer.parameters, recipe.config, held_out, tokenizer
            )
        _log(directory / LOG_FILE, entry)
        if trainer.step % SAVE_EVERY == 0 or trainer.step == recipe.all_steps:
            trainer.save(checkpoint)


def _shards(trainer: Trainer, batches: Batches) -> list[TrainingBatch]:
    """The next step's data; behind the others, with what the model makes of text now."""
    batch = batches.batch(trainer.step)
    if trainer.step < trainer.recipe.steps:
        return batch.shards(trainer.recipe.shards)
    return [batch, batches.own_texts(trainer.step, trainer.parameters)]


def export(directory: Path, model: Path) -> None:
    """Write the model directory from the checkpoint."""
    trainer = Trainer(TINY)
    trainer.restore(directory / CHECKPOINT_FILE)
    model.mkdir(parents=True, exist_ok=True)
    export_checkpoint(model, trainer.result(), TINY.config)
    for name in (TIKTOKEN_FILE, TOKENIZER_CONFIG_FILE):
        shutil.copyfile(directory / name, model / name)
    generation = {"eos_token_id": list(TINY.config.eos_token_ids)}
    (model / GENERATION_CONFIG_FILE).write_text(json.dumps(generation, indent=2) + "\n")


def _log(path: Path, entry: dict[str, Any]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(entry) + "\n")


def main() -> None:
    """Run one of the commands."""
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("prepare", "run", "export"):
        commands.add_parser(name).add_argument("directory", type=Path)
    commands.choices["run"].add_argument("--steps", type=int, default=TINY.steps)
    commands.choices["export"].add_argument("model", type=Path)
    given = parser.parse_args()
    if given.command == "prepare":
        prepare(given.directory)
    elif given.command == "run":
        run(given.directory, given.steps)
    else:
        export(given.directory, given.model)


if __name__ == "__main__":
    main()
