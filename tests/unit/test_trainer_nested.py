"""Nested state through a checkpoint's file: exact, whatever is in it."""

from __future__ import annotations

import math
import struct
import tempfile
from collections import Counter, OrderedDict, deque
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from fedclient.trainer.checkpoint import write_parts
from fedclient.trainer.nested import CannotHoldError, flatten
from fedclient.trainer.saved import Saved
from fedclient.trainer.torch_state import TORCH_DTYPES
from tests.support.interrupted import MEMORY


def through_a_file(value: Any) -> Any:
    with tempfile.TemporaryDirectory(dir=MEMORY) as directory:
        path = Path(directory) / "checkpoint.safetensors"
        write_parts(
            path,
            "o",
            {"before": flatten([np.ones(3)], "x"), "value": flatten(value, "x")},
            spare=0,
            alive=nothing,
        )
        saved = Saved(path, "cpu", nothing)
        again = saved.part("value")
        assert saved.is_same("value", flatten(again, "x"))
        saved.close()
    return again


def nothing() -> None:
    """Nobody asks."""


def same(a: Any, b: Any) -> bool:
    """Whether two values are of the same types and bits all through."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and type(a) is float:
        return struct.pack("d", a) == struct.pack("d", b)
    if isinstance(a, torch.Tensor):
        bits = [t.clone(memory_format=torch.preserve_format).reshape(-1).view(torch.uint8) for t in (a, b)]
        # Where no element lies before or behind another, strides say nothing.
        layouts = (a.is_contiguous() and b.is_contiguous()) or a.stride() == b.stride()
        return (a.dtype, a.shape) == (b.dtype, b.shape) and layouts and torch.equal(*bits)
    if isinstance(a, np.ndarray | np.generic):
        if isinstance(a, np.ndarray) and a.flags.f_contiguous != b.flags.f_contiguous:
            return False
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, dict):
        pairs = zip(a.items(), b.items(), strict=True)
        return len(a) == len(b) and all(same(k, m) and same(v, w) for (k, v), (m, w) in pairs)
    if isinstance(a, list | tuple | deque):
        ends = getattr(a, "maxlen", None) == getattr(b, "maxlen", None)
        return ends and len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


DTYPES = ["?", "u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", "c8"]
SHAPES = npst.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@st.composite
def arrays(draw: st.DrawFn) -> np.ndarray:
    array = draw(npst.arrays(draw(st.sampled_from(DTYPES)), draw(SHAPES)))
    if array.dtype == np.uint16 and draw(st.booleans()):
        array = array.view(ml_dtypes.bfloat16)
    return np.asfortranarray(array) if draw(st.booleans()) else array


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from(sorted(TORCH_DTYPES.values(), key=str)))
    shape = draw(SHAPES)
    width = torch.empty(0, dtype=dtype).element_size()
    size = math.prod(shape) * width
    raw = bytearray(draw(st.binary(min_size=size, max_size=size)))
    if dtype is torch.bool:
        raw = bytearray(b & 1 for b in raw)
    flat = torch.frombuffer(raw, dtype=torch.uint8).clone().view(dtype) if size else torch.empty(0, dtype=dtype)
    tensor = flat.reshape(shape)
    return tensor.permute(draw(st.permutations(range(len(shape)))))


PLAIN = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(1 << 200), 1 << 200)
    | st.floats()
    | st.text()
    | st.binary()
)
KEYS = st.integers() | st.text() | st.booleans() | st.none() | st.tuples(st.integers(), st.text())
SCALARS = st.sampled_from(
    [np.float64(0.1), np.float32(-0.0), np.int64(-7), np.uint8(3), np.bool_(True), np.float16("nan")]
)


def nested(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    dicts = st.dictionaries(KEYS, inner, max_size=3)
    return (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | dicts
        | dicts.map(OrderedDict)
        | st.builds(deque, st.lists(inner, max_size=3), st.none() | st.integers(0, 4))
        | st.sets(KEYS, max_size=3)
        | st.frozensets(KEYS, max_size=3)
        | st.lists(st.integers(0, 5)).map(Counter)
        | SHAPES.map(torch.Size)
    )


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.recursive(PLAIN | arrays() | tensors() | SCALARS, nested, max_leaves=8))
def test_every_value_comes_back_as_it_was(value: Any) -> None:
    assert same(through_a_file(value), value)


def test_parameters_and_views_come_back_as_tensors() -> None:
    matrix = torch.arange(12.0).reshape(3, 4)
    found = through_a_file({"p": torch.nn.Parameter(matrix), "gaps": matrix[:, ::2], "twice": matrix[:1].expand(2, 4)})
    assert [type(t) for t in found.values()] == [torch.Tensor] * 3
    assert torch.equal(found["gaps"], matrix[:, ::2])
    assert torch.equal(found["twice"], matrix[:1].expand(2, 4))
    conjugate = torch.tensor([1 + 2j], dtype=torch.complex64).conj()
    assert torch.equal(through_a_file(conjugate), conjugate.resolve_conj())


def test_a_module_s_state_keeps_the_versions_of_its_layers() -> None:
    state = torch.nn.BatchNorm1d(2).state_dict()
    assert through_a_file(state)._metadata == state._metadata
    assert state._metadata[""] == {"version": 2}


def itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ({"param_groups": [{"hook": print}]}, r"x\['param_groups'\]\[0\]\['hook'\] is a builtin_function_or_method"),
        ({object(): 1}, "a key of x is an object"),
        ((1, object()), r"x\[1\] is an object"),
        (np.array([object()]), "array of |O"),
        (np.zeros(2, ">f4"), "array of >f4"),
        (np.zeros(2, "c16"), "array of <c16"),
        (np.array(["a"]), "array of"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2).to_sparse(), "sparse"),
        (torch.empty(2, device="meta"), "tensor"),
        (itself(), "nested more than 64 deep"),
    ],
    ids=lambda v: type(v).__name__,
)
def test_what_cannot_be_held_is_named(value: Any, text: str) -> None:
    with pytest.raises(CannotHoldError, match=text):
        flatten(value, "x")


def test_bits_of_a_nan_are_kept() -> None:
    odd = struct.unpack("d", struct.pack("Q", 0xFFF8000000000123))[0]
    assert same(through_a_file([odd, -odd, math.inf]), [odd, -odd, math.inf])
