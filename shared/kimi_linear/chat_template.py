"""Kimi's chat template: messages to token ids, where no content can pass for the template.

Each message is `<|im_user|>name<|im_middle|>content<|im_end|>`, opened by the special token of its
role; the name is the role's unless another is given. Special tokens are put in by id and everything
else is encoded as ordinary text, so a content that spells a special token out is only text.

Source: `chat_template.jinja` of moonshotai/Kimi-K2-Instruct and Kimi-K2-Thinking, whose special
tokens Kimi Linear shares. Left out is all about calling tools: the declaration of tools and the
calls in an assistant's message. Left out too are images, reasoning, and the line break that
Kimi-K2-Instruct (but not Kimi-K2-Thinking) has after its default system message.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal, Self

from shared.errors import CheckpointError, InvalidRequestError
from shared.kimi_linear.tokenizer.interface import Tokenizer

Role = Literal["system", "user", "assistant", "tool"]

OPENINGS: Final[Mapping[Role, str]] = {
    "system": "<|im_system|>",
    "user": "<|im_user|>",
    "assistant": "<|im_assistant|>",
    "tool": "<|im_system|>",
}
MIDDLE: Final = "<|im_middle|>"
END: Final = "<|im_end|>"

DEFAULT_SYSTEM_PROMPT: Final = "You are Kimi, an AI assistant created by Moonshot AI."
"""Said first in a chat that does not begin with a system message."""


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a chat."""

    role: Role
    content: str
    name: str | None = None
    """Stands where the role's name would."""
    tool_call_id: str | None = None
    """The call that a tool's message answers; tools have to name it."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The template with the token ids of one tokenizer."""

    tokenizer: Tokenizer
    opening_ids: Mapping[Role, int]
    middle_id: int
    end_id: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Self:
        """Find the template's special tokens.

        Raises:
            CheckpointError: the tokenizer lacks one; names it.
        """
        return cls(
            tokenizer,
            {role: _special_id(tokenizer, token) for role, token in OPENINGS.items()},
            _special_id(tokenizer, MIDDLE),
            _special_id(tokenizer, END),
        )

    def render(
        self, messages: Sequence[ChatMessage], *, add_generation_prompt: bool
    ) -> tuple[int, ...]:
        """Turn a chat into token ids.

        Args:
            messages: at least one.
            add_generation_prompt: open a turn of the assistant's, for the model to write.

        Raises:
            InvalidRequestError: there is no message, a tool's does not say which call it answers,
                or a text is not valid Unicode; names the message.
        """
        if not messages:
            raise InvalidRequestError("messages: there has to be at least one", "messages")
        token_ids: list[int] = []
        if messages[0].role != "system":
            token_ids += self._turn(ChatMessage("system", DEFAULT_SYSTEM_PROMPT))
        for place, message in enumerate(messages):
            try:
                token_ids += self._turn(message)
            except InvalidRequestError as error:
                raise InvalidRequestError(f"messages.{place}: {error}", "messages") from None
        if add_generation_prompt:
            token_ids += self._opening("assistant", "assistant")
        return tuple(token_ids)

    def _turn(self, message: ChatMessage) -> tuple[int, ...]:
        content = self.tokenizer.encode(_content(message))
        return (*self._opening(message.role, message.name or message.role), *content, self.end_id)

    def _opening(self, role: Role, name: str) -> tuple[int, ...]:
        return (self.opening_ids[role], *self.tokenizer.encode(name), self.middle_id)


def _content(message: ChatMessage) -> str:
    if message.role != "tool":
        return message.content
    if message.tool_call_id is None:
        raise InvalidRequestError("tool_call_id: a tool has to name the call that it answers")
    return f"## Return of {message.tool_call_id}\n{message.content}"


def _special_id(tokenizer: Tokenizer, name: str) -> int:
    token_id = tokenizer.special_tokens.get(name)
    if token_id is None:
        raise CheckpointError(f"the tokenizer has no {name}, which Kimi's chat template needs")
    return token_id
