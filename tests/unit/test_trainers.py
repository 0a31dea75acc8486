"""Which trainer processes a site keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fedclient.agent import Trainers
from fedclient.launch import Description, Device, FailReason, TrainerFailed
from fedclient.settings import SiteSettings
from fedlink.errors import FedlinkError

SCHEMA = {"type": "object", "additionalProperties": False, "properties": {}}
GPU = Device("cuda:0", "some GPU", 80 << 30)
CPU = Device("cpu")


class Stand:
    """Stands for a trainer on a machine with an accelerator, which the test machine lacks."""

    def __init__(self, site: SiteSettings, workload: str, device: str, runtime_dir: Path) -> None:
        self.workload, self.device, self.closed = workload, device, False

    async def describe(self) -> Description:
        if self.workload == "broken":
            raise TrainerFailed(FailReason.EXCEPTION, "it cannot be used", output="no module named x\nlog\nlog")
        return Description(SCHEMA, ("train",), (CPU, GPU) if self.device == "cpu" else (GPU, CPU))

    async def close(self) -> None:
        self.closed = True


def trainers(devices: list[str], workloads: tuple[str, ...] = ("a", "b")) -> Trainers:
    table: dict[str, Any] = {"name": "site", "devices": devices}
    table["workload"] = {name: {"trainer": "m:C"} for name in workloads}
    return Trainers(SiteSettings.checked(table, "test"), Stand)  # type: ignore[arg-type]


async def test_auto_is_told_as_what_it_stands_for() -> None:
    _, devices = await trainers(["auto"]).describe()
    assert [(d.name, d.memory_bytes) for d in devices] == [("cuda:0", 80 << 30)]


async def test_configured_devices_are_told() -> None:
    terms, devices = await trainers(["cpu", "cuda:0", "cuda:7"]).describe()
    assert [d.name for d in devices] == ["cpu", "cuda:0", "cuda:7"]
    assert devices[1].model == "some GPU"
    assert sorted(terms) == ["a", "b"]


@pytest.mark.parametrize(("device", "stays"), [("cpu", True), ("auto", False)])
async def test_another_workload_leaves_an_accelerator_first(device: str, stays: bool) -> None:
    pool = trainers([device])
    await pool.describe()
    first = await pool.get("a", device)
    assert await pool.get("a", device) is first
    await pool.get("b", device)
    assert first.closed != stays  # type: ignore[attr-defined]
    assert (await pool.get("a", device) is first) == stays


async def test_a_class_that_cannot_be_used_is_named() -> None:
    with pytest.raises(FedlinkError, match=r"it cannot be used: no module named x$"):
        await trainers(["cpu"], ("a", "broken")).describe()
