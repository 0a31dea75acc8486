"""The parts of a manifest that are no tensors of its own: a base, and files beside the weights."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fedlink.base import base_name, base_tensor
from fedlink.blobs import BlobRef, ref_of
from fedlink.companions import MAX_COMPANION_BYTES, is_companion
from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import FileEntry, Manifest
from fedlink.tensors import Kind, Role, TensorSpec
from fedlink.v1 import types_pb2 as pb
from fedserver.aggregation.fold import aggregate
from fedserver.aggregation.optimizers.sgd import Sgd
from fedserver.aggregation.pipeline import Pipeline
from fedserver.aggregation.reducers.mean import WeightedMean
from tests.support.shards import T, contribution, put

CONFIG = FileEntry("config.json", ref_of(b"{}"))
BASE = base_tensor(TensorSpec("b", "F32", (2, 3), Role.FROZEN), [memoryview(bytes(24))])


def manifest(**changes) -> Manifest:
    return replace(Manifest(Kind.MODEL, (), (), {}, (BASE,), (CONFIG,)), **changes)


def test_a_digest_is_of_name_dtype_shape_and_bytes_however_they_come():
    spec, data = BASE.spec, bytes(24)
    assert base_tensor(spec, [memoryview(data[:5]), memoryview(data[5:])]) == BASE
    # By sha256sum, over what types.proto says; docs/protocol.md shows it.
    assert BASE.digest.hex() == "77aaee7474d83bf858932a6d890451d126fab1c803cac91da9b607096bc9117d"
    others = [replace(spec, name="c"), replace(spec, dtype="I32"), replace(spec, shape=(3, 2))]
    digests = {base_tensor(s, [memoryview(data)]).digest for s in (spec, *others)}
    digests.add(base_tensor(spec, [memoryview(b"x" + data[1:])]).digest)
    assert len(digests) == 5


def test_base_and_companions_come_back_from_the_wire():
    assert Manifest.parse(manifest().serialize()) == manifest()


@pytest.mark.parametrize(
    "changes",
    [
        {"base": (BASE, BASE)},
        {"companions": (CONFIG, CONFIG)},
        {"companions": (FileEntry("model.py", CONFIG.blob),)},
        {"companions": (FileEntry("pytorch_model.bin", CONFIG.blob),)},
        {"companions": (FileEntry("../config.json", CONFIG.blob),)},
        {"companions": (FileEntry("config.json", BlobRef(CONFIG.blob.digest, MAX_COMPANION_BYTES + 1)),)},
        {"files": (CONFIG,)},
        {"kind": Kind.DELTA},
        {"kind": Kind.DELTA, "base": ()},
    ],
    ids=["base-twice", "file-twice", "code", "pickle", "path", "large", "shard", "update", "update-file"],
)
def test_what_cannot_be_is_refused(changes):
    with pytest.raises(FedlinkError) as e:
        manifest(**changes)
    assert e.value.reason is Reason.BAD_MANIFEST


@pytest.mark.parametrize("field", ["digest", "dtype", "name", "shape"])
def test_a_malformed_base_is_refused(field):
    message = pb.Manifest.FromString(manifest().serialize())
    if field == "shape":
        message.base[0].shape[:] = [1 << 60, 1 << 60]
    else:
        message.base[0].ClearField(field)
    with pytest.raises(FedlinkError) as e:
        Manifest.parse(message.SerializeToString())
    assert e.value.reason is Reason.BAD_MANIFEST


def test_what_loaders_need_travels():
    text = Path("docs/protocol.md").read_text(encoding="utf-8")
    section = text.partition("### Files beside the weights")[2].partition("###")[0]
    names = re.findall(r"`([^`]+\.[a-z]+)`", section)
    assert len(names) == 19
    assert [n for n in names if not is_companion(n)] == []


@pytest.mark.parametrize("name", ["model.py", "README.md", ".config.json", "a/config.json", "vocab.bin", "x.json", ""])
def test_nothing_else_travels(name):
    assert not is_companion(name)


def test_the_next_version_stands_on_the_same_base(tmp_path):
    model = put(tmp_path / "m", Kind.MODEL, [[T.of("w", "F32", np.ones(3))]])
    model = replace(model, manifest=replace(model.manifest, base=(BASE,), companions=(CONFIG,)))
    update = contribution(tmp_path, "c", 1, Kind.DELTA, [[T.of("w", "F32", np.ones(3))]])
    (tmp_path / "out").mkdir()
    version = aggregate(model, None, [update], Pipeline(Kind.DELTA, WeightedMean(), Sgd(1.0)), tmp_path / "out")
    assert (version.model.base, version.model.companions) == ((BASE,), (CONFIG,))
    assert version.model.everything == (*version.model.files, CONFIG)


@pytest.mark.parametrize(
    ("name", "called"),
    [
        ("base_model.model.model.layers.0.q_proj.base_layer.weight", "model.layers.0.q_proj.weight"),
        ("base_model.model.classifier.original_module.bias", "classifier.bias"),
        ("encoder.base.weight", "encoder.base.weight"),
    ],
)
def test_a_tensor_that_peft_wraps_is_called_as_in_the_model(name, called):
    assert base_name(name) == called
