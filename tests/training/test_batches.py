"""The data of a step depends on the recipe and the step alone."""

import random
from dataclasses import replace

import pytest
import torch

from shared.kimi_linear.chat_template import ChatMessage, ChatTemplate
from shared.kimi_linear.tokenizer.tiktoken_format import TiktokenTokenizer
from training.batches import Batches, tokenized
from training.corpus import Document
from training.recall import UNSCORED, RecallTexts, draw_facts
from training.recipe import TINY, Recipe


def test_a_step_has_the_same_data_however_it_is_reached(
    recipe: Recipe, documents: list[Document], tokenizer: TiktokenTokenizer
) -> None:
    works = tokenized(documents, tokenizer)
    shorter = Batches(recipe.shortened(5), works, tokenizer)
    longer = Batches(recipe, works, tokenizer)
    for step in (4, 0):
        one, other = shorter.batch(step), longer.batch(step)
        assert torch.equal(one.inputs, other.inputs)
        assert torch.equal(one.weights, other.weights)


def test_steps_and_sequences_differ(batches: Batches) -> None:
    rows = [tuple(row) for step in range(4) for row in batches.batch(step).inputs.tolist()]
    assert len(set(rows)) == len(rows)


def test_sequences_have_the_length_of_their_phase(batches: Batches, recipe: Recipe) -> None:
    assert batches.batch(3).inputs.shape == (2, 512)
    assert batches.batch(4).inputs.shape == (1, 1024)


def test_a_target_is_the_next_input(batches: Batches) -> None:
    batch = batches.batch(1)
    assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])


def test_the_learning_rate_falls_to_zero_after_the_last_step_whatever_the_steps() -> None:
    for steps in (800, 1500):
        recipe = replace(TINY, decay_steps=200, own_loop_steps=0).shortened(steps)
        assert recipe.pace(steps - 201) == pytest.approx(1)
        assert 0 < recipe.pace(steps - 1) < 0.01
        assert recipe.pace(steps) == 0


@pytest.mark.parametrize("length", [400, 1000])
def test_a_recall_text_says_its_facts_once_and_asks_for_them_after(
    tokenizer: TiktokenTokenizer, length: int
) -> None:
    facts = draw_facts(random.Random(3), 3)
    asked = facts[::-1]
    filler = tokenizer.encode("the waters of the earth. " * length)
    chat = RecallTexts(tokenizer).chat(facts, asked, filler, length, 7)
    text = tokenizer.decode(chat.ids)
    assert len(chat.ids) == len(chat.weights) == length
    said = text.index(facts[-1].statement)
    for fact in facts:
        assert text.count(fact.statement) == 2
        assert text.index(fact.statement) <= said < text.index(fact.question)
        assert text.index(fact.question) < text.rindex(fact.statement)
    scored = [i for i, weight in zip(chat.ids, chat.weights, strict=True) if weight == 7]
    assert tokenizer.decode(scored) == "".join(f" {fact.value}" for fact in asked)
    assert UNSCORED in chat.weights


def test_a_recall_prompt_is_what_the_chat_template_makes_of_it(
    tokenizer: TiktokenTokenizer,
) -> None:
    facts = draw_facts(random.Random(4), 2)
    filler = tokenizer.encode("the waters of the earth. " * 100)
    prompt = RecallTexts(tokenizer).chat_question(facts, facts[1], filler, 300).prompt
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    text = "".join(names.get(i) or tokenizer.decode([i]) for i in prompt)
    user = text[text.index("<|im_user|>user<|im_middle|>") :].split("<|im_end|>")[0]
    content = user.removeprefix("<|im_user|>user<|im_middle|>")
    rendered = ChatTemplate.of(tokenizer).render(
        [ChatMessage("user", content)], add_generation_prompt=True
    )
    assert tokenizer.decode(rendered) == tokenizer.decode(prompt)
    special = set(names)
    assert [i for i in rendered if i in special] == [i for i in prompt if i in special]
    assert len(prompt) == 300


def test_facts_that_do_not_fit_are_refused(tokenizer: TiktokenTokenizer) -> None:
    facts = draw_facts(random.Random(5), 4)
    with pytest.raises(ValueError, match="more than 100"):
        RecallTexts(tokenizer).chat(facts, facts, [0] * 100, 100, 7)


def test_a_drill_says_each_fact_twice_and_scores_the_second_time(
    tokenizer: TiktokenTokenizer,
) -> None:
    drill = RecallTexts(tokenizer).drill(random.Random(6), 3, 700, 7)
    assert len(drill.ids) == len(drill.weights) == 700
    lines = [line for line in tokenizer.decode(drill.ids).splitlines() if line]
    first, again = lines[:3], lines[3:6]
    assert sorted(first) == sorted(again)
    scored = [i for i, weight in zip(drill.ids, drill.weights, strict=True) if weight == 7]
    answers = tokenizer.decode(scored).split()
    assert answers[:3] == [line.removesuffix(".").rpartition(" ")[2] for line in again]


def test_a_plain_question_is_the_text_up_to_the_word_that_answers(
    tokenizer: TiktokenTokenizer,
) -> None:
    facts = draw_facts(random.Random(4), 2)
    filler = tokenizer.encode("the waters of the earth. " * 100)
    question = RecallTexts(tokenizer).plain_question(facts, facts[0], filler, 300)
    assert len(question.prompt) == 300
    assert tokenizer.decode(question.answer) == f" {facts[0].value}."
    text = tokenizer.decode((*question.prompt, *question.answer))
    assert text.endswith("\n" + facts[0].statement)
    assert text.count(facts[0].statement) == 2
