"""What is trained and how: every number of the recipe."""

from dataclasses import dataclass, field, replace
from typing import Final, Self

from shared.kimi_linear.config import KimiLinearConfig
from training.tokenizer import SPECIAL_TOKENS

VOCABULARY: Final = 3072
_FIRST_SPECIAL: Final = VOCABULARY - len(SPECIAL_TOKENS)


@dataclass(frozen=True, slots=True)
class Phase:
    """Steps from one on, with sequences of one length.

    Attributes:
        first_step: counted from 0.
        length: tokens of a sequence.
        facts: hidden in a recall text, all of which are asked for.
        times_asked: how often each fact is asked for.
        asked_in_chat: questions of a chat, if not all; with a single one it is plain which words
            the answer has to repeat.
        answer_weight: of the word that answers, in the loss; other tokens count 1.
        key_weight: of the word in an answer that repeats the question's.
        drills: whether recall texts are nothing but facts, each said again soon after.
        chat_part: of the recall texts that are chats; the others say facts once more.
        loops_every: one other text in so many gets stuck and goes on (`escapes`); 0 is none.
        escape_weight: of the token that leaves a loop.
        loop_weight: of the tokens that go on in a loop, which are to be unlikely.
    """

    first_step: int
    length: int
    facts: int
    answer_weight: float
    key_weight: float = 1.0
    times_asked: int = 1
    asked_in_chat: int | None = None
    drills: bool = False
    chat_part: float = 0.7
    loops_every: int = 0
    escape_weight: float = 5.0
    loop_weight: float = 1.0


@dataclass(frozen=True, slots=True)
class Recipe:
    """A training run.

    The data of a step depends on the step alone, and the learning rate falls at the end only, so a
    run may be cut short: give it fewer steps before its last `decay_steps` begin. In
    `own_loop_steps` more, at a lower rate, each also has texts that the model itself makes of the
    beginnings of others (`own_loops`).
    """

    config: KimiLinearConfig
    phases: tuple[Phase, ...]
    step_tokens: int
    steps: int
    warmup_steps: int
    decay_steps: int
    own_loop_steps: int = 0
    own_texts: int = 32
    """Of each of these steps."""
    own_loop_pace: float = 0.3
    """The part of the learning rates that these steps begin with."""
    own_loop_weight: float = 4.0
    """Of the tokens that go on in a loop of the model's own, which are to be unlikely."""
    averaged: tuple[int, ...] = (0,)
    """Steps before the end: the model is the mean of the parameters there (arXiv 1803.05407)."""
    matrix_learning_rate: float = 0.02
    """Of Muon, for the matrices between embedding and head."""
    matrix_momentum: float = 0.95
    matrix_weight_decay: float = 0.02
    learning_rate: float = 3e-3
    """Of AdamW, for everything else."""
    betas: tuple[float, float] = (0.9, 0.95)
    largest_gradient: float = 1.0
    """Norm to which a larger gradient is scaled."""
    balance_rate: float = 2e-3
    """By how much an expert's choice bias is changed after each step."""
    recall_every: int = 3
    """One sequence in so many is a recall text, the others are text as it is."""
    shares: dict[str, float] = field(
        default_factory=lambda: {"bible": 0.35, "wordnet": 0.55, "jargon": 0.1}
    )
    """Of each work in the text, whatever its size."""
    shards: int = 2
    """Parts of a batch, which are computed side by side, a thread each: a number of the recipe,
    because sums of other parts round otherwise."""
    seed: int = 0

    @property
    def all_steps(self) -> int:
        """With those over the model's own loops."""
        return self.steps + self.own_loop_steps

    def is_averaged(self, step: int) -> bool:
        """Whether the parameters after so many steps are a part of the mean."""
        return self.all_steps - step in self.averaged

    def phase(self, step: int) -> Phase:
        """The one that a step belongs to."""
        return next(phase for phase in reversed(self.phases) if phase.first_step <= step)

    def pace(self, step: int) -> float:
        """The part of the learning rates that holds at a step.

        Warm-up, a plateau, then a line to zero, which is reached after the last of `steps`; then
        another such line over the steps behind them.
        """
        if step >= self.steps and self.own_loop_steps:
            return self.own_loop_pace * (self.all_steps - step) / (self.own_loop_steps + 1)
        warmed = min(1.0, (step + 1) / self.warmup_steps)
        left = min(1.0, (self.steps - step) / (self.decay_steps + 1))
        return warmed * left

    def shortened(self, steps: int) -> Self:
        """The same run with another number of steps."""
        return replace(self, steps=steps)


TINY: Final = Recipe(
    config=KimiLinearConfig.model_validate(
        {
            "model_type": "kimi_linear",
            "vocab_size": VOCABULARY,
            "hidden_size": 128,
            "num_hidden_layers": 8,
            "rms_norm_eps": 1e-5,
            "model_max_length": 131072,
            "eos_token_id": (_FIRST_SPECIAL + 1, _FIRST_SPECIAL + 2),
            "linear_attn_config": {
                "full_attn_layers": (4, 8),
                "kda_layers": (1, 2, 3, 5, 6, 7),
                "head_dim": 32,
                "num_heads": 4,
                "short_conv_kernel_size": 4,
            },
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "kv_lora_rank": 64,
            "qk_nope_head_dim": 24,
            "qk_rope_head_dim": 8,
            "v_head_dim": 32,
            "mla_use_nope": True,
            "intermediate_size": 384,
            "first_k_dense_replace": 1,
            "num_experts": 16,
            "num_experts_per_token": 2,
            "num_shared_experts": 1,
            "moe_intermediate_size": 128,
            "moe_renormalize": True,
            "moe_router_activation_func": "sigmoid",
            "routed_scaling_factor": 1.0,
        }
    ),
    phases=(
        Phase(0, 256, 3, answer_weight=10, drills=True),
        Phase(60, 256, 4, answer_weight=20),
        Phase(160, 512, 8, answer_weight=20, loops_every=6),
        Phase(250, 512, 8, answer_weight=20, key_weight=10, loops_every=6),
        Phase(300, 512, 6, answer_weight=8, key_weight=10, times_asked=2, loops_every=6),
        Phase(420, 1024, 12, answer_weight=8, key_weight=8, times_asked=2, loops_every=6),
        Phase(450, 1024, 12, answer_weight=8, key_weight=40, asked_in_chat=1, loops_every=6),
        Phase(
            first_step=550,
            length=1024,
            facts=12,
            answer_weight=8,
            key_weight=20,
            asked_in_chat=1,
            chat_part=0.5,
            loops_every=3,
            escape_weight=10,
        ),
    ),
    step_tokens=4096,
    steps=1100,
    warmup_steps=30,
    decay_steps=350,
    own_loop_steps=400,
    averaged=(100, 50, 0),
)
"""The model that ships with the project."""
