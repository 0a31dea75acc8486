"""What a script says of itself in its text: the settings that a run may set, and whether it can measure a model.

The daemon asks before there is a job, and a script that is run only to be asked would load its
model for it. So its text is read, and not executed.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from fedclient.trainer.api import Bounds
from fedclient.trainer.play import ScriptError

_PACKAGE = "fedclient.trainer"
_LIMITS = ("minimum", "maximum", "choices")


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a script's text says."""

    settings: type
    """A dataclass with a field for each `setting`, as `Workload.Settings`."""
    evaluates: bool
    """Whether `load` is given `evaluate`."""


def read_declared(script: Path) -> Declared:
    """Read a script.

    Raises:
        ScriptError: it cannot be read, has no `load` or no `save`, or its settings cannot be told from its text.
        SyntaxError: it is no Python.
    """
    try:
        tree = ast.parse(script.read_bytes(), str(script))
    except OSError as e:
        raise ScriptError(f"the script {script} cannot be read: {e.strerror}") from None
    calls = list(_calls(tree))
    evaluates = False
    fields: dict[str, tuple[Any, Any]] = {}
    for called, call in calls:
        if called == "load":
            given = [k.value for k in call.keywords if k.arg == "evaluate"] + call.args[1:]
            evaluates |= any(not (isinstance(v, ast.Constant) and v.value is None) for v in given)
        elif called == "setting":
            name, field = _setting(script, call)
            if fields.setdefault(name, field) != field:
                raise ScriptError(f"{script.name}, line {call.lineno}: setting {name!r} is given otherwise elsewhere")
    found = dataclasses.make_dataclass(
        "Settings", [(name, kind, default) for name, (kind, default) in fields.items()], frozen=True
    )
    return Declared(found, evaluates)


def _calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call of one of our functions, by its name here, however it was imported."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name] = alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            dotted, _, called = ast.unparse(node.func).rpartition(".")
            whole = f"{names.get(dotted, dotted)}.{called}" if dotted else names.get(called, "")
            package, _, function = whole.rpartition(".")
            if package == _PACKAGE:
                yield function, node


def _setting(script: Path, call: ast.Call) -> tuple[str, tuple[Any, Any]]:
    try:
        name, default = (ast.literal_eval(value) for value in call.args)
        limits: Mapping[str, Any] = {k.arg or "": ast.literal_eval(k.value) for k in call.keywords}
        if not isinstance(name, str) or not name.isidentifier() or not limits.keys() <= set(_LIMITS):
            raise ValueError  # noqa: TRY301 - one answer to all that cannot be read
        return name, _field(default, limits)
    except (ValueError, TypeError):
        raise ScriptError(
            f"{script.name}, line {call.lineno}: the server is told of a setting from the script's text; write it as "
            'setting("learning_rate", 1e-3), with a name and a default that are written out there'
        ) from None


def _field(default: Any, limits: Mapping[str, Any]) -> tuple[Any, Any]:
    """Type and default of a dataclass's field."""
    if isinstance(default, list | tuple):
        kinds = {type(item) for item in default}
        kind = float if kinds == {int, float} else kinds.pop() if len(kinds) == 1 else None
        if kind is None or limits:
            raise ValueError
        return tuple[kind, ...], tuple(kind(item) for item in default)  # type: ignore[valid-type]
    if type(default) not in (bool, int, float, str):
        raise TypeError
    if "choices" in limits:
        choices = tuple(limits["choices"])
        if default not in choices:
            raise ValueError
        return Literal[choices], default
    bounds = Bounds(limits.get("minimum"), limits.get("maximum"))
    return (type(default) if bounds == Bounds() else Annotated[type(default), bounds]), default
