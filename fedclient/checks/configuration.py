"""Check "config": the files that site.toml names are there and are nobody else's to read."""

from __future__ import annotations

import importlib.util
import os
import sys

from fedclient.aside import off_loop
from fedclient.checks.examination import Examination
from fedclient.checks.finding import Finding, failed, ok, together
from fedclient.session import credentials
from fedclient.spool import in_use
from fedlink.errors import FedlinkError


async def check_configuration(visit: Examination) -> Finding:
    """site.toml was read; look at what it refers to."""
    return await off_loop(_look, visit)


def _look(visit: Examination) -> Finding:
    unusable = [problem for name in visit.site.workload for problem in _workload(visit, name)]
    visit.loadable = not unusable
    if problems := [*_secrets(visit), *unusable]:
        return together(problems)
    count = len(visit.site.workload)
    found = f"{visit.config}: site {visit.site.name}, {count} workload{'s' if count > 1 else ''}"
    running = "; a daemon is running with it, and goes on" if in_use(visit.site.state_dir) else ""
    return ok(found + running)


def _secrets(visit: Examination) -> list[Finding]:
    problems = []
    try:
        credentials(visit.site)
    except FedlinkError as e:
        problems.append(failed(e.message, "Put the token that `fedserver client add` printed there, with mode 600."))
    tls = visit.site.client_tls
    try:
        if tls:
            tls.check()
    except FedlinkError as e:
        problems.append(failed(e.message, "Correct [tls] in site.toml, or the file that it names."))
    return problems


def _workload(visit: Examination, name: str) -> list[Finding]:
    python = visit.site.interpreter(name)
    if not python.is_file() or not os.access(python, os.X_OK):
        advice = f"Set python in [workload.{name}] to an interpreter, or leave it out for the daemon's own."
        return [failed(f"workload {name}: {python} is no program", advice)]
    settings = visit.site.workload[name]
    if settings.model and not (model := visit.site.directory / settings.model).is_dir():
        advice = f"Put the model there, or correct model in [workload.{name}]."
        return [failed(f"workload {name}: there is no directory {model}", advice)]
    return [] if settings.built_in else _code(visit, name)


def _code(visit: Examination, name: str) -> list[Finding]:
    """The class's module, or the script."""
    trainer = visit.site.workload[name].trainer
    if visit.site.workload[name].script:
        script = visit.site.directory / trainer
        advice = f"Put the script there, or correct trainer in [workload.{name}]."
        return [] if script.is_file() else [failed(f"workload {name}: there is no script {script}", advice)]
    module = trainer.partition(":")[0].partition(".")[0]
    beside = visit.site.directory / module
    if beside.is_dir() or beside.with_suffix(".py").is_file():
        return []
    # Another Python's packages cannot be looked at from here; the check of the workloads loads the class.
    if visit.site.workload[name].python is None and not _installed(module):
        advice = f"Put {module}.py beside site.toml, or install the package for {sys.executable}."
        return [failed(f"workload {name}: there is no module {module} beside site.toml or installed", advice)]
    return []


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:
        return False
