"""Checks "workloads" and "device": each class loads under its own Python, and what it computes on."""

from __future__ import annotations

import os
from pathlib import Path

from fedclient.aside import off_loop
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, skipped, together, warning
from fedclient.launch import Device, TrainerFailed
from fedclient.policy import Terms
from fedlink.errors import FedlinkError

_ABOUT_CODE = frozenset(
    ("AttributeError", "ImportError", "IndentationError", "ModuleNotFoundError", "NameError", "SyntaxError")
) | {"WorkloadError", "ScriptError", "SettingsError"}
"""Exceptions whose message is about a module; others may quote data."""
_NVIDIA = Path("/dev/nvidia0")


async def check_workloads(visit: Examination) -> Finding:
    """Start each workload's process, as the daemon does, and let it describe itself."""
    if not visit.loadable:
        return skipped("needs config, which failed")
    return together([await _described(visit, name) for name in visit.site.workload])


async def check_device(visit: Examination) -> Finding:
    """What `devices` stand for."""
    descriptions = list(visit.descriptions.values())
    seen = {device.name: device for d in descriptions for device in d.devices}
    findings = []
    for i, configured in enumerate(visit.site.devices):
        # The trainer was given the first one, and says first what that stands for.
        device = descriptions[0].devices[0] if i == 0 else seen.get(configured, Device(configured))
        findings.append(_judged(configured, device))
    if await off_loop(_NVIDIA.exists) and not any(name.startswith("cuda") for name in seen):
        findings.append(
            warning(
                "this machine has an NVIDIA GPU, but no workload's Python sees it",
                "If the class uses torch, install the build of torch for CUDA, and look at `nvidia-smi`.",
            )
        )
    return together(findings)


async def _described(visit: Examination, name: str) -> Finding:
    settings = visit.site.workload[name]
    trainer = visit.trainer(name)
    try:
        description = await trainer.describe()
        terms = Terms.of(name, settings, description)
    except FedlinkError as e:
        return failed(e.message, f"Correct [workload.{name}] in site.toml.")
    except TrainerFailed as e:
        if e.own_words:
            return failed(f"{name}: {e.own_words}", f"Correct that, or [workload.{name}] in site.toml.")
        said = e.output.strip().partition("\n")[0] if e.exception_class in _ABOUT_CODE else ""
        python = visit.site.interpreter(name)
        return failed(
            f"{e.message}{': ' if said else ''}{said}",
            f"It was loaded by {python} from {visit.site.directory}; its output is in {trainer.log_path}.",
        )
    finally:
        if len(visit.site.workload) > 1:
            await visit.end_trainer(name)
    visit.descriptions[name] = description
    known = ", ".join(terms.schema.properties) or "none"
    return ok(f"{name}: {settings.trainer} can {', '.join(description.abilities)}; settings: {known}")


def _judged(configured: str, device: Device) -> Finding:
    resolved = device.name if device.name == configured else f"{configured} is {device.name}"
    if device.name == "cpu":
        return ok(f"{resolved}, {os.cpu_count()} cores, {machine_memory() / 1e9:.1f} GB of memory")
    if device.name.startswith("cuda") and not device.memory_bytes:
        return warning(
            f"{device.name} is not seen by the workloads' Python",
            "Correct devices in site.toml, or install the build of torch for CUDA; `nvidia-smi` lists the GPUs.",
        )
    memory = f", {device.memory_bytes / 1e9:.1f} GB of memory" if device.memory_bytes else ""
    return ok(f"{resolved}{f' ({device.model})' if device.model else ''}{memory}")


def machine_memory() -> int:
    """Bytes of memory that processes here may use, in a container its limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        limit = Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii").strip()
    except OSError:
        return total
    return min(total, int(limit)) if limit.isdigit() else total
