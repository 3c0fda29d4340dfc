"""Prefill and decode in different processes give the text that one process gives."""

import asyncio
from pathlib import Path

import pytest

from shared.kimi_linear.engine import Engine
from shared.kimi_linear.sampling import Draw, sample
from shared.messages import Sampling
from tests.system.conftest import System

pytestmark = pytest.mark.asyncio

PROMPT = tuple((7 * position + position // 5) % 256 for position in range(1300))


def in_one_process(
    model: Path, prompt: tuple[int, ...], sampling: Sampling, tokens: int
) -> list[int]:
    """Generate without any of the system: one engine, one state, one prefill."""
    engine = Engine.load(model, "float32", threads=1)
    state = engine.new_state(len(prompt) + tokens)
    logits = engine.prefill([prompt], [state])
    text: list[int] = []
    for _ in range(tokens):
        (token,) = sample(logits, [Draw.of(sampling, prompt, text)])
        text.append(token.token_id)
        logits = engine.decode([token.token_id], [state])
    return text


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=0, top_p=1, seed=0),
        Sampling(temperature=0.8, top_p=0.9, seed=1234),
        Sampling(
            temperature=1.2,
            top_p=0.95,
            top_k=50,
            min_p=0.01,
            repetition_penalty=1.2,
            presence_penalty=0.5,
            frequency_penalty=0.25,
            logit_bias=((7, 1.5), (14, -100)),
            seed=99,
        ),
    ],
    ids=["greedy", "seeded", "with every parameter"],
)
@pytest.mark.parametrize("length", [1, 65, 1300])
async def test_the_text_is_that_of_a_single_process(
    system: System, sampling: Sampling, length: int
) -> None:
    asked = sampling.model_dump(exclude={"logit_bias", "top_logprobs"})
    answer = await system.complete(
        **asked,
        logit_bias={str(token_id): bias for token_id, bias in sampling.logit_bias},
        prompt=list(PROMPT[:length]),
        max_tokens=24,
        ignore_eos=True,
        return_token_ids=True,
    )
    expected = await asyncio.to_thread(in_one_process, system.model, PROMPT[:length], sampling, 24)
    assert answer["choices"][0]["token_ids"] == expected


async def test_the_largest_bias_forces_the_tokens_of_a_text(system: System) -> None:
    answer = await system.complete(
        prompt=[1, 2, 3], max_tokens=8, logit_bias={"42": 100}, return_token_ids=True
    )
    assert answer["choices"][0]["token_ids"] == [42] * 8


async def test_requests_at_the_same_time_do_not_change_each_other(system: System) -> None:
    bodies = [
        {
            "prompt": list(PROMPT[start : start + 100 + start]),
            "max_tokens": 16,
            "temperature": 0.7,
            "seed": start,
            "ignore_eos": True,
            "return_token_ids": True,
        }
        for start in range(6)
    ]
    alone = [await system.complete(**body) for body in bodies]
    together = await asyncio.gather(*(system.complete(**body) for body in bodies))
    assert [answer["choices"][0]["token_ids"] for answer in together] == [
        answer["choices"][0]["token_ids"] for answer in alone
    ]


async def test_the_state_crossed_the_network_compressed(system: System) -> None:
    timings = (await system.complete(prompt=list(PROMPT), max_tokens=4))["timings"]
    assert 0 < timings["state_wire_bytes"] < timings["state_raw_bytes"]
