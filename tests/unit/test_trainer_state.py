"""Tensors between models and files: every dtype and layout, in windows, with what may be left out left out."""

from __future__ import annotations

import os

import ml_dtypes
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays as np_arrays

from fedclient.trainer import state as state_module
from fedclient.trainer import torch_state as torch_state_module
from fedclient.trainer.files import Loader, ModelDirectory, write_model, write_update
from fedclient.trainer.layout import write_layout
from fedclient.trainer.state import ModelMismatchError, NumpyState, state_of, to_bfloat16
from fedclient.trainer.torch_state import TORCH_DTYPES, TorchState
from fedclient.trainer.wire import Write
from fedlink.tensors import DTYPES, Role, ShardWriter, Stored, TensorSpec, apply_metadata, read_header
from tests.support.trainers import arrays, describe_model, raw_tensors


def alive() -> None:
    pass


def wrote(path) -> None:
    assert path.stat().st_size


def directory_of(state, path) -> ModelDirectory:
    path.mkdir()
    write_model(state, path / "model.safetensors")
    describe_model(path, ["model.safetensors"])
    return ModelDirectory.read(path)


def update(state, model, out, write=Write.DELTA, dtype="F32", gradient=None):
    out.mkdir()
    return write_update(state, model, out, write=write, update_dtype=dtype, gradient=gradient, alive=alive, wrote=wrote)


class Holder(torch.nn.Module):
    def __init__(self, **tensors: torch.Tensor) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.nn.Parameter):
                self.register_parameter(name, tensor)
            else:
                self.register_buffer(name, tensor)


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@pytest.mark.parametrize("kind", ["matrix", "scalar", "empty", "strided"])
def test_torch_tensors_pass_bit_for_bit(tmp_path, dtype, kind):
    size = DTYPES[dtype].bits // 8
    shape = {"matrix": (3, 4), "scalar": (), "empty": (0, 4), "strided": (4, 3)}[kind]
    count = int(np.prod(shape))
    bits = np.random.default_rng(1).integers(0, 2 if dtype == "BOOL" else 256, count * size, np.uint8)
    flat = torch.from_numpy(bits).view(TORCH_DTYPES[dtype]) if count else torch.empty(0, dtype=TORCH_DTYPES[dtype])
    tensor = flat.reshape(shape) if kind != "strided" else flat.reshape(shape[::-1]).t()
    model = directory_of(TorchState(Holder(x=tensor)), tmp_path / "m")
    assert model.specs["x"] == TensorSpec("x", dtype, tuple(tensor.shape), Role.BUFFER)
    other = Holder(
        x=torch.zeros(tensor.shape[::-1], dtype=tensor.dtype).t() if kind == "strided" else flat.new_zeros(shape)
    )
    state = TorchState(other)
    Loader(state).load(model, "", alive)
    (path,) = update(state, model, tmp_path / "u", Write.WEIGHTS)
    _, data = raw_tensors(path)["x"]
    assert data == raw_tensors(tmp_path / "m" / "model.safetensors")["x"][1]
    logical = bits.reshape(*shape[::-1], size).swapaxes(0, 1) if kind == "strided" else bits
    assert data == logical.tobytes()


@pytest.mark.parametrize("write", list(Write))
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16"])
def test_windows_make_no_difference(tmp_path, monkeypatch, write, dtype):
    torch.manual_seed(0)
    net = torch.nn.Linear(7, 5).to(torch.bfloat16)
    state = TorchState(net)
    model = directory_of(state, tmp_path / "m")
    numpy_model = {name: array.copy() for name, array in arrays(tmp_path / "m" / "model.safetensors").items()}
    numpy_state = NumpyState(numpy_model)
    gradient = {
        name: np.random.default_rng(1).normal(size=a.shape).astype(np.float32) for name, a in numpy_model.items()
    }
    for name, parameter in net.named_parameters():
        parameter.data += torch.from_numpy(gradient[name]).to(torch.bfloat16)
        parameter.grad = torch.from_numpy(gradient[name]).to(torch.bfloat16)
        numpy_model[name] = numpy_model[name] + gradient[name].astype(ml_dtypes.bfloat16)
    rounded = {name: g.astype(ml_dtypes.bfloat16).astype(np.float32) for name, g in gradient.items()}
    whole = raw_tensors(*update(state, model, tmp_path / "whole", write, dtype))
    monkeypatch.setattr(state_module, "WINDOW", 3)
    monkeypatch.setattr(torch_state_module, "WINDOW", 3)
    assert raw_tensors(*update(state, model, tmp_path / "cut", write, dtype)) == whole
    assert raw_tensors(*update(numpy_state, model, tmp_path / "numpy", write, dtype, rounded)) == whole


@given(np_arrays(np.uint32, st.integers(1, 20), elements=st.integers(0, 2**32 - 1)))
def test_bfloat16_rounding_is_that_of_ml_dtypes(bits):
    values = bits.view(np.float32)
    found = to_bfloat16(values).view(ml_dtypes.bfloat16)
    with np.errstate(all="ignore"):
        wanted = values.astype(ml_dtypes.bfloat16)
    assert np.array_equal(np.isnan(found), np.isnan(wanted))
    assert np.array_equal(found[~np.isnan(values)].view(np.uint16), wanted[~np.isnan(values)].view(np.uint16))


def frozen_net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2).requires_grad_(False))


def two_shards(path) -> ModelDirectory:
    specs, _ = TorchState(frozen_net()).specs()
    path.mkdir()
    by_name, files = {s.name: s for s in specs}, []
    for name, role in (
        ("model-00001-of-00002.safetensors", Role.PARAMETER),
        ("model-00002-of-00002.safetensors", Role.FROZEN),
    ):
        part = [s for s in specs if s.role is role]
        with ShardWriter(path / name, part) as writer:
            for spec in part:
                writer.write(spec.name, np.full(spec.shape, 1 + len(part), np.float32).tobytes())
        files.append((name, [Stored(by_name[t.spec.name], t.offset) for t in writer.header.tensors]))
    write_layout(path, files, {}, ())
    return ModelDirectory.read(path)


class Counting(TorchState):
    def __init__(self, model) -> None:
        super().__init__(model)
        self.loaded: list[str] = []

    def assign(self, spec, names, fill) -> None:
        self.loaded.append(spec.name)
        super().assign(spec, names, fill)


def test_what_is_there_is_not_loaded_again(tmp_path):
    model = two_shards(tmp_path / "m")
    net = frozen_net()
    state = Counting(net)
    loader = Loader(state)

    def loaded(key: str) -> list[str]:
        state.loaded.clear()
        loader.load(model, key, alive)
        return sorted(state.loaded)

    everything = ["0.bias", "0.weight", "1.bias", "1.weight"]
    assert loaded("k") == everything
    assert loaded("k") == []
    assert loaded("other") == everything[:2], "frozen tensors are there already"
    loader.forget()
    assert loaded("other") == everything[:2], "training may have changed them where torch cannot see it"
    assert loaded("") == everything[:2]
    assert loaded("") == everything[:2], "without a key nothing is known"
    with torch.no_grad():
        net[1].weight += 1
    assert loaded("k") == everything, "somebody wrote to a frozen tensor"
    frozen = model.shards[1].path
    frozen.write_bytes(frozen.read_bytes())
    os.utime(frozen, ns=(1, 1))
    assert loaded("k") == everything[2:], "another file"
    assert torch.equal(net[1].weight, torch.full((2, 2), 3.0))


class Walked(torch.nn.Sequential):
    walks = 0

    def state_dict(self, *args, **kwargs):
        self.walks += 1
        return super().state_dict(*args, **kwargs)


def test_a_model_is_walked_through_as_often_however_many_tensors_it_has(tmp_path):
    walks = []
    for layers in (2, 20):
        net = Walked(*(torch.nn.Linear(2, 2) for _ in range(layers)))
        state = TorchState(net)
        model = directory_of(state, tmp_path / f"m{layers}")
        loader = Loader(state)
        net.walks = 0
        loader.load(model, "", alive)
        net[1] = torch.nn.Linear(2, 2)
        with torch.no_grad():
            net[1].weight.fill_(7)
        (path,) = update(state, model, tmp_path / f"u{layers}", Write.WEIGHTS)
        assert (arrays(path)["1.weight"] == 7).all(), "what training put there counts, not what was there before"
        walks.append(net.walks)
    assert walks[0] == walks[1]


def test_leftovers_of_a_job_are_undone():
    net = torch.nn.BatchNorm1d(2)
    net.register_buffer("scratch", torch.zeros(2), persistent=False)
    state = TorchState(net)
    net.scratch += 5
    net.weight.requires_grad_(False)
    net.weight.grad = torch.ones(2)
    net.eval()
    state.begin(training=True, device="cpu", frozen={"bias"})
    assert net.training
    assert net.weight.requires_grad
    assert not net.bias.requires_grad
    assert net.weight.grad is None
    assert net.scratch.tolist() == [0, 0]
    state.begin(training=False, device="cpu", frozen=())
    assert not net.training
    assert net.bias.requires_grad


def test_tied_tensors_are_one_and_stay_tied(tmp_path):
    weight = torch.nn.Parameter(torch.ones(3, 2))
    state = TorchState(Holder(a=weight, b=weight))
    specs, aliases = state.specs()
    assert [s.name for s in specs] == ["a"]
    assert aliases == {"b": "a"}
    model = directory_of(state, tmp_path / "m")
    shared = {"a": np.zeros((3, 2), np.float32)}
    shared["b"] = shared["a"]
    numpy_state = NumpyState(shared)
    Loader(numpy_state).load(model, "", alive)
    assert shared["a"] is shared["b"]
    assert shared["a"].sum() == 6
    shared["a"] += 1
    assert raw_tensors(*update(numpy_state, model, tmp_path / "u")).keys() == {"a"}


def test_views_of_one_storage_are_not_tied():
    base = torch.arange(6.0)
    specs, aliases = TorchState(Holder(a=base[:3], b=base[3:], c=base[:3].clone(), d=base[:2])).specs()
    assert len(specs) == 4
    assert aliases == {}


def test_first_model_s_metadata(tmp_path):
    model = directory_of(state_of(frozen_net()), tmp_path / "m")
    stored, _ = apply_metadata(read_header(tmp_path / "m" / "model.safetensors"))
    assert {t.spec.name: t.spec.role for t in stored} == {name: spec.role for name, spec in model.specs.items()}
    assert model.specs["1.weight"].role is Role.FROZEN
    assert not update(state_of(frozen_net().requires_grad_(False)), ModelDirectory((), {}), tmp_path / "none")


def test_gradients(tmp_path):
    net = torch.nn.Linear(2, 1).double()
    state = TorchState(net)
    model = directory_of(state, tmp_path / "m")
    net.weight.grad = torch.tensor([[1.0, 1e-9]], dtype=torch.float64)
    found = arrays(*update(state, model, tmp_path / "g", Write.GRADIENT, "BF16"))
    assert found["weight"].tolist() == [[1.0, 1e-9]]
    assert found["bias"].tolist() == [0.0]
    given = arrays(*update(state, model, tmp_path / "h", Write.GRADIENT, "F32", {"bias": torch.ones(1)}))
    assert given["weight"].tolist() == [[0.0, 0.0]]
    assert given["bias"].tolist() == [1.0]


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ([1], "build_model returned list"),
        ({"x": 1.0}, "not a numpy array"),
        ({1: np.zeros(1)}, "not a numpy array"),
    ],
)
def test_what_is_no_model(model, text):
    with pytest.raises(ModelMismatchError, match=text):
        state_of(model).specs()


def test_torch_models_that_cannot_travel():
    with pytest.raises(ModelMismatchError, match="dense tensor"):
        TorchState(Holder(x=torch.zeros(2, device="meta")))
    with pytest.raises(ModelMismatchError, match="cannot be trained"):
        TorchState(Holder(x=torch.nn.Parameter(torch.zeros(2, dtype=torch.complex64)))).specs()
    with pytest.raises(ModelMismatchError, match="cannot hold"):
        TorchState(Holder(x=torch.zeros(2, dtype=torch.complex128))).specs()


def test_training_may_not_change_dtype_or_shape(tmp_path):
    net = torch.nn.Linear(2, 2)
    state = TorchState(net)
    model = directory_of(state, tmp_path / "m")
    net.half()
    with pytest.raises(ModelMismatchError, match="after training"):
        update(state, model, tmp_path / "u")
    values = {"x": np.zeros(2, np.float32)}
    numpy_state = NumpyState(values)
    other = directory_of(numpy_state, tmp_path / "n")
    values["x"] = np.zeros(3, np.float32)
    with pytest.raises(ModelMismatchError, match="after training"):
        update(numpy_state, other, tmp_path / "v")
    del values["x"]
    with pytest.raises(ModelMismatchError, match="after training"):
        update(numpy_state, other, tmp_path / "w")


def test_gradient_of_another_shape(tmp_path):
    state = NumpyState({"x": np.zeros(2, np.float32)})
    model = directory_of(state, tmp_path / "m")
    with pytest.raises(ModelMismatchError, match="gradient"):
        update(state, model, tmp_path / "u", Write.GRADIENT, gradient={"x": np.zeros(3)})
    torch_state = TorchState(torch.nn.Linear(2, 2))
    model = directory_of(torch_state, tmp_path / "n")
    with pytest.raises(ModelMismatchError, match="gradient"):
        update(torch_state, model, tmp_path / "v", Write.GRADIENT, gradient={"bias": torch.zeros(3)})


def numbers(tmp_path, value: float) -> ModelDirectory:
    """A model of one array, `w`, of this value."""
    path = tmp_path / str(value)
    path.mkdir()
    spec = TensorSpec("w", "F32", (3, 2))
    with ShardWriter(path / "model.safetensors", [spec]) as writer:
        writer.write("w", np.full((3, 2), value, np.float32).tobytes())
    describe_model(path, ["model.safetensors"])
    return ModelDirectory.read(path)


@pytest.mark.parametrize("held", ["nothing", "itself", "a slice", "another name", "a read-only array", "another order"])
def test_an_array_is_loaded_in_place_only_if_nobody_else_holds_it(tmp_path, held):
    arrays = {"w": np.zeros((3, 2), np.float32)}
    state = NumpyState(arrays)
    loader = Loader(state)
    loader.load(numbers(tmp_path, 1), "", alive)
    if held == "a read-only array":
        arrays["w"].flags.writeable = False
    elif held == "another order":
        arrays["w"] = np.asfortranarray(arrays["w"])
    kept = {"itself": arrays["w"], "a slice": arrays["w"][1:], "another name": arrays["w"]}.get(held)
    if held == "another name":
        arrays["also"] = kept
        kept = arrays["also"]
    address = arrays["w"].ctypes.data
    loader.load(numbers(tmp_path, 2), "", alive)
    np.testing.assert_array_equal(arrays["w"], np.full((3, 2), 2, np.float32))
    assert (arrays["w"].ctypes.data == address) == (held == "nothing")
    if kept is not None:
        np.testing.assert_array_equal(kept, np.ones(kept.shape, np.float32))


@pytest.mark.parametrize("layout", ["plain", "transposed", "expanded"])
def test_torch_takes_its_values_whatever_its_layout(tmp_path, layout):
    net = torch.nn.Module()
    start = {"plain": torch.zeros(3, 2), "transposed": torch.zeros(2, 3).T, "expanded": torch.zeros(1).expand(1)}[
        layout
    ]
    net.w = torch.nn.Parameter(start)
    address = net.w.data_ptr()
    values = np.arange(start.numel(), dtype=np.float32).reshape(start.shape)

    def fill(view: memoryview, at: int) -> None:
        view[:] = values.tobytes()[at : at + len(view)]

    TorchState(net).assign(TensorSpec("w", "F32", tuple(start.shape)), ["w"], fill)
    assert net.w.data_ptr() == address
    np.testing.assert_array_equal(net.w.detach().numpy(), values)
