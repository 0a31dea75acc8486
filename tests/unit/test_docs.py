"""The pages in docs/ name every setting and every error, and their examples are true."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

import fedlink
from fedclient.settings import SiteSettings, load_site
from fedclient.text_settings import CausalSettings, ClassificationSettings
from fedclient.trainer import derive_seed
from fedclient.trainer.text.causal_lm import CausalLm
from fedclient.trainer.text.classification import SequenceClassification
from fedclient.trainer.wire import JobKind
from fedlink import failpoints
from fedlink.blobs import DIGEST_SIZE, blob_digest, chunk_digests_of, ref_of
from fedlink.config import load_toml
from fedlink.errors import Reason
from fedlink.manifest import FileEntry, manifest_of_files
from fedlink.rpc import chunk_message
from fedlink.run_file import RunSpec
from fedlink.settings_schema import parse_schema
from fedlink.tensors import Kind, TensorSpec, build_header, parse_header
from fedserver.settings import ServerSettings
from tests.fault.cases import fixed

ROOT = Path(__file__).parents[2]
NOT_WRITTEN = {"directory"}  # set by `load_site`, never read from the file


def page(name: str) -> str:
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def rows(text: str) -> Iterator[list[str]]:
    """The cells of every table row that begins with a name in backticks."""
    for line in text.splitlines():
        if line.startswith("| `"):
            yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in get_args(annotation):
        yield from models_in(part)


def tables(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, set[str]]]:
    """Each table of a configuration file, `""` for the top level, and its keys."""
    yield path, set(model.model_fields) - NOT_WRITTEN
    for name, field in model.model_fields.items():
        for inner in models_in(field.annotation):
            yield from tables(inner, f"{path}.{name}".strip("."))


def sections(text: str) -> dict[str, str]:
    """The page cut at its headings; a heading that names a table in brackets is known by that name."""
    found: dict[str, str] = {}
    for part in re.split(r"^## ", text, flags=re.MULTILINE):
        title = part.partition("\n")[0]
        named = re.search(r"\[([\w.]+)\]", title)
        key = named[1].replace(".NAME", "") if named else ""
        found[key] = found.get(key, "") + part
    return found


@pytest.mark.parametrize(
    ("name", "model"),
    [("run-file.md", RunSpec), ("site-file.md", SiteSettings), ("server-file.md", ServerSettings)],
)
def test_every_key_has_its_row_in_its_table_and_no_other(name: str, model: type[BaseModel]) -> None:
    parts = sections(page(name))
    for table, keys in tables(model):
        documented = {cells[0].strip("`") for cells in rows(parts[table]) if len(cells) == 4}
        assert documented == keys, f"{name} [{table}]"


def test_every_key_of_the_built_in_workloads_has_its_row() -> None:
    part = sections(page("site-file.md"))["workload.data"]
    documented = {cells[0].strip("`") for cells in rows(part) if len(cells) == 4}
    assert documented == set(CausalSettings.model_fields) | set(ClassificationSettings.model_fields)


def test_every_setting_of_the_built_in_workloads_is_in_the_page_with_its_default() -> None:
    part = page("training.md").partition("### What a run may set")[2].partition("\n### ")[0]
    documented: dict[str, str] = {}
    for names, defaults, _ in rows(part):
        documented |= zip(names.replace("`", "").split(", "), defaults.replace("`", "").split(", "), strict=True)
    found = {
        field.name: field.default for kind in (CausalLm, SequenceClassification) for field in fields(kind.Settings)
    }
    assert set(documented) == set(found)
    for name, default in found.items():
        assert json.loads(documented[name].replace("none", "[]")) == json.loads(json.dumps(default)), name


@pytest.mark.parametrize("name", ["run-file.md", "site-file.md", "server-file.md"])
def test_examples_of_configuration_are_valid(name: str, tmp_path: Path) -> None:
    for number, text in enumerate(re.findall(r"```toml\n(.*?)```", page(name), re.DOTALL)):
        path = tmp_path / f"{number}.toml"
        path.write_text(text, encoding="utf-8")
        if name == "site-file.md":
            load_site(path)
        else:
            (RunSpec if name == "run-file.md" else ServerSettings).checked(load_toml(path), name)


def test_the_full_run_file_shows_the_defaults() -> None:
    text = re.findall(r"```toml\n(.*?)```", page("run-file.md"), re.DOTALL)[1]
    table = RunSpec.checked(tomllib.loads(text), "docs").model_dump()
    given = {"name": "heart", "workload": "heart", "rounds": 15, "model": "heart-init"}
    assert table == RunSpec.checked({**given, "settings": {"learning_rate": 1e-2}}, "defaults").model_dump()


def test_every_reason_is_in_the_table_with_its_rule() -> None:
    table = {cells[0].strip("`"): cells for cells in rows(page("protocol.md")) if cells[0].strip("`") in statuses()}
    assert set(table) == set(Reason.__members__)
    for reason in Reason:
        _, status, retryable, meaning = table[reason.name]
        assert (status, retryable) == (reason.status, "yes" if reason.retryable else "no"), reason
        assert meaning


def statuses() -> set[str]:
    """Names in the first column of the table of errors, known or not."""
    part = page("protocol.md").partition("\n## Errors")[2].partition("\n## ")[0]
    return {cells[0].strip("`") for cells in rows(part)}


def test_every_feature_is_in_the_protocol() -> None:
    part = page("protocol.md").partition("### Versions and features")[2].partition("\n## ")[0]
    assert {cells[0].strip("`") for cells in rows(part)} == set(fedlink.FEATURES)


def test_every_event_is_in_the_protocol() -> None:
    part = page("protocol.md").partition("## Events of a run")[2].partition("\n## ")[0]
    documented = {kind for cells in rows(part) for kind in re.findall(r"`(\w+)`", cells[0])}
    sources = "".join(p.read_text(encoding="utf-8") for p in (ROOT / "fedserver" / "runtime").glob("*.py"))
    kinds = set(re.findall(r'"((?:run|round|task|version)_(?:\w+ed|finishing))"', sources))
    assert documented == kinds | {"task_accepted", "task_refused", "task_failed"}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"abc",
        bytes(1 << 20),
        bytes(1 << 20) + b"\1",
        bytes((7 * i + 3) % 251 for i in range(2_621_440)),
    ],
    ids=["empty", "abc", "one chunk", "one chunk and a byte", "two and a half chunks"],
)
def test_digests_in_the_protocol(data: bytes) -> None:
    chunks = chunk_digests_of(data)
    known = [line for line in page("protocol.md").splitlines() if f"| `{blob_digest(data).hex()}` |" in line]
    assert len(known) == 1
    assert f"| {len(data)} |" in known[0]
    assert chunks[-DIGEST_SIZE:].hex() in known[0]


def test_the_manifest_in_the_protocol() -> None:
    text = page("protocol.md")
    specs = [TensorSpec("bias", "F32", (1,)), TensorSpec("weight", "F32", (1, 2))]
    head, _ = build_header(specs)
    file = head + bytes.fromhex("0000003f 0000803f 000000c0")
    assert head[8:].decode().rstrip() in text
    assert f"`{head[:8].hex()}`" in text
    assert ref_of(file).digest.hex() in text
    entry = FileEntry("model.safetensors", ref_of(file))
    data = manifest_of_files(Kind.MODEL, [(entry, parse_header(file, len(file)))], {}).serialize()
    assert data.hex() in re.sub(r"\s", "", text)
    assert ref_of(data).digest.hex() in text


def test_the_chunk_in_the_protocol() -> None:
    assert chunk_message(1 << 20, b"abc").hex() in re.sub(r"\s", "", page("protocol.md"))


def test_the_schema_in_the_protocol_is_of_the_subset() -> None:
    for text in re.findall(r"```json\n(.*?)```", page("protocol.md"), re.DOTALL):
        parse_schema(text)


def test_seeds_in_the_page_on_training() -> None:
    for kind in (JobKind.TRAIN, JobKind.EVALUATE):
        assert f"| 42, cleveland, 1, {kind.value} | {derive_seed(42, 'cleveland', 1, kind)} |" in page("training.md")


def test_links_between_the_pages_lead_somewhere() -> None:
    for path in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#\s]+)", path.read_text(encoding="utf-8")):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"


def test_files_that_the_architecture_names_exist() -> None:
    for name in re.findall(r"`(fed(?:server|client)/[\w/]+\.py)`", page("architecture.md")):
        assert (ROOT / name).exists(), name


def test_every_test_that_a_promise_rests_on_is_there() -> None:
    text = page("reliability.md")
    named = set(re.findall(r"`(tests/[\w/]+\.py)`", text)) | {
        f"tests/fault/{name}" for name in re.findall(r"`(test_\w+\.py)`", text)
    }
    assert len(named) > 15
    assert not [name for name in named if not (ROOT / name).is_file()]
    assert f"lists all {len({*failpoints.SERVER, *failpoints.CLIENT, *failpoints.TRAINER})}" in text
    assert f"{len(fixed())} cases" in text
