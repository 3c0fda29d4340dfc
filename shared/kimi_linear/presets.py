"""Random models in the published layout, to run the system without a download; without torch.

They speak no language, but they compute everything that a trained model does.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import DTypeLike, NDArray
from safetensors.numpy import save_file

from shared.errors import CheckpointError
from shared.kimi_linear.config import CONFIG_FILE, GENERATION_CONFIG_FILE, KimiLinearConfig
from shared.kimi_linear.tokenizer.byte_level import BYTE_TOKENIZER_FILE, BYTES, ByteTokenizerFile

PresetName = Literal["tiny", "small", "medium"]
Array = NDArray[Any]

BOS, EOS, PAD = BYTES, BYTES + 1, BYTES + 2
VOCABULARY: Final = 320
"""Bytes and special tokens, rounded up to a multiple of 64."""

EMBEDDING_SCALE: Final = 0.3
"""Small against what the layers add, so that the text depends on more than its last byte."""
PRINTABLE_LOGIT_SCALE: Final = 4.0
OTHER_LOGIT_SCALE: Final = 0.3
"""Standard deviations of the logits: almost all sampled bytes are printable."""


@dataclass(frozen=True, slots=True)
class Preset:
    """A configuration and the dtype of its matrices on disk."""

    config: KimiLinearConfig
    dtype: DTypeLike


def _config(  # noqa: PLR0913 - the sizes of a model
    *,
    hidden: int,
    heads: int,
    head_dim: int,
    latent_rank: int,
    rope: int,
    layers: int,
    dense_width: int,
    experts: int,
    experts_per_token: int,
    expert_width: int,
    vocabulary: int = VOCABULARY,
) -> KimiLinearConfig:
    mla = tuple(range(4, layers + 1, 4))
    return KimiLinearConfig.model_validate(
        {
            "model_type": "kimi_linear",
            "vocab_size": vocabulary,
            "hidden_size": hidden,
            "num_hidden_layers": layers,
            "rms_norm_eps": 1e-5,
            "model_max_length": 131072,
            "eos_token_id": (EOS,),
            "linear_attn_config": {
                "full_attn_layers": mla,
                "kda_layers": tuple(n for n in range(1, layers + 1) if n not in mla),
                "head_dim": head_dim,
                "num_heads": heads,
                "short_conv_kernel_size": 4,
            },
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "kv_lora_rank": latent_rank,
            "qk_nope_head_dim": head_dim,
            "qk_rope_head_dim": rope,
            "v_head_dim": head_dim,
            "mla_use_nope": True,
            "intermediate_size": dense_width,
            "first_k_dense_replace": 1,
            "num_experts": experts,
            "num_experts_per_token": experts_per_token,
            "num_shared_experts": 1,
            "moe_intermediate_size": expert_width,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": 2.446,
        }
    )


PRESETS: Final[dict[PresetName, Preset]] = {
    "tiny": Preset(
        _config(
            hidden=96,
            heads=4,
            head_dim=32,
            latent_rank=64,
            rope=16,
            layers=8,
            dense_width=256,
            experts=8,
            experts_per_token=2,
            expert_width=64,
        ),
        dtype=np.float32,
    ),
    "small": Preset(
        _config(
            hidden=512,
            heads=8,
            head_dim=64,
            latent_rank=128,
            rope=32,
            layers=12,
            dense_width=1536,
            experts=16,
            experts_per_token=4,
            expert_width=192,
        ),
        dtype=np.float16,
    ),
    "medium": Preset(
        _config(
            hidden=576,
            heads=8,
            head_dim=128,
            latent_rank=256,
            rope=64,
            layers=12,
            dense_width=1536,
            experts=32,
            experts_per_token=4,
            expert_width=256,
            vocabulary=8192,
        ),
        dtype=np.float16,
    ),
}
"""About 1.8, 75 and 205 million parameters.

The last one is there to be measured: its heads have the published sizes, its width is a quarter of
the published one.
"""


def write_random_checkpoint(directory: str | Path, preset: PresetName, seed: int = 0) -> None:
    """Write a model directory: configuration, weights, tokenizer, generation configuration.

    The same preset and seed give the same files.

    Args:
        directory: made if it does not exist.
        preset: which sizes.
        seed: of the weights.

    Raises:
        CheckpointError: the directory is not empty.
    """
    root = Path(directory)
    root.mkdir(parents=True, exist_ok=True)
    if any(root.iterdir()):
        raise CheckpointError(f"{root} is not empty: a model is written to a directory of its own")
    chosen = PRESETS[preset]
    save_file(dict(_tensors(chosen, seed)), root / "model.safetensors", metadata={"format": "pt"})
    _write_json(root / GENERATION_CONFIG_FILE, {"bos_token_id": BOS, "eos_token_id": EOS})
    tokenizer = ByteTokenizerFile(
        vocab_size=chosen.config.vocab_size,
        special_tokens={"<|bos|>": BOS, "<|eos|>": EOS, "<|pad|>": PAD},
    )
    _write_json(root / BYTE_TOKENIZER_FILE, tokenizer.model_dump())
    _write_json(root / CONFIG_FILE, _published_fields(chosen))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _published_fields(preset: Preset) -> dict[str, Any]:
    fields = preset.config.model_dump(exclude={"eos_token_ids", "quantization_config"})
    return {
        "architectures": ["KimiLinearForCausalLM"],
        **fields,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "torch_dtype": np.dtype(preset.dtype).name,
    }


# --- weights ---------------------------------------------------------------------------------


class _Weights:
    """Draws weights; matrices keep the variance of their inputs."""

    def __init__(self, seed: int, dtype: DTypeLike) -> None:
        self._generator = np.random.Generator(np.random.PCG64(seed))
        self._dtype = dtype

    def normal(self, *shape: int, scale: float = 1.0) -> NDArray[np.float32]:
        return self._generator.standard_normal(shape, dtype=np.float32) * np.float32(scale)

    def uniform(self, low: float, high: float, size: int) -> NDArray[np.float64]:
        return self._generator.uniform(low, high, size)

    def matrix(self, outputs: int, inputs: int) -> Array:
        return self.stored(self.normal(outputs, inputs, scale=inputs**-0.5))

    def stored(self, values: Array) -> Array:
        return values.astype(self._dtype)

    def norm(self, size: int) -> Array:
        return 1 + self.normal(size, scale=0.1)


def _tensors(preset: Preset, seed: int) -> Iterator[tuple[str, Array]]:
    config, weights = preset.config, _Weights(seed, preset.dtype)
    vocabulary, hidden = config.vocab_size, config.hidden_size
    embedding = weights.normal(vocabulary, hidden, scale=EMBEDDING_SCALE)
    yield "model.embed_tokens.weight", weights.stored(embedding)
    for layer, kind in enumerate(config.layer_kinds):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", weights.norm(hidden)
        attention = _kda_tensors if kind == "kda" else _mla_tensors
        yield from _prefixed(f"{prefix}.self_attn", attention(config, weights))
        yield f"{prefix}.post_attention_layernorm.weight", weights.norm(hidden)
        yield from _feed_forward_tensors(config, weights, layer)
    yield "model.norm.weight", weights.norm(hidden)
    head = weights.normal(vocabulary, hidden) * _head_scales(vocabulary, hidden)
    yield "lm_head.weight", weights.stored(head)


def _prefixed(prefix: str, tensors: Iterator[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    return ((f"{prefix}.{name}", tensor) for name, tensor in tensors)


def _kda_tensors(config: KimiLinearConfig, weights: _Weights) -> Iterator[tuple[str, Array]]:
    hidden, linear = config.hidden_size, config.linear_attn_config
    heads, rank = linear.num_heads, linear.head_dim
    channels, taps = heads * linear.head_dim, linear.short_conv_kernel_size
    for name in "qkv":
        yield f"{name}_proj.weight", weights.matrix(channels, hidden)
        convolution = weights.normal(channels, 1, taps, scale=taps**-0.5)
        yield f"{name}_conv1d.weight", weights.stored(convolution)
    for name in ("f", "g"):
        yield f"{name}_a_proj.weight", weights.matrix(rank, hidden)
        yield f"{name}_b_proj.weight", weights.matrix(channels, rank)
    yield "b_proj.weight", weights.matrix(heads, hidden)
    yield "o_norm.weight", weights.norm(linear.head_dim)
    yield "o_proj.weight", weights.matrix(hidden, channels)
    # Decays of 1/1000 to 1.6 a token: heads and channels that remember long, and some that do not.
    steps = np.exp(weights.uniform(np.log(0.001), np.log(0.1), channels))
    yield "dt_bias", np.log(np.expm1(steps)).astype(np.float32)
    rates = weights.uniform(1, 16, heads)
    yield "A_log", np.log(rates).astype(np.float32).reshape(1, 1, heads, 1)


def _mla_tensors(config: KimiLinearConfig, weights: _Weights) -> Iterator[tuple[str, Array]]:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    yield "q_proj.weight", weights.matrix(heads * (nope + rope), hidden)
    yield "kv_a_proj_with_mqa.weight", weights.matrix(rank + rope, hidden)
    yield "kv_a_layernorm.weight", weights.norm(rank)
    yield "kv_b_proj.weight", weights.matrix(heads * (nope + value), rank)
    yield "o_proj.weight", weights.matrix(hidden, heads * value)


def _feed_forward_tensors(
    config: KimiLinearConfig, weights: _Weights, layer: int
) -> Iterator[tuple[str, Array]]:
    prefix, hidden = f"model.layers.{layer}", config.hidden_size
    if not config.is_mixture(layer):
        yield from _dense_tensors(f"{prefix}.mlp", weights, hidden, config.intermediate_size)
        return
    prefix, width = f"{prefix}.block_sparse_moe", config.moe_intermediate_size
    yield f"{prefix}.gate.weight", weights.matrix(config.num_experts, hidden)
    yield f"{prefix}.gate.e_score_correction_bias", weights.normal(config.num_experts, scale=0.1)
    for expert in range(config.num_experts):
        yield f"{prefix}.experts.{expert}.w1.weight", weights.matrix(width, hidden)
        yield f"{prefix}.experts.{expert}.w3.weight", weights.matrix(width, hidden)
        yield f"{prefix}.experts.{expert}.w2.weight", weights.matrix(hidden, width)
    if config.num_shared_experts:
        yield from _dense_tensors(f"{prefix}.shared_experts", weights, hidden, width)


def _dense_tensors(
    prefix: str, weights: _Weights, hidden: int, width: int
) -> Iterator[tuple[str, Array]]:
    yield f"{prefix}.gate_proj.weight", weights.matrix(width, hidden)
    yield f"{prefix}.up_proj.weight", weights.matrix(width, hidden)
    yield f"{prefix}.down_proj.weight", weights.matrix(hidden, width)


def _head_scales(vocabulary: int, hidden: int) -> NDArray[np.float32]:
    """Of the rows of the head, `[vocabulary, 1]`: its inputs are normalised."""
    scales = np.full((vocabulary, 1), OTHER_LOGIT_SCALE, dtype=np.float32)
    scales[ord(" ") : ord("~") + 1] = PRINTABLE_LOGIT_SCALE
    return scales / np.float32(hidden**0.5)
