"""From files to batches: rows, what is learned of them, tokens, packing, padding, order. Expectations made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyarrow import parquet

from fedclient.trainer.options import CausalOptions, ClassificationOptions, DataOptions
from fedclient.trainer.text.batches import Padding, Steps, in_order_of_length
from fedclient.trainer.text.corpus import IGNORED, Corpus
from fedclient.trainer.text.readiness import described, overlap
from fedclient.trainer.text.rows import DataError, read_rows
from fedclient.trainer.text.templates import CausalSource, Source, chat_parts
from fedclient.trainer.text.tokens import causal_corpus, class_number, labelled_corpus, located
from tests.support.tiny_models import byte_tokenizer, word_tokenizer, write_jsonl

START, END, BOS = 0, 1, 2


# --- Rows


def test_the_same_rows_from_every_kind_of_file(tmp_path: Path):
    rows = [{"text": "one,\ntwo", "label": "1"}, {"text": 'a "quote" é', "label": "0"}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text('text,label\n"one,\ntwo",1\n"a ""quote"" é",0\n', encoding="utf-8-sig")
    (tmp_path / "a.tsv").write_text('text\tlabel\n"one,\ntwo"\t1\n"a ""quote"" é"\t0\n')
    parquet.write_table(pa.Table.from_pylist([{**row, "other": 1} for row in rows]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.csv", "a.tsv", "a.parquet"):
        assert [dict(row) for row in read_rows(tmp_path / name, ["text", "label"])] == rows, name
    (tmp_path / "a.txt").write_text("all of\nit")
    assert list(read_rows(tmp_path / "a.txt", ["body"])) == [{"body": "all of\nit"}]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.jsonl", b'{"text": "x"}\n[1]\n', "line 2 is not a JSON object"),
        ("a.jsonl", b'{"text": "secret"}\n\n{"txt": "secret"}\n', "row 2: it has no 'text'; it has txt"),
        ("a.jsonl", b"\xff\xfe", "not UTF-8"),
        ("a.csv", b"text,label\nx\n", "row 1: it has no 'label'; it has text"),
        ("a.parquet", b"PAR1", "not a parquet file"),
        ("a.pkl", b"", "ends in none of .jsonl"),
        ("a.txt", b"x", "no columns"),
        ("gone.csv", None, "No such file"),
    ],
)
def test_what_is_wrong_with_a_file(tmp_path: Path, name: str, data: bytes | None, words: str):
    if data is not None:
        (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=words.replace(".", r"\.")) as caught:
        list(read_rows(tmp_path / name, ["text", "label"] if name.endswith((".csv", ".txt")) else ["text"]))
    assert "secret" not in str(caught.value)


# --- What is learned


def parts(row: dict[str, Any], chat: bool = True, **options: Any) -> list[tuple[str, bool]]:
    source = CausalSource(CausalOptions(train="x", **options), byte_tokenizer())
    assert set(source.columns) <= set(row)
    return source.parts(row)


def test_texts_templates_and_completions():
    row = {"text": "T", "q": "2+2", "a": 4}
    assert parts(row) == [("T", True)]
    assert parts(row, template="{{Q}} {q}: {a}") == [("{Q} 2+2: 4", True)]
    assert parts(row, prompt="q", completion="a") == [("2+2", False), ("4", True)]
    assert parts(row, template="Q {q}\nA ", completion="a") == [("Q 2+2\nA ", False), ("4", True)]
    with pytest.raises(DataError):
        parts({"text": ["T"]})


CHAT = [
    {"role": "system", "content": "S"},
    {"role": "user", "content": "U"},
    {"role": "assistant", "content": "A"},
    {"role": "user", "content": "V"},
    {"role": "assistant", "content": "B"},
    {"role": "user", "content": "W"},
]


def test_of_a_chat_the_answers_are_learned_with_their_end():
    assert parts({"chat": CHAT}, messages="chat") == [
        ("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\n", False),
        ("A<|im_end|>\n", True),
        ("<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n", False),
        ("B<|im_end|>\n", True),
        ("<|im_start|>user\nW<|im_end|>\n", False),
    ]


def test_a_template_that_rewrites_earlier_answers_leaves_the_last():
    def render(messages: Any, *, ask: bool) -> str:
        last = len(messages) - 1
        turns = [
            f"[{m['role'][0]}]{m['content'] if m['role'] == 'user' or i == last else '..'}"
            for i, m in enumerate(messages)
        ]
        return "".join(turns) + ("[a]" if ask else "")

    assert chat_parts(CHAT[1:5], render) == [("[u]U[a]..[u]V[a]", False), ("B", True)]


@pytest.mark.parametrize(
    "chat", ["hello", [], [{"role": "user"}], [{"role": "user", "content": "U"}], [{"role": "user", "content": 1}]]
)
def test_no_chat(chat: Any):
    with pytest.raises(DataError):
        parts({"chat": chat}, messages="chat")


def test_a_tokenizer_without_a_chat_template():
    source = CausalSource(CausalOptions(train="x", messages="chat"), byte_tokenizer(chat=None))
    with pytest.raises(DataError, match="chat template"):
        source.parts({"chat": CHAT})


# --- Tokens


def corpus(rows: list[dict[str, Any]], *, bos: bool = False, left: bool = False, size: int = 99, **options: Any):
    tokenizer = byte_tokenizer(bos=bos)
    source = CausalSource(CausalOptions(train="x", **options), tokenizer)
    found = causal_corpus(
        ((f"row {i}", row) for i, row in enumerate(rows)),
        source,
        tokenizer,
        max_length=size,
        left=left,
        packing=bool(options.get("packing")),
    )
    return found, lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]


def test_a_text_is_learned_with_its_end():
    found, ids = corpus([{"text": "ab"}, {"text": "c"}], bos=True)
    assert found.tokens(0).tolist() == [BOS, *ids("ab"), END]
    assert found.expected(0).tolist() == [IGNORED, *ids("ab"), END]
    assert found.tokens(1).tolist() == [BOS, *ids("c"), END]
    assert found.targets.tolist() == [3, 2]


def test_a_prompt_is_masked():
    found, ids = corpus([{"p": "ab", "c": "de"}], prompt="p", completion="c")
    assert found.tokens(0).tolist() == [*ids("abde"), END]
    assert found.expected(0).tolist() == [IGNORED, IGNORED, *ids("de"), END]
    batch = Padding(0).expected(found, [0])
    assert batch.tolist() == [[IGNORED, *ids("de"), END, IGNORED]]


def test_a_chat_ends_as_its_template_says():
    found, ids = corpus([{"chat": CHAT[1:3]}], messages="chat")
    assert found.tokens(0)[-2:].tolist() == [END, *ids("\n")]
    assert found.expected(0)[-3:].tolist() == [*ids("A"), END, *ids("\n")]
    assert found.targets.tolist() == [3]


def test_truncation_at_either_end_and_what_it_leaves_nothing_of():
    rows = [{"p": "a", "c": "bc"}, {"p": "long prompt", "c": "x"}]
    right, ids = corpus(rows, prompt="p", completion="c", size=3)
    assert right.tokens(0).tolist() == ids("abc")
    assert (len(right), right.dropped) == (1, 1)
    left, _ = corpus(rows, prompt="p", completion="c", size=3, left=True)
    assert left.tokens(0).tolist() == [*ids("bc"), END]
    assert left.tokens(1).tolist() == [*ids("tx"), END]
    assert left.lengths.tolist() == [4, 13]


def test_packing_loses_nothing():
    found, ids = corpus([{"text": "abcd"}, {"text": "e"}, {"text": "fg"}], packing=True, size=4)
    assert [found.tokens(i).tolist() for i in range(len(found))] == [
        ids("abcd"),
        [END, *ids("e"), END, *ids("f")],
        [*ids("g"), END],
    ]
    assert found.targets.tolist() == [3, 3, 1]
    alone, _ = corpus([{"text": "abcd"}], packing=True, size=4)
    assert [alone.tokens(i).tolist() for i in range(len(alone))] == [ids("abcd")], "one token predicts nothing"


def classified(rows: list[dict[str, Any]], size: int = 99, **options: Any) -> Corpus:
    given = ClassificationOptions(train="x", labels=("neg", "pos"), **options)
    return labelled_corpus(
        ((f"row {i}", row) for i, row in enumerate(rows)),
        Source(given),
        word_tokenizer(),
        pair=given.pair,
        label=lambda row: class_number(row["label"], {"neg": 0, "pos": 1}),
        max_length=size,
    )


def test_reading_much_is_no_silence(tmp_path: Path):
    signs: list[int] = []
    path = write_jsonl(tmp_path / "long.jsonl", [{"text": "x"}] * 1100)
    rows = list(located([path], ["text"], lambda: signs.append(1)))
    assert (len(rows), len(signs)) == (1100, 2)


def test_a_label_that_is_called_by_a_number_may_be_written_as_one():
    stars = {"1": 0, "2": 1, "3": 2}
    assert [class_number(value, stars) for value in ("1", 1, "3", 3)] == [0, 0, 2, 2]


def test_labels_by_name_and_by_number():
    rows = [{"text": "good film", "label": label} for label in ("pos", 0, "1")]
    found = classified(rows)
    assert found.labels.tolist() == [1, 0, 1]
    assert found.tokens(0).tolist() == [2, 4, 10, 3]
    for label in ("Pos", 2, -1, "2", None, 0.5):
        with pytest.raises(DataError, match=r"row 0: its label is neither one of the 2 labels"):
            classified([{"text": "film", "label": label}])


def test_two_texts_and_which_of_them_a_token_is_of():
    found = classified([{"text": "good film", "second": "bad", "label": 0}, {"text": "a", "second": "a", "label": 1}],
                       pair="second")  # fmt: skip
    inputs = Padding(0, "cpu", separator=3).inputs(found, [0, 1])
    assert inputs["input_ids"].tolist() == [[2, 4, 10, 3, 5, 3], [2, 17, 3, 17, 3, 0]]
    assert inputs["attention_mask"].tolist() == [[1] * 6, [1] * 5 + [0]]
    assert inputs["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1], [0, 0, 0, 1, 1, 0]]
    reference = word_tokenizer()("good film", "bad")
    assert inputs["token_type_ids"][0].tolist() == reference["token_type_ids"]


def test_a_classifiers_text_is_cut_between_its_boundaries():
    found = classified([{"text": "good film good film", "label": 0}, {"text": "bad", "label": 1}], size=4)
    assert found.tokens(0).tolist() == [2, 4, 10, 3]
    assert found.lengths.tolist() == [6, 3]


def test_errors_name_the_row(tmp_path: Path):
    write_jsonl(tmp_path / "a.jsonl", [{"chat": CHAT}, {"chat": "secret"}])
    tokenizer = byte_tokenizer()
    source = CausalSource(CausalOptions(train="x", messages="chat"), tokenizer)
    with pytest.raises(DataError, match=r"a\.jsonl, row 2: a chat is a list") as caught:
        causal_corpus(
            located([tmp_path / "a.jsonl"], source.columns), source, tokenizer, max_length=9, left=False, packing=False
        )
    assert "secret" not in str(caught.value)


# --- Batches


def test_an_epoch_has_every_example_once_and_a_smaller_step_at_its_end():
    steps = Steps(11, 2, 2, np.random.default_rng(1))
    first, second = list(steps), list(steps)
    assert len(steps) == len(first) == 3
    assert [[len(batch) for batch in step] for step in first] == [[2, 2], [2, 2], [2, 1]]
    flat = [int(n) for step in first for batch in step for n in batch]
    assert sorted(flat) == list(range(11))
    assert flat != [int(n) for step in second for batch in step for n in batch]
    again = list(Steps(11, 2, 2, np.random.default_rng(1)))
    assert flat == [int(n) for step in again for batch in step for n in batch]


def test_fewer_examples_than_a_batch_still_make_a_step():
    assert [[len(b) for b in step] for step in Steps(3, 8, 4, np.random.default_rng(1))] == [[3]]


def test_evaluation_takes_the_first_examples_longest_first():
    found, _ = corpus([{"text": "a"}, {"text": "abc"}, {"text": "ab"}, {"text": "abcdef"}])
    assert [b.tolist() for b in in_order_of_length(found, 2)] == [[3, 1], [2, 0]]
    assert [b.tolist() for b in in_order_of_length(found, 2, limit=3)] == [[1, 2], [0]]


# --- Readiness


def test_what_is_said_of_the_data():
    rows = [{"text": "good film", "label": 0}] * 2 + [{"text": "bad", "label": 1}, {"text": "a " * 20, "label": 1}]
    found = classified(rows, size=8)
    assert described(found, 8, ["neg", "pos", "new"]) == {
        "examples": 4,
        "tokens": 4 + 4 + 3 + 22,
        "length": {"median": 4, "p95": 22, "max": 22},
        "max_length": 8,
        "truncated": 0.25,
        "duplicates": 1,
        "without_target": 0,
        "labels": {"neg": 2, "pos": 2, "new": 0},
    }
    assert overlap(found, classified([rows[2], {"text": "bad", "label": 0}])) == 1
    packed, _ = corpus([{"text": "abcd"}, {"text": "e"}], packing=True, size=4)
    report = described(packed, 4)
    assert (report["examples"], report["blocks"], report["truncated"]) == (2, 2, 0.0)
    json.dumps(report)


def test_columns_of_a_template_are_those_that_it_names():
    assert Source(DataOptions(train="x", template="{a} {b} {a}")).columns == ("a", "b")
