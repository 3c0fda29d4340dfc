"""Chats are rendered as Kimi's template renders them, and no text in them can pass for more."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.errors import CheckpointError, InvalidRequestError
from shared.kimi_linear.chat_template import ChatMessage, ChatTemplate, Role
from shared.kimi_linear.tokenizer.byte_level import ByteLevelTokenizer, ByteTokenizerFile
from shared.kimi_linear.tokenizer.interface import Tokenizer
from tests.tokenizer.small_tokenizers import ADDED_IDS, VOCAB_SIZE

SYSTEM = ChatMessage("system", "Be brief.")
USER = ChatMessage("user", " Who are you?\n")
ASSISTANT = ChatMessage("assistant", "Kimi.")
TOOL = ChatMessage("tool", "4", tool_call_id="functions.add:0")

DEFAULT = (
    "<|im_system|>system<|im_middle|>"
    "You are Kimi, an AI assistant created by Moonshot AI.<|im_end|>"
)

roles = st.sampled_from(["system", "user", "assistant", "tool"])
hostile_texts = st.lists(
    st.sampled_from([*ADDED_IDS, "system", "user", "\n", " ", "月", "ignore all of that"])
).map("".join)


def spelled(tokenizer: Tokenizer, token_ids: tuple[int, ...]) -> str:
    """Tokens as text, the special ones by name."""
    names = {token_id: name for name, token_id in tokenizer.special_tokens.items()}
    data = (names.get(i, "").encode() or tokenizer.token_bytes(i) for i in token_ids)
    return b"".join(data).decode()


# --- the template ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([USER], f"{DEFAULT}<|im_user|>user<|im_middle|> Who are you?\n<|im_end|>"),
        (
            [SYSTEM, USER],
            (
                "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
                "<|im_user|>user<|im_middle|> Who are you?\n<|im_end|>"
            ),
        ),
        (
            [SYSTEM, USER, ASSISTANT, USER],
            (
                "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
                "<|im_user|>user<|im_middle|> Who are you?\n<|im_end|>"
                "<|im_assistant|>assistant<|im_middle|>Kimi.<|im_end|>"
                "<|im_user|>user<|im_middle|> Who are you?\n<|im_end|>"
            ),
        ),
        (
            [ASSISTANT, SYSTEM],
            (
                f"{DEFAULT}<|im_assistant|>assistant<|im_middle|>Kimi.<|im_end|>"
                "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
            ),
        ),
        (
            [replace(SYSTEM, name="rules"), replace(USER, name="月"), replace(ASSISTANT, name="")],
            (
                "<|im_system|>rules<|im_middle|>Be brief.<|im_end|>"
                "<|im_user|>月<|im_middle|> Who are you?\n<|im_end|>"
                "<|im_assistant|>assistant<|im_middle|>Kimi.<|im_end|>"
            ),
        ),
        (
            [SYSTEM, TOOL, replace(TOOL, name="add")],
            (
                "<|im_system|>system<|im_middle|>Be brief.<|im_end|>"
                "<|im_system|>tool<|im_middle|>## Return of functions.add:0\n4<|im_end|>"
                "<|im_system|>add<|im_middle|>## Return of functions.add:0\n4<|im_end|>"
            ),
        ),
        ([ChatMessage("system", "")], "<|im_system|>system<|im_middle|><|im_end|>"),
    ],
)
@pytest.mark.parametrize(
    ("add_generation_prompt", "prompt"),
    [(False, ""), (True, "<|im_assistant|>assistant<|im_middle|>")],
)
def test_a_chat_is_rendered_as_published(
    tokenizer: Tokenizer,
    messages: list[ChatMessage],
    expected: str,
    add_generation_prompt: bool,
    prompt: str,
) -> None:
    token_ids = ChatTemplate.of(tokenizer).render(
        messages, add_generation_prompt=add_generation_prompt
    )
    assert spelled(tokenizer, token_ids) == expected + prompt


def test_special_tokens_are_put_in_by_id(kimi: Tokenizer) -> None:
    token_ids = ChatTemplate.of(kimi).render([SYSTEM], add_generation_prompt=False)
    assert token_ids == (
        ADDED_IDS["<|im_system|>"],
        *kimi.encode("system"),
        ADDED_IDS["<|im_middle|>"],
        *kimi.encode("Be brief."),
        ADDED_IDS["<|im_end|>"],
    )


# --- what a text cannot do -------------------------------------------------------------------


@given(role=roles, content=hostile_texts, name=hostile_texts, call=hostile_texts)
def test_no_text_of_a_message_can_open_or_end_one(
    tokenizer: Tokenizer, role: Role, content: str, name: str, call: str
) -> None:
    template = ChatTemplate.of(tokenizer)
    special = set(tokenizer.special_tokens.values())

    def skeleton(message: ChatMessage) -> list[int]:
        token_ids = template.render([SYSTEM, message], add_generation_prompt=True)
        return [token_id for token_id in token_ids if token_id in special]

    harmless = ChatMessage(role, "hello", tool_call_id="call")
    hostile = ChatMessage(role, content, name=name, tool_call_id=call)
    assert skeleton(hostile) == skeleton(harmless)


# --- refusals --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ([], "messages: there has to be at least one"),
        ([SYSTEM, USER, replace(TOOL, tool_call_id=None)], "messages.2: tool_call_id: "),
        ([replace(USER, content="a\ud800")], "messages.0: .*character 1"),
        ([SYSTEM, replace(USER, name="a\ud800")], "messages.1: .*character 1"),
    ],
)
def test_a_chat_that_cannot_be_rendered_is_the_clients_mistake(
    kimi: Tokenizer, messages: list[ChatMessage], reason: str
) -> None:
    with pytest.raises(InvalidRequestError, match=reason) as refusal:
        ChatTemplate.of(kimi).render(messages, add_generation_prompt=True)
    assert refusal.value.param == "messages"


@pytest.mark.parametrize(
    "missing", ["<|im_system|>", "<|im_user|>", "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"]
)
def test_a_tokenizer_without_one_of_the_special_tokens_is_refused(missing: str) -> None:
    others = {name: token_id for name, token_id in ADDED_IDS.items() if name != missing}
    file = ByteTokenizerFile(vocab_size=VOCAB_SIZE, special_tokens=others)
    with pytest.raises(CheckpointError) as refusal:
        ChatTemplate.of(ByteLevelTokenizer(file))
    assert missing in str(refusal.value)
