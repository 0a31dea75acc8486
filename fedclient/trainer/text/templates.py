"""From a row to its text, in parts that are learned and parts that are only given."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from string import Formatter
from typing import Any, Protocol

from fedclient.trainer.options import CausalOptions, DataOptions
from fedclient.trainer.text.rows import DataError, Row

Part = tuple[str, bool]
"""A text, and whether it is learned."""


_NO_CHAT = "a chat is a list of objects with role and content, both texts"


class ChatTokenizer(Protocol):
    """What is used of a tokenizer here."""

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """Render a chat."""
        ...


class Source:
    """Where a workload's text comes from: a column, or a template over columns.

    Attributes:
        columns: the columns it reads.
    """

    def __init__(self, options: DataOptions) -> None:
        self._options = options
        named = [name for _, name, _, _ in Formatter().parse(options.template) if name]
        self.columns = tuple(dict.fromkeys(named)) if options.template else (options.text,)

    def text(self, row: Row) -> str:
        """The text of a row."""
        if self._options.template:
            return self._options.template.format_map(row)
        return as_text(row[self._options.text])


class CausalSource:
    """What a language model learns from a row: a text, a completion after its prompt, or the answers in a chat.

    Attributes:
        columns: the columns it reads.
        masked: whether something of a row may be given and not learned.
        ends: whether the end of a row's text is to be learned, too; a chat's template brings its own.
    """

    def __init__(self, options: CausalOptions, tokenizer: ChatTokenizer) -> None:
        self._options = options
        self._tokenizer = tokenizer
        self._plain = Source(options)
        self.masked = bool(options.messages or options.completion)
        self.ends = not options.messages
        if options.messages:
            self.columns: tuple[str, ...] = (options.messages,)
        elif options.prompt:
            self.columns = (options.prompt, options.completion)
        else:
            self.columns = (*self._plain.columns, *filter(None, [options.completion]))

    def parts(self, row: Row) -> list[Part]:
        """The text of a row.

        Raises:
            DataError: its chat is none, or the tokenizer has no template for chats.
        """
        options = self._options
        if options.messages:
            return chat_parts(messages_of(row[options.messages]), self._render)
        prompt = as_text(row[options.prompt]) if options.prompt else self._plain.text(row)
        return [(prompt, False), (as_text(row[options.completion]), True)] if options.completion else [(prompt, True)]

    def _render(self, messages: Sequence[Mapping[str, str]], *, ask: bool) -> str:
        try:
            text = self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask)
        except Exception as e:  # noqa: BLE001 - a template is a program: jinja2 and the template itself may raise anything
            raise DataError(f"the tokenizer's chat template refuses a chat: {type(e).__name__}: {e}") from None
        return str(text)


Render = Callable[..., str]
"""`render(messages, ask=...)`: a chat as text; with `ask` up to where the assistant is to speak."""


def chat_parts(messages: Sequence[Mapping[str, str]], render: Render) -> list[Part]:
    """A chat's text; learned is what the assistant says, with the end of its turn.

    Where a template writes earlier turns otherwise once others follow, only those are learned that it does not.

    Raises:
        DataError: there is nothing that could be learned.
    """
    whole, at = render(messages, ask=False), 0
    parts: list[Part] = []
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before, after = render(messages[:i], ask=True), render(messages[: i + 1], ask=False)
        if not (whole.startswith(after) and after.startswith(before) and at <= len(before) < len(after)):
            continue
        parts += [(whole[at : len(before)], False), (after[len(before) :], True)]
        at = len(after)
    if not parts:
        raise DataError("a chat has no answer of an assistant that its template lets be told from the rest")
    return [part for part in (*parts, (whole[at:], False)) if part[0]]


def messages_of(value: Any) -> list[dict[str, str]]:
    """A chat as a list of `{role, content}`.

    Raises:
        DataError: it is none.
    """
    found = [_message(m) for m in value] if isinstance(value, list) else []
    if not found:
        raise DataError(_NO_CHAT)
    return found


def _message(value: Any) -> dict[str, str]:
    match value:
        case {"role": str(role), "content": str(content)}:
            return {"role": role, "content": content}
    raise DataError(_NO_CHAT)


def as_text(value: Any) -> str:
    """A value as text.

    Raises:
        DataError: it is a list or an object.
    """
    if isinstance(value, list | dict | bytes):
        raise DataError("a text column holds a list, an object or bytes")
    return str(value)
