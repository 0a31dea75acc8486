"""A real trainer process with a torch model that holds every awkward kind of tensor."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
import pytest_asyncio
import torch
from safetensors.torch import load_file, load_model, save_model

from fedclient.launch import TrainerFailed, Write
from fedclient.trainer.api import derive_seed
from fedlink.tensors import Role
from tests.support.classes.nets import Net
from tests.support.trainers import (
    arrays,
    describe_model,
    evaluate,
    init,
    make_site,
    make_trainer,
    model_files,
    raw_tensors,
    role,
    train,
)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    return make_site(tmp_path_factory.mktemp("site"), "nets:Nets", stall_after=100.0)


# Importing torch takes longer than any test here: one process serves them, and one loop, which it is bound to.
pytestmark = [pytest.mark.slow, pytest.mark.asyncio(loop_scope="module"), pytest.mark.xdist_group("trainer-torch")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def trainer(site):
    trainer = make_trainer(site)
    yield trainer
    await trainer.close()


def built(seed: int) -> Net:
    torch.manual_seed(seed)
    return Net()


async def test_first_model_is_the_class_at_that_seed(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model", seed=42)
    file, net = model / "model.safetensors", built(42)
    state = net.state_dict()
    found = load_file(file)
    assert found.keys() == state.keys() - {"head.weight"}, "a tied tensor travels once"
    for name, tensor in found.items():
        assert tensor.dtype == state[name].dtype
        assert torch.equal(tensor.view(-1).view(torch.uint8), state[name].contiguous().view(-1).view(torch.uint8)), name
    assert json.loads((model / "model.json").read_text())["aliases"] == {"head.weight": "embed.weight"}
    roles = {
        name: role(model, name) for name in ("embed.weight", "norm.running_mean", "frozen.weight", "table", "mask")
    }
    assert list(roles.values()) == [Role.PARAMETER, Role.BUFFER, Role.FROZEN, Role.BUFFER, Role.BUFFER]
    other = built(1)
    load_model(other, file)
    assert torch.equal(other.head.weight, net.embed.weight)


async def test_update_holds_all_but_frozen_and_is_exact(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    before = arrays(*model_files(model))
    weights = await train(trainer, model, tmp_path / "y", write=Write.WEIGHTS)
    delta = await train(trainer, model, tmp_path / "d")
    after, change = arrays(*weights.files), arrays(*delta.files)
    assert before.keys() - change.keys() == {"frozen.weight", "frozen.bias"}
    for name in ("embed.weight", "strided", "scale", "nothing", "small"):
        assert change[name].dtype == np.float32
        assert np.array_equal(change[name], after[name].astype(np.float32) - before[name].astype(np.float32)), name
        assert name == "nothing" or change[name].any(), name
    assert change["unused"].dtype == np.float64
    assert not change["unused"].any()
    for name in ("norm.running_mean", "norm.num_batches_tracked", "table", "mask"):
        assert change[name].dtype == after[name].dtype
        assert change[name].tobytes() == after[name].tobytes()
    assert change["norm.num_batches_tracked"] == 4
    assert change["table"].dtype == ml_dtypes.float8_e4m3fn
    assert delta.metrics["loss"] > 0
    assert delta.num_examples == 24


async def test_bfloat16_delta_is_rounded_once(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    full = arrays(*(await train(trainer, model, tmp_path / "f")).files)
    small = arrays(*(await train(trainer, model, tmp_path / "s", update_dtype="BF16")).files)
    assert small["embed.weight"].tobytes() == full["embed.weight"].astype(ml_dtypes.bfloat16).tobytes()
    assert small["unused"].dtype == np.float64


async def test_warm_and_fresh_processes_give_the_same_bits(site, trainer, tmp_path):
    warm, fresh = trainer, make_trainer(site)
    try:
        model = await init(warm, tmp_path / "model")
        first = await train(warm, model, tmp_path / "0", round=1)
        with pytest.raises(TrainerFailed):
            await train(warm, model, tmp_path / "x", settings={"steps": -1, "learning_rate": "no"})
        seen = await evaluate(warm, model, tmp_path / "e", version=1, model_key="k")
        again = await evaluate(warm, model, tmp_path / "e", version=1, model_key="k")
        a = await train(warm, model, tmp_path / "a", round=2, model_key="k")
        b = await train(fresh, model, tmp_path / "b", round=2)
        repeat = await train(warm, model, tmp_path / "r", round=1)
        assert raw_tensors(*a.files) == raw_tensors(*b.files)
        assert raw_tensors(*repeat.files) == raw_tensors(*first.files)
        assert raw_tensors(*a.files) != raw_tensors(*first.files)
        assert seen.metrics == again.metrics == (await evaluate(fresh, model, tmp_path / "e", version=1)).metrics
    finally:
        await fresh.close()


async def test_gradient_is_that_of_the_mean_loss(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model", seed=3)
    result = await train(trainer, model, tmp_path / "g", write=Write.GRADIENT, seed=3)
    found = arrays(*result.files)
    net = built(3)
    # Dropout draws after the seeding the runtime does; the same here.
    torch.manual_seed(derive_seed(3, "site-1", 1))
    tokens = torch.arange(24) % 6
    torch.nn.functional.cross_entropy(net(tokens), (tokens * 5 + 1) % 6).backward()
    for name, parameter in net.named_parameters():
        if parameter.requires_grad:
            wanted = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            wanted = wanted.to(torch.float64 if name == "unused" else torch.float32)
            # To rounding: another process may add in another order, by its threads and by where its memory lies.
            np.testing.assert_allclose(found[name], wanted, rtol=1e-5, atol=1e-7, err_msg=name)
    assert found["norm.num_batches_tracked"] == 1


async def test_a_file_with_tied_names_left_out_loads(trainer, tmp_path):
    (tmp_path / "model").mkdir()
    save_model(built(9), str(tmp_path / "model" / "model.safetensors"))
    describe_model(tmp_path / "model", ["model.safetensors"])
    assert (await evaluate(trainer, tmp_path / "model", tmp_path / "e")).num_examples == 24


async def test_frozen_by_the_run_stays_frozen(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    table = json.loads((model / "model.json").read_text())
    table["roles"]["strided"] = "frozen"
    (model / "model.json").write_text(json.dumps(table))
    names = arrays(*(await train(trainer, model, tmp_path / "u", write=Write.WEIGHTS)).files).keys()
    assert "strided" not in names
    table["roles"]["strided"] = "parameter"
    (model / "model.json").write_text(json.dumps(table))
    assert arrays(*(await train(trainer, model, tmp_path / "v")).files)["strided"].any()


async def test_a_run_that_ties_what_the_class_does_not(trainer, tmp_path):
    model = await init(trainer, tmp_path / "model")
    table = json.loads((model / "model.json").read_text())
    table["aliases"]["small"] = "scale"
    (model / "model.json").write_text(json.dumps(table))
    with pytest.raises(TrainerFailed) as caught:
        await train(trainer, model, tmp_path / "u")
    assert "does not" in caught.value.output


async def test_seed_of_the_run_decides_what_is_built(trainer, tmp_path):
    a = await init(trainer, tmp_path / "a", seed=1)
    b = await init(trainer, tmp_path / "b", seed=2)
    c = await init(trainer, tmp_path / "c", seed=1)
    assert raw_tensors(*model_files(a)) == raw_tensors(*model_files(c))
    assert raw_tensors(*model_files(a)) != raw_tensors(*model_files(b))
