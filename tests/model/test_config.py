"""A configuration is understood whole or refused with the field's name."""

import json
from pathlib import Path
from typing import Any

import pytest

from shared.errors import CheckpointError
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.state_layout import StateLayout


def read(directory: Path, config: dict[str, Any]) -> KimiLinearConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return KimiLinearConfig.from_directory(directory)


def published() -> dict[str, Any]:
    """The sizes of the published 48B-A3B model."""
    mla = [4, 8, 12, 16, 20, 24, 27]
    return {
        "model_type": "kimi_linear",
        "vocab_size": 163840,
        "hidden_size": 2304,
        "num_hidden_layers": 27,
        "rms_norm_eps": 1e-5,
        "model_max_length": 1048576,
        "hidden_act": "silu",
        "eos_token_id": 163586,
        "linear_attn_config": {
            "full_attn_layers": mla,
            "kda_layers": [n for n in range(1, 28) if n not in mla],
            "head_dim": 128,
            "num_heads": 32,
            "short_conv_kernel_size": 4,
        },
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "q_lora_rank": None,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "mla_use_nope": True,
        "intermediate_size": 9216,
        "first_k_dense_replace": 1,
        "moe_layer_freq": 1,
        "num_experts": 256,
        "num_experts_per_token": 8,
        "num_shared_experts": 1,
        "moe_intermediate_size": 1024,
        "moe_renormalize": True,
        "moe_router_activation_func": "sigmoid",
        "routed_scaling_factor": 2.446,
        "use_grouped_topk": True,
        "num_expert_group": 1,
        "topk_group": 1,
    }


def test_the_published_model_has_the_state_its_report_says(tmp_path: Path) -> None:
    config = read(tmp_path, published())
    layout = config.state_layout("bfloat16")
    assert layout == StateLayout(
        kda_layers=20,
        kda_heads=32,
        kda_head_dim=128,
        convolution_taps=3,
        mla_layers=7,
        latent_dim=576,
        latent_dtype="bfloat16",
        convolution_dtype="bfloat16",
    )
    assert layout.state_bytes(1) - layout.state_bytes(0) == 8064
    assert config.layer_kinds.count("mla") == 7
    assert config.layer_kinds[26] == "mla"
    assert [config.is_mixture(layer) for layer in (0, 1, 26)] == [False, True, True]


@pytest.mark.parametrize(
    ("in_config", "in_generation_config", "expected"),
    [
        (5, None, (5,)),
        ([5, 6], None, (5, 6)),
        (None, None, ()),
        (5, {"eos_token_id": [6, 5]}, (5, 6)),
        (5, {"temperature": 0.6}, (5,)),
        (None, {"eos_token_id": 7}, (7,)),
    ],
)
def test_end_tokens_come_from_both_files(
    tmp_path: Path,
    in_config: int | list[int] | None,
    in_generation_config: dict[str, Any] | None,
    expected: tuple[int, ...],
) -> None:
    if in_generation_config is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(in_generation_config))
    assert read(tmp_path, {**published(), "eos_token_id": in_config}).eos_token_ids == expected


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("model_type", "llama"),
        ("hidden_act", "situ"),
        ("q_lora_rank", 1536),
        ("mla_use_nope", False),
        ("moe_router_activation_func", "softmax"),
        ("quantization_config", {"quant_method": "fp8"}),
        ("num_key_value_heads", 8),
        ("hidden_size", "wide"),
        ("vocab_size", 0),
        ("num_hidden_layers", 28),
        ("topk_group", 2),
        ("num_experts_per_token", 257),
        ("num_shared_experts", 2),
        ("eos_token_id", 163840),
    ],
)
def test_what_is_not_implemented_or_contradictory_is_refused_by_field_and_value(
    tmp_path: Path, field: str, value: object
) -> None:
    with pytest.raises(CheckpointError) as refusal:
        read(tmp_path, {**published(), field: value})
    message = str(refusal.value)
    assert (field if field != "num_hidden_layers" else "linear_attn_config") in message
    assert "found" in message


@pytest.mark.parametrize(
    ("groups", "kept", "problem"),
    [
        (3, 1, "num_experts has to be a multiple"),
        (256, 8, "leaves one expert a group"),
        (64, 1, "at most the 4 eligible experts"),
    ],
)
def test_expert_groups_have_to_hold_the_experts(
    tmp_path: Path, groups: int, kept: int, problem: str
) -> None:
    with pytest.raises(CheckpointError, match=problem):
        read(tmp_path, {**published(), "num_expert_group": groups, "topk_group": kept})


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    fields = published()
    del fields["linear_attn_config"]["head_dim"]
    with pytest.raises(CheckpointError, match=r"linear_attn_config\.head_dim is missing"):
        read(tmp_path, fields)


@pytest.mark.parametrize("content", [None, "{", "[]"])
def test_a_directory_without_a_readable_configuration_is_refused(
    tmp_path: Path, content: str | None
) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        KimiLinearConfig.from_directory(tmp_path)
