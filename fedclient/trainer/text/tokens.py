"""From files to tokens: what is given and what is learned, marked at both ends, cut to the model's length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fedclient.trainer.text.corpus import Corpus, Example, build_corpus, pack
from fedclient.trainer.text.rows import DataError, Row, read_rows
from fedclient.trainer.text.templates import CausalSource, Part, Source, as_text

_CHUNK = 512
_LABELS_NAMED = 20

T = TypeVar("T")

Located = tuple[str, Row]
"""Where a row lies, and the row."""


def located(
    files: Iterable[Path], columns: Sequence[str], alive: Callable[[], None] = lambda: None
) -> Iterator[Located]:
    """The rows of several files.

    Args:
        files: in the order in which they are read.
        columns: what of them is needed.
        alive: called now and then; raises to stop.

    Raises:
        DataError: as `read_rows`.
    """
    for path in files:
        for number, row in enumerate(read_rows(path, columns), 1):
            if number % _CHUNK == 0:
                alive()
            yield f"{path}, row {number}", row


def causal_corpus(
    rows: Iterable[Located], source: CausalSource, tokenizer: Any, *, max_length: int, left: bool, packing: bool
) -> Corpus:
    """Tokenize what a language model learns from.

    Args:
        rows: the data.
        source: what of a row is text, and what is learned.
        tokenizer: the model's.
        max_length: tokens of an example at most.
        left: cut at the beginning.
        packing: lose nothing, but cut the whole into blocks of `max_length`.

    Raises:
        DataError: a row cannot be used.
    """
    head, tail = boundaries(tokenizer)
    tail = tail if source.ends else []

    def examples() -> Iterator[tuple[str, Example]]:
        for chunk in _chunks((_parts(where, source, row) for where, row in rows), _CHUNK):
            encoded = iter(_encode(tokenizer, [text for parts in chunk for text, _ in parts]))
            for parts in chunk:
                ids = [*head] if source.ends else []
                learned = [False] * len(ids)
                for _, is_learned in parts:
                    part = next(encoded)
                    ids += part
                    learned += [is_learned] * len(part)
                ids += tail
                learned += [True] * len(tail)
                cut = slice(None) if packing else _cut(len(ids), max_length, left=left)
                yield repr(parts), Example(ids[cut], learned[cut], length=len(ids))

    corpus = build_corpus(examples(), keep=lambda e: packing or any((e.learned or ())[1:]))
    return pack(corpus, max_length) if packing else corpus


def labelled_corpus(
    rows: Iterable[Located],
    source: Source,
    tokenizer: Any,
    *,
    pair: str,
    label: Callable[[Row], int],
    max_length: int,
) -> Corpus:
    """Tokenize what a classifier learns from; the tokenizer cuts, the longer of two texts first.

    Raises:
        DataError: a row cannot be used.
    """

    def read(row: Row) -> tuple[str, str, int]:
        return source.text(row), as_text(row[pair]) if pair else "", label(row)

    def tokenized(chunk: list[tuple[str, str, int]], **options: Any) -> list[list[int]]:
        texts, pairs = [text for text, _, _ in chunk], [second for _, second, _ in chunk] if pair else None
        ids: list[list[int]] = tokenizer(texts, pairs, verbose=False, return_attention_mask=False, **options)[
            "input_ids"
        ]
        return ids

    def examples() -> Iterator[tuple[str, Example]]:
        for chunk in _chunks((_told(where, partial(read, row)) for where, row in rows), _CHUNK):
            whole = short = tokenized(chunk)
            if any(len(ids) > max_length for ids in whole):
                short = tokenized(chunk, truncation=True, max_length=max_length)
            for (text, second, number), ids, uncut in zip(chunk, short, whole, strict=True):
                yield repr((text, second, number)), Example(ids, label=number, length=len(uncut))

    return build_corpus(examples(), keep=lambda e: bool(len(e.ids)))


def boundaries(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts before a text, and what ends one."""
    beginning = tokenizer("")["input_ids"]
    head = [beginning[0]] if beginning and beginning[0] == tokenizer.bos_token_id else []
    return head, [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def class_number(value: Any, names: Mapping[str, int]) -> int:
    """The number of a label, which is given by its name or as its number.

    Raises:
        DataError: there is no such label.
    """
    # A label that is called "1" may be written as a number.
    name = value if isinstance(value, str) else str(value)
    if name in names and not isinstance(value, bool):
        return names[name]
    number = int(value) if isinstance(value, int) or (isinstance(value, str) and value.isdecimal()) else -1
    if not 0 <= number < len(names):
        known = ", ".join(list(names)[:_LABELS_NAMED]) + (", ..." if len(names) > _LABELS_NAMED else "")
        raise DataError(f"its label is neither one of the {len(names)} labels ({known}) nor the number of one, from 0")
    return number


def _encode(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    encoded: list[list[int]] = tokenizer(
        texts, add_special_tokens=False, truncation=False, verbose=False, return_attention_mask=False
    )["input_ids"]
    return encoded


def _cut(length: int, limit: int, *, left: bool) -> slice:
    return slice(max(0, length - limit), None) if left else slice(0, limit)


def _parts(where: str, source: CausalSource, row: Row) -> list[Part]:
    return _told(where, lambda: source.parts(row))


def _told(where: str, act: Callable[[], T]) -> T:
    try:
        return act()
    except DataError as e:
        raise DataError(f"{where}: {e}") from None


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Lists of at most so many: tokenizers are fast at many texts at once."""
    source = iter(items)
    while chunk := list(islice(source, size)):
        yield chunk
