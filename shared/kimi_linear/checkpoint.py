"""Loads the published weight files into `weights`, checking every tensor's name and shape."""

import re
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from shared.kernels.huge_pages import empty_in_huge_pages
from shared.kernels.interface import Kernels
from shared.kernels.kda_layer import KdaConstants
from shared.kernels.linear import Linear
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.read_progress import ReadProgress, unobserved
from shared.kimi_linear.safetensors_header import Shape
from shared.kimi_linear.tensor_files import TensorFiles
from shared.kimi_linear.weights import (
    KdaWeights,
    LayerWeights,
    MixtureWeights,
    MlaWeights,
    ModelWeights,
)

__all__ = ["TensorSource", "assemble_weights", "load_weights"]


def load_weights(
    directory: str | Path,
    config: KimiLinearConfig,
    kernels: Kernels,
    progress: ReadProgress = unobserved,
) -> ModelWeights:
    """Load a checkpoint, one file or sharded, in fp32, bf16 or fp16.

    It takes the memory of the result and of one tensor more: files are mapped, every tensor is
    copied from them once, and the kernels may bring it into a form of theirs.

    Args:
        directory: holds `model.safetensors`, or `model.safetensors.index.json` and what it names.
        config: of the same directory.
        kernels: that multiply; they take each matrix as soon as it is read.
        progress: told of the bytes of tensors that the model has.

    Raises:
        CheckpointError: a file or tensor is missing, damaged, of another shape than the
            configuration says, or unknown to the model; names the tensor, its expected and its
            found shape.
    """
    with TensorFiles(Path(directory), _Ignored(config), progress) as files:
        weights = assemble_weights(_Checkpoint(files, kernels.loaded_dtype), config, kernels)
        files.refuse_unread()
    return weights


# --- from names to weights -------------------------------------------------------------------


class TensorSource(Protocol):
    """Gives tensors by their published names."""

    def matrix(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in the dtype of the source's matrices unless another is given."""
        ...

    def vector(self, name: str, length: int) -> Tensor:
        """One tensor of one dimension, in fp32."""
        ...

    def stacked(self, shapes: dict[str, tuple[int, int]]) -> Tensor:
        """Several matrices with the same number of columns, one below the other."""
        ...


def assemble_weights(
    checkpoint: TensorSource, config: KimiLinearConfig, kernels: Kernels
) -> ModelWeights:
    """Put the tensors of a model together as its layers use them.

    It is made of differentiable operations, so that what trains a model can put its parameters
    together with it; and it asks for every tensor of the model once, by name and shape.
    """
    vocabulary = (config.vocab_size, config.hidden_size)
    embedding = checkpoint.matrix("model.embed_tokens.weight", vocabulary)
    tied = config.tie_word_embeddings
    head = embedding if tied else checkpoint.matrix("lm_head.weight", vocabulary)
    return ModelWeights(
        embedding=kernels.embedding(embedding),
        layers=tuple(
            _layer(checkpoint, config, kernels, n) for n in range(config.num_hidden_layers)
        ),
        norm=checkpoint.vector("model.norm.weight", config.hidden_size),
        head=kernels.linear(head),
    )


def _layer(
    checkpoint: TensorSource, config: KimiLinearConfig, kernels: Kernels, layer: int
) -> LayerWeights:
    prefix = f"model.layers.{layer}"
    hidden = config.hidden_size
    attention = _kda if config.layer_kinds[layer] == "kda" else _mla
    return LayerWeights(
        attention_norm=checkpoint.vector(f"{prefix}.input_layernorm.weight", hidden),
        attention=attention(checkpoint, config, kernels, f"{prefix}.self_attn"),
        feed_forward_norm=checkpoint.vector(f"{prefix}.post_attention_layernorm.weight", hidden),
        feed_forward=(
            _mixture(checkpoint, config, kernels, f"{prefix}.block_sparse_moe")
            if config.is_mixture(layer)
            else _dense(checkpoint, kernels, f"{prefix}.mlp", hidden, config.intermediate_size)
        ),
    )


def _kda(
    checkpoint: TensorSource, config: KimiLinearConfig, kernels: Kernels, prefix: str
) -> KdaWeights:
    hidden, linear = config.hidden_size, config.linear_attn_config
    heads, rank, taps = linear.num_heads, linear.head_dim, linear.short_conv_kernel_size
    channels = heads * linear.head_dim
    outputs = {
        "q_proj": channels,
        "k_proj": channels,
        "v_proj": channels,
        "f_a_proj": rank,
        "g_a_proj": rank,
        "b_proj": heads,
    }
    convolutions = {f"{prefix}.{name}_conv1d.weight": (channels, taps) for name in "qkv"}
    return KdaWeights(
        projections=kernels.linear(
            checkpoint.stacked(
                {f"{prefix}.{name}.weight": (rows, hidden) for name, rows in outputs.items()}
            )
        ),
        decay_up=kernels.linear(checkpoint.matrix(f"{prefix}.f_b_proj.weight", (channels, rank))),
        gate_up=kernels.linear(checkpoint.matrix(f"{prefix}.g_b_proj.weight", (channels, rank))),
        constants=KdaConstants(
            heads=heads,
            convolution=checkpoint.stacked(convolutions)
            .T.to(kernels.activation_dtype)
            .contiguous(),
            decay_bias=checkpoint.vector(f"{prefix}.dt_bias", channels),
            decay_rate=-checkpoint.vector(f"{prefix}.A_log", heads).exp(),
            norm=checkpoint.vector(f"{prefix}.o_norm.weight", linear.head_dim),
            epsilon=config.rms_norm_eps,
        ),
        output=kernels.linear(checkpoint.matrix(f"{prefix}.o_proj.weight", (hidden, channels))),
    )


def _mla(
    checkpoint: TensorSource, config: KimiLinearConfig, kernels: Kernels, prefix: str
) -> MlaWeights:
    hidden, heads, rank = config.hidden_size, config.num_attention_heads, config.kv_lora_rank
    nope, rope, value = config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    key_value_up = checkpoint.matrix(f"{prefix}.kv_b_proj.weight", (heads * (nope + value), rank))
    return MlaWeights(
        projections=kernels.linear(
            checkpoint.stacked(
                {
                    f"{prefix}.q_proj.weight": (heads * (nope + rope), hidden),
                    f"{prefix}.kv_a_proj_with_mqa.weight": (rank + rope, hidden),
                }
            )
        ),
        latent_norm=checkpoint.vector(f"{prefix}.kv_a_layernorm.weight", rank),
        key_value_up=key_value_up.view(heads, nope + value, rank).to(kernels.activation_dtype),
        output=kernels.linear(
            checkpoint.matrix(f"{prefix}.o_proj.weight", (hidden, heads * value))
        ),
    )


def _dense(
    checkpoint: TensorSource, kernels: Kernels, prefix: str, hidden: int, width: int
) -> Linear:
    return kernels.feed_forward(
        checkpoint.stacked(
            {
                f"{prefix}.gate_proj.weight": (width, hidden),
                f"{prefix}.up_proj.weight": (width, hidden),
            }
        ),
        checkpoint.matrix(f"{prefix}.down_proj.weight", (hidden, width)),
    )


def _mixture(
    checkpoint: TensorSource, config: KimiLinearConfig, kernels: Kernels, prefix: str
) -> MixtureWeights:
    hidden, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
    chosen = {f"{prefix}.experts.{expert}": ("w1", "w3", "w2") for expert in range(experts)}
    shared = {f"{prefix}.shared_experts": ("gate_proj", "up_proj", "down_proj")}
    parts = chosen | shared if config.num_shared_experts else chosen
    gate_and_up = checkpoint.stacked(
        {
            f"{name}.{raising}.weight": (width, hidden)
            for name, (gate, up, _) in parts.items()
            for raising in (gate, up)
        }
    )
    down = checkpoint.stacked(
        {f"{name}.{down}.weight": (hidden, width) for name, (_, _, down) in parts.items()}
    )
    return MixtureWeights(
        router=checkpoint.matrix(f"{prefix}.gate.weight", (experts, hidden), torch.float32),
        choice_bias=checkpoint.vector(f"{prefix}.gate.e_score_correction_bias", experts),
        experts=kernels.experts(
            gate_and_up.view(len(parts), 2 * width, hidden), down.view(len(parts), hidden, width)
        ),
    )


class _Ignored:
    """Tensors that a checkpoint may hold and the model has no use for."""

    def __init__(self, config: KimiLinearConfig) -> None:
        self._layers = config.num_hidden_layers
        self._tied = config.tie_word_embeddings

    def __call__(self, name: str) -> bool:
        layer = re.match(r"model\.layers\.(\d+)\.", name)
        predicts_further_tokens = layer is not None and int(layer[1]) >= self._layers
        tied_head = self._tied and name == "lm_head.weight"
        return predicts_further_tokens or tied_head or name.endswith(".rotary_emb.inv_freq")


# --- from files to tensors -------------------------------------------------------------------


class _Checkpoint:
    """Reads tensors into new ones of the shape and dtype that the model has them in."""

    def __init__(self, files: TensorFiles, dtype: torch.dtype) -> None:
        self._files = files
        self._dtype = dtype

    def matrix(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, in the dtype of the checkpoint's matrices unless another is given."""
        target = empty_in_huge_pages(*shape, dtype=dtype or self._dtype)
        self._files.read_into(target, name)
        return target

    def vector(self, name: str, length: int) -> Tensor:
        """One tensor of one dimension, in fp32."""
        return self.matrix(name, (length,), torch.float32)

    def stacked(self, shapes: dict[str, tuple[int, int]]) -> Tensor:
        """Several matrices with the same number of columns, one below the other."""
        rows = sum(shape[0] for shape in shapes.values())
        columns = next(shape[1] for shape in shapes.values())
        target = empty_in_huge_pages(rows, columns, dtype=self._dtype)
        parts = torch.split(target, [shape[0] for shape in shapes.values()])
        for name, part in zip(shapes, parts, strict=True):
            self._files.read_into(part, name)
        return target
