"""What the model itself writes when it is stuck, as something to be unlikely.

Made-up repetitions (`escapes`) teach that text does not repeat itself. The loops that the model
falls into are its own, and it learns to leave them from these (the unlikelihood of whole sequences,
arXiv 1908.04319, section 5.2).
"""

from collections.abc import Mapping, Sequence
from typing import Final

import torch
from torch import Tensor

from shared.kernels.batch import CPU, PAGE_TOKENS
from shared.kernels.dispatch import kernels_for
from shared.kimi_linear.config import KimiLinearConfig
from shared.kimi_linear.engine import Engine
from shared.kimi_linear.model import KimiLinear
from shared.kimi_linear.state_pool import StatePool
from training.parameters import weights_of
from training.recall import UNSCORED, WeightedTokens

PROMPT: Final = (3, 16)
"""Fewest and most tokens of a prompt."""
TEXT: Final = 129
"""Tokens of a prompt and what the model makes of it: 128 have a target."""
LONGEST: Final = TEXT // 3
"""Tokens of a piece that loops."""


def own_loops(
    parameters: Mapping[str, Tensor],
    config: KimiLinearConfig,
    prompts: Sequence[Sequence[int]],
    weight: float,
) -> list[WeightedTokens]:
    """Go on with each prompt, always the likeliest token, and weigh what loops.

    Args:
        parameters: of the model as it is now.
        config: of the model.
        prompts: text, which is scored as such from its second token on.
        weight: of the tokens that loop, which have it with a minus sign.

    Returns:
        The texts, `TEXT` tokens each.
    """
    texts = []
    for prompt, continued in zip(prompts, _continue(parameters, config, prompts), strict=True):
        text = WeightedTokens.none()
        text.add(prompt[:1], UNSCORED)
        text.add(prompt[1:])
        for token, loops in zip(continued, looping(continued), strict=True):
            text.add([token], -weight if loops else UNSCORED)
        texts.append(text)
    return texts


def looping(tokens: Sequence[int]) -> list[bool]:
    """Which tokens belong to the third copy in a row of a piece of text, or to a later one."""
    found = [False] * len(tokens)
    for period in range(1, LONGEST + 1):
        same = 0
        for place in range(period, len(tokens)):
            same = same + 1 if tokens[place] == tokens[place - period] else 0
            found[place] |= same > period
    return found


def _continue(
    parameters: Mapping[str, Tensor], config: KimiLinearConfig, prompts: Sequence[Sequence[int]]
) -> list[list[int]]:
    """What follows each up to `TEXT` tokens, all decoded together."""
    kernels = kernels_for("cpu", "float32")
    current = {name: parameter.detach() for name, parameter in parameters.items()}
    lengths = [len(prompt) for prompt in prompts]
    continued = TEXT - min(lengths)
    room = max(lengths) + continued
    pages = -(-room // PAGE_TOKENS) * len(prompts)
    pool = StatePool(config.state_layout("float32"), len(prompts), pages * PAGE_TOKENS, CPU)
    model = KimiLinear(weights_of(current, config, kernels), config, kernels)
    engine = Engine(model, config, "", "float32", pool)
    states = [engine.new_state(room) for _ in prompts]
    steps = [engine.prefill(prompts, states).argmax(dim=-1)]
    while len(steps) < continued:
        steps.append(engine.decode(steps[-1].tolist(), states).argmax(dim=-1))
    tokens = torch.stack(steps, dim=1).tolist()
    return [text[: TEXT - length] for text, length in zip(tokens, lengths, strict=True)]
