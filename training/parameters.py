"""The parameters of a model by their published names: made, put together, written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import Tensor

from shared.kernels.dispatch import kernels_for
from shared.kernels.interface import Kernels
from shared.kimi_linear.checkpoint import assemble_weights
from shared.kimi_linear.config import CONFIG_FILE, KimiLinearConfig
from shared.kimi_linear.safetensors_header import Shape
from shared.kimi_linear.tensor_files import WEIGHTS_FILE
from shared.kimi_linear.weights import ModelWeights

Parameters = dict[str, Tensor]

CHOICE_BIAS: Final = "e_score_correction_bias"
EMBEDDING_SCALE: Final = 0.1
OUTPUTS: Final = ("o_proj.weight", "down_proj.weight", "w2.weight")
"""Matrices that add to the residual: the more layers do, the smaller they begin."""
OTHER_TAPS_SCALE: Final = 0.1
"""Of the taps that a head that looks up begins without."""
SLOWEST_DECAY: Final = 5e-4
"""A token, of a head that looks up; its fastest channel forgets ten times as fast."""
KEPT_WIDE: Final = ("A_log", "dt_bias", CHOICE_BIAS)
"""Written in fp32, as the published checkpoint has them: they decide, and are few."""


class ParameterSource:
    """Gives parameters to `assemble_weights`, through operations that autograd follows."""

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = parameters

    def matrix(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        """See `TensorSource`; parameters are fp32 already."""
        del dtype
        return self._parameters[name].view(shape)

    def vector(self, name: str, length: int) -> Tensor:
        """See `TensorSource`."""
        return self.matrix(name, (length,))

    def stacked(self, shapes: dict[str, tuple[int, int]]) -> Tensor:
        """See `TensorSource`."""
        return torch.cat([self.matrix(name, shape) for name, shape in shapes.items()])


class _Initialisation:
    """Draws each parameter when `assemble_weights` asks for it."""

    def __init__(self, config: KimiLinearConfig, seed: int) -> None:
        self.parameters: Parameters = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._residual_scale = (2 * config.num_hidden_layers) ** -0.5

    def matrix(self, name: str, shape: Shape, dtype: torch.dtype | None = None) -> Tensor:
        del dtype
        self.parameters[name] = self._drawn(name, shape)
        return self.parameters[name]

    def vector(self, name: str, length: int) -> Tensor:
        return self.matrix(name, (length,))

    def stacked(self, shapes: dict[str, tuple[int, int]]) -> Tensor:
        return torch.cat([self.matrix(name, shape) for name, shape in shapes.items()])

    def _drawn(self, name: str, shape: Shape) -> Tensor:
        last = name.rpartition(".")[2]
        if last == CHOICE_BIAS:
            return torch.zeros(shape)
        if last == "A_log":
            return self._uniform(1, 16, shape).log()
        if last == "dt_bias":  # softplus of it, the decay at no input, is 1/1000 to 1/10
            steps = self._uniform(math.log(0.001), math.log(0.1), shape).exp()
            return steps.expm1().log()
        if len(shape) == 1:
            return torch.ones(shape)
        if name == "model.embed_tokens.weight":
            return self._normal(shape, EMBEDDING_SCALE)
        scale = shape[-1] ** -0.5
        if "conv1d" not in name:
            scale *= self._residual_scale if name.endswith(OUTPUTS) else 3**-0.5
        return self._normal(shape, scale)

    def _normal(self, shape: Shape, scale: float) -> Tensor:
        return torch.randn(shape, generator=self._generator) * scale

    def _uniform(self, low: float, high: float, shape: Shape) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self._generator)


def initial_parameters(config: KimiLinearConfig, seed: int) -> Parameters:
    """Parameters of an untrained model, fp32; the same seed gives the same ones."""
    drawn = _Initialisation(config, seed)
    with torch.no_grad():
        assemble_weights(drawn, config, kernels_for("cpu", "float32"))
        for layer, kind in enumerate(config.layer_kinds):
            if kind == "kda":
                _begin_with_induction(drawn.parameters, f"model.layers.{layer}.self_attn", config)
    return drawn.parameters


def _begin_with_induction(parameters: Parameters, prefix: str, config: KimiLinearConfig) -> None:
    """Let all heads of a KDA layer but the last begin as ones that look up what came before.

    Head n keys each token with the one n + 1 places before it and asks with the one n places back,
    in the same space, so that from the first step on it finds what followed the same token then. It
    forgets slowly. Without this, thousands of steps pass before any head does it.
    """
    linear = config.linear_attn_config
    heads, last_tap = linear.num_heads, linear.short_conv_kernel_size - 1
    looking = min(heads - 1, last_tap)
    parameters[f"{prefix}.k_proj.weight"].copy_(parameters[f"{prefix}.q_proj.weight"])
    for name, back in (("q", 0), ("k", 1), ("v", None)):
        weight = parameters[f"{prefix}.{name}_conv1d.weight"].view(heads, linear.head_dim, -1)
        for head in range(looking):
            weight[head] *= OTHER_TAPS_SCALE
            weight[head, :, last_tap - (0 if back is None else head + back)] += 1
    rates = parameters[f"{prefix}.A_log"]
    rates[:looking] = 0
    steps = torch.exp(
        torch.linspace(math.log(SLOWEST_DECAY), math.log(10 * SLOWEST_DECAY), linear.head_dim)
    )
    parameters[f"{prefix}.dt_bias"].view(heads, -1)[:looking] = steps.expm1().log()


def weights_of(
    parameters: Mapping[str, Tensor], config: KimiLinearConfig, kernels: Kernels
) -> ModelWeights:
    """The parameters as the layers use them; gradients flow back through it."""
    return assemble_weights(ParameterSource(parameters), config, kernels)


def export_checkpoint(
    directory: Path, parameters: Mapping[str, Tensor], config: KimiLinearConfig
) -> None:
    """Write `config.json` and `model.safetensors` in the published layout, matrices in bf16."""
    tensors = {
        name: tensor.detach().to(torch.float32 if name.endswith(KEPT_WIDE) else torch.bfloat16)
        for name, tensor in parameters.items()
    }
    save_file(tensors, directory / WEIGHTS_FILE, metadata={"format": "pt"})
    (directory / CONFIG_FILE).write_text(json.dumps(_published_fields(config), indent=2) + "\n")


def _published_fields(config: KimiLinearConfig) -> dict[str, Any]:
    fields = config.model_dump(exclude={"eos_token_ids", "quantization_config"}, mode="json")
    return {
        "architectures": ["KimiLinearForCausalLM"],
        **fields,
        "eos_token_id": list(config.eos_token_ids),
        "torch_dtype": "bfloat16",
    }
