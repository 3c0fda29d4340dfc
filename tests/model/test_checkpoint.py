"""Published weight files load in all their forms; a damaged one is refused by the tensor's name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.errors import CheckpointError
from shared.kernels.dispatch import kernels_for
from shared.kimi_linear.checkpoint import load_weights
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.read_progress import ReadProgress, unobserved

WriteCheckpoint = Callable[[dict[str, Tensor], dict[str, Any]], Path]

Q_PROJ = "model.layers.3.self_attn.q_proj.weight"
EXPERT = "model.layers.5.block_sparse_moe.experts.7.w2.weight"


def logits_of(directory: Path) -> Tensor:
    return first_logits(Engine.load(directory, "float32"))


def first_logits(engine: Engine) -> Tensor:
    with engine.new_state(20) as state:
        return engine.prefill([list(range(20))], [state])


def load(directory: Path, progress: ReadProgress = unobserved) -> None:
    config = KimiLinearConfig.from_directory(directory)
    load_weights(directory, config, kernels_for("cpu", "float32"), progress)


@pytest.fixture
def expected_logits(engine: Engine) -> Tensor:
    return first_logits(engine)


def write_sharded(directory: Path, tensors: dict[str, Tensor]) -> None:
    weight_map = {
        name: f"model-0000{number % 3 + 1}-of-00003.safetensors"
        for number, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        shard = {name: tensors[name] for name in tensors if weight_map[name] == file}
        save_file(shard, directory / file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards_are_one_checkpoint(
    tmp_path: Path,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
    expected_logits: Tensor,
) -> None:
    write_sharded(tmp_path, reference_tensors)
    (tmp_path / "config.json").write_text(json.dumps(reference_config))
    assert torch.equal(logits_of(tmp_path), expected_logits)


def test_a_model_without_a_shared_expert_is_one_whose_shared_expert_says_nothing(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    silent = {
        name: torch.zeros_like(tensor) if "shared_experts.down_proj" in name else tensor
        for name, tensor in reference_tensors.items()
    }
    expected = logits_of(write_checkpoint(silent, reference_config))
    without = {name: x for name, x in reference_tensors.items() if "shared_experts" not in name}
    config = {**reference_config, "num_shared_experts": 0}
    assert torch.equal(logits_of(write_checkpoint(without, config)), expected)


def test_singleton_dimensions_do_not_matter(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
    expected_logits: Tensor,
) -> None:
    squeezed = {
        name: tensor.squeeze().clone() if name.endswith(("A_log", "conv1d.weight")) else tensor
        for name, tensor in reference_tensors.items()
    }
    assert squeezed["model.layers.0.self_attn.A_log"].dim() == 1
    directory = write_checkpoint(squeezed, reference_config)
    assert torch.equal(logits_of(directory), expected_logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_weights_are_widened(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    narrow = {name: tensor.to(dtype) for name, tensor in reference_tensors.items()}
    found = logits_of(write_checkpoint(narrow, reference_config))
    rounded = {name: tensor.float() for name, tensor in narrow.items()}
    assert torch.equal(found, logits_of(write_checkpoint(rounded, reference_config)))


def test_tensors_of_layers_that_predict_further_tokens_are_ignored(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    reference_tensors["model.layers.8.eh_proj.weight"] = torch.zeros(2, 2)
    load(write_checkpoint(reference_tensors, reference_config))


@pytest.mark.parametrize("name", [Q_PROJ, EXPERT, "lm_head.weight", "model.norm.weight"])
def test_a_missing_tensor_is_named_with_its_shape(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
    name: str,
) -> None:
    shape = tuple(reference_tensors.pop(name).shape)
    with pytest.raises(CheckpointError) as refusal:
        load(write_checkpoint(reference_tensors, reference_config))
    assert f"tensor {name} is missing, expected shape {shape}" in str(refusal.value)


@pytest.mark.parametrize("name", [Q_PROJ, EXPERT, "model.layers.0.self_attn.A_log"])
def test_a_tensor_of_another_shape_is_named_with_both_shapes(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
    name: str,
) -> None:
    reference_tensors[name] = torch.zeros(5, 7)
    with pytest.raises(CheckpointError, match=r"has shape \(5, 7\), expected \(\d+,") as refusal:
        load(write_checkpoint(reference_tensors, reference_config))
    assert name in str(refusal.value)


def test_a_transposed_tensor_is_refused(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    reference_tensors[EXPERT] = reference_tensors[EXPERT].T.contiguous()
    with pytest.raises(CheckpointError, match=r"has shape \(64, 96\), expected \(96, 64\)"):
        load(write_checkpoint(reference_tensors, reference_config))


def test_a_tensor_that_is_not_of_floats_is_refused(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    reference_tensors[Q_PROJ] = reference_tensors[Q_PROJ].to(torch.int8)
    complaint = rf"tensor {Q_PROJ} has dtype I8, expected one of F32, BF16, F16"
    with pytest.raises(CheckpointError, match=complaint):
        load(write_checkpoint(reference_tensors, reference_config))


def test_a_tensor_that_the_model_would_not_use_is_refused(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    reference_tensors["model.layers.0.self_attn.g_b_proj.bias"] = torch.zeros(128)
    with pytest.raises(CheckpointError, match=r"not part of .* g_b_proj\.bias|g_b_proj\.bias"):
        load(write_checkpoint(reference_tensors, reference_config))


def test_a_truncated_file_is_refused_with_the_tensor_that_is_cut_off(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    directory = write_checkpoint(reference_tensors, reference_config)
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(CheckpointError) as refusal:
        load(directory)
    named = [name for name in reference_tensors if f"tensor {name} of shape" in str(refusal.value)]
    assert len(named) == 1
    assert str(tuple(reference_tensors[named[0]].shape)) in str(refusal.value)


def test_a_directory_without_weights_is_refused(
    tmp_path: Path, reference_config: dict[str, Any]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(reference_config))
    with pytest.raises(CheckpointError, match=r"model\.safetensors is missing"):
        load(tmp_path)


def test_progress_counts_the_bytes_of_all_tensors_that_the_model_has(
    write_checkpoint: WriteCheckpoint,
    reference_tensors: dict[str, Tensor],
    reference_config: dict[str, Any],
) -> None:
    total = sum(tensor.nbytes for tensor in reference_tensors.values())
    reference_tensors["model.layers.8.eh_proj.weight"] = torch.zeros(2, 2)
    calls: list[tuple[int, int]] = []
    load(
        write_checkpoint(reference_tensors, reference_config),
        lambda read_bytes, total_bytes: calls.append((read_bytes, total_bytes)),
    )
    assert calls[0] == (0, total)
    assert calls[-1] == (total, total)
    assert calls == sorted(calls)
    assert len(calls) == len(reference_tensors), "once before the first, then for each in the model"
