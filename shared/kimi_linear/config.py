"""What a model directory says of itself: `config.json` in the published layout, without torch."""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    field_validator,
    model_validator,
)

from shared.errors import CheckpointError
from shared.kernels.dtypes import StateDType
from shared.kimi_linear.model_files import first_problem, read_json
from shared.kimi_linear.state_layout import StateLayout

CONFIG_FILE: Final = "config.json"
GENERATION_CONFIG_FILE: Final = "generation_config.json"

LayerKind = Literal["kda", "mla"]
TokenId = Annotated[int, Field(ge=0)]
LayerNumbers = tuple[PositiveInt, ...]


class LinearAttentionConfig(BaseModel):
    """Which layers are which, and the shape of the KDA ones."""

    model_config = ConfigDict(frozen=True)

    full_attn_layers: LayerNumbers
    """MLA layers, counted from 1."""
    kda_layers: LayerNumbers
    """KDA layers, counted from 1."""
    head_dim: PositiveInt
    num_heads: PositiveInt
    short_conv_kernel_size: Annotated[int, Field(ge=2)]


class KimiLinearConfig(BaseModel):
    """The published fields that decide what the model computes; others are ignored.

    A field whose type allows one value only is there to refuse what is not implemented.
    """

    model_config = ConfigDict(frozen=True, populate_by_name=True)

    model_type: Literal["kimi_linear"]
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    rms_norm_eps: PositiveFloat
    model_max_length: PositiveInt
    """Tokens of prompt and answer together."""
    hidden_act: Literal["silu"] = "silu"
    tie_word_embeddings: bool = False
    eos_token_ids: Annotated[
        tuple[TokenId, ...], Field(validation_alias=AliasChoices("eos_token_ids", "eos_token_id"))
    ] = ()
    quantization_config: None = None

    linear_attn_config: LinearAttentionConfig

    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    q_lora_rank: None = None
    kv_lora_rank: PositiveInt
    qk_nope_head_dim: PositiveInt
    qk_rope_head_dim: PositiveInt
    v_head_dim: PositiveInt
    mla_use_nope: Literal[True]

    intermediate_size: PositiveInt
    first_k_dense_replace: Annotated[int, Field(ge=0)]
    moe_layer_freq: PositiveInt = 1
    num_experts: PositiveInt
    num_experts_per_token: PositiveInt
    num_shared_experts: Annotated[int, Field(ge=0, le=1)]
    moe_intermediate_size: PositiveInt
    moe_renormalize: bool
    moe_router_activation_func: Literal["sigmoid"]
    routed_scaling_factor: PositiveFloat
    use_grouped_topk: bool = True
    num_expert_group: PositiveInt = 1
    topk_group: PositiveInt = 1

    @classmethod
    def from_directory(cls, path: str | Path) -> Self:
        """Read and check the configuration of a model directory.

        End-of-sequence tokens are those of `config.json` and of `generation_config.json`, if there
        is one.

        Raises:
            CheckpointError: a file is missing or not JSON, or a field is missing, contradicts
                another or asks for something that is not implemented; names the field and what was
                found.
        """
        directory = Path(path)
        fields = read_json(directory / CONFIG_FILE)
        generation_path = directory / GENERATION_CONFIG_FILE
        generation = read_json(generation_path) if generation_path.exists() else {}
        ends = (*_as_tuple(fields.get("eos_token_id")), *_as_tuple(generation.get("eos_token_id")))
        try:
            return cls.model_validate({**fields, "eos_token_id": tuple(dict.fromkeys(ends))})
        except ValidationError as error:
            raise CheckpointError(f"{directory / CONFIG_FILE}: {first_problem(error)}") from None

    @field_validator("num_shared_experts", mode="before")
    @classmethod
    def _null_is_no_shared_expert(cls, value: object) -> object:
        return 0 if value is None else value

    @model_validator(mode="after")
    def _layers_are_all_named_once(self) -> Self:
        linear = self.linear_attn_config
        named = sorted((*linear.kda_layers, *linear.full_attn_layers))
        if named != list(range(1, self.num_hidden_layers + 1)):
            raise ValueError(
                "linear_attn_config: kda_layers and full_attn_layers have to name each of the "
                f"{self.num_hidden_layers} layers once, found {named}"
            )
        return self

    @model_validator(mode="after")
    def _heads_share_one_latent(self) -> Self:
        if self.num_key_value_heads != self.num_attention_heads:
            raise ValueError(
                f"num_key_value_heads has to be num_attention_heads ({self.num_attention_heads}), "
                f"found {self.num_key_value_heads}"
            )
        return self

    @model_validator(mode="after")
    def _experts_can_be_chosen(self) -> Self:
        groups = self.num_expert_group
        if self.num_experts % groups:
            raise ValueError(
                f"num_experts has to be a multiple of num_expert_group ({groups}), "
                f"found {self.num_experts}"
            )
        group_size = self.num_experts // groups
        if self.chooses_groups and group_size < 2:
            raise ValueError(
                f"num_expert_group leaves one expert a group, which needs two, found {groups}"
            )
        if self.topk_group > groups:
            raise ValueError(
                f"topk_group has to be at most num_expert_group ({groups}), found {self.topk_group}"
            )
        eligible = self.topk_group * group_size if self.chooses_groups else self.num_experts
        if self.num_experts_per_token > eligible:
            raise ValueError(
                f"num_experts_per_token has to be at most the {eligible} eligible experts, "
                f"found {self.num_experts_per_token}"
            )
        return self

    @model_validator(mode="after")
    def _ends_are_in_the_vocabulary(self) -> Self:
        if any(token_id >= self.vocab_size for token_id in self.eos_token_ids):
            raise ValueError(
                f"eos_token_id has to be below vocab_size ({self.vocab_size}), "
                f"found {self.eos_token_ids}"
            )
        return self

    @property
    def chooses_groups(self) -> bool:
        """Whether a token's experts come from a few chosen groups."""
        return self.use_grouped_topk and self.num_expert_group > 1

    @property
    def layer_kinds(self) -> tuple[LayerKind, ...]:
        """The attention of each layer, first layer first."""
        mla = set(self.linear_attn_config.full_attn_layers)
        return tuple(
            "mla" if number in mla else "kda" for number in range(1, self.num_hidden_layers + 1)
        )

    def is_mixture(self, layer: int) -> bool:
        """Whether a layer, counted from 0, has experts; its feed-forward is dense otherwise."""
        return layer >= self.first_k_dense_replace and layer % self.moe_layer_freq == 0

    def state_layout(self, dtype: StateDType) -> StateLayout:
        """The state of one request of an engine whose weights and activations have this dtype."""
        linear = self.linear_attn_config
        return StateLayout(
            kda_layers=len(linear.kda_layers),
            kda_heads=linear.num_heads,
            kda_head_dim=linear.head_dim,
            convolution_taps=linear.short_conv_kernel_size - 1,
            mla_layers=len(linear.full_attn_layers),
            latent_dim=self.kv_lora_rank + self.qk_rope_head_dim,
            latent_dtype=dtype,
            convolution_dtype=dtype,
        )


def _as_tuple(value: object) -> tuple[object, ...]:
    if value is None:
        return ()
    return tuple(value) if isinstance(value, list) else (value,)
