"""A bfloat16 model with tied, frozen and integer tensors, through real processes, whatever travels."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.support.classes.halves import FROZEN, Halves
from tests.support.federation import Federation, call

pytestmark = pytest.mark.slow

SITES = {"a": (2.0**-6, 1), "b": (0.0, 7)}
"""What each site adds in a round, and its examples."""
ROUNDS = 4
MEAN = 2.0**-9
"""What a round adds on average: a quarter of what bfloat16 can tell from 1."""
FROZEN_BYTES = 4 * FROZEN[0] * FROZEN[1]


@pytest.mark.timeout(240)
def test_a_bfloat16_model(federation: Federation) -> None:
    sites = [
        federation.site(name, "halves:Training", data={"step": step, "examples": examples})
        for name, (step, examples) in SITES.items()
    ]
    init = federation.root / "init.safetensors"
    call("fedclient", "init-model", "work", "--config", str(sites[0].config), "--seed", "1", "-o", str(init))
    federation.call("model", "import", str(init))
    start = federation.export("init")
    assert "embed.weight" in start
    assert "head.weight" not in start, "a tied tensor travels once"

    for dtype in ("bfloat16", "float16"):
        keep = {"keep_versions": 9}
        federation.create_run(dtype, workload="work", model="init", rounds=ROUNDS, update_dtype=dtype, retention=keep)
        events = federation.finish(dtype)
        assert [e["data"]["metrics"] for e in events if e["kind"] == "version_evaluated"][-1] == {"accuracy": 1.0}
        for version in range(1, ROUNDS + 1):
            got = federation.export(f"{dtype}@{version}")
            assert {n: (x.dtype, x.shape) for n, x in got.items()} == {n: (x.dtype, x.shape) for n, x in start.items()}
            # The float32 master keeps what a bfloat16 cannot hold: the weight moves at the third round.
            weight = np.float32(1 + version * MEAN).astype(ml_dtypes.bfloat16)
            assert (got["embed.weight"] == weight).all(), version
            np.testing.assert_array_equal(got["scale"], np.full(3, 1 - version * MEAN, np.float32))
            np.testing.assert_array_equal(got["base"], start["base"])
            # Integers and booleans come from the site with most examples; floating buffers are averaged.
            assert got["seen"] == 7 * version
            np.testing.assert_array_equal(got["mask"], [True, False])
            np.testing.assert_array_equal(got["running"], np.full(2, (1 * 1 + 7 * 7) / 8, np.float32))
        assert weight != 1

        rounds = federation.json("round", "list", dtype)
        assert all(0 < r["bytes_up"] < FROZEN_BYTES / 10 for r in rounds), "what is frozen is never sent"
        down = [r["bytes_down"] for r in rounds]
        # Each site fetches it once in its life, and the second run starts from the same.
        fetched = 2 * FROZEN_BYTES if dtype == "bfloat16" else 0
        assert fetched < down[0] < fetched + FROZEN_BYTES / 10
        assert all(0 < d < FROZEN_BYTES / 10 for d in down[1:])

    model, tensors = Halves(), {}
    for file in (federation.root / "exports" / "float16@4").glob("*.safetensors"):
        tensors |= load_file(file)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert (missing, unexpected) == (["head.weight"], [])
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, torch.full((4, 8), 1 + 2.0**-7, dtype=torch.bfloat16))
