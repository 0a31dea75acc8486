"""Which objects lie where in containers: what the user's code holds of them besides must be theirs after a resume, too.

The user's code may take an array out of the model's dict, or out of one that is kept, and
change it in place; or hold the old one while another is put in its place. So equal values
are not enough. A checkpoint also says which places have got another object since the loop
began. A job that goes on moves its objects in the same way, and gives them their values in place.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import weakref
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from fedclient.trainer.nested import MAX_DEPTH, flatten

Path = tuple[Any, ...]
"""The keys and indices that lead to a place; the first is the name of a root."""
Moves = Sequence[tuple[Path, Path | None]]
"""Places that have got another object, outer ones first, and where it lay before; None: it is a new one."""
Change = tuple[Moves, Sequence[tuple[Path, Path]]]
"""What has been moved, and after that: places where an object lies that also lies at an earlier one, and that one."""
NO_CHANGE: Change = ([], [])
_MAPPINGS = (dict, OrderedDict, Counter)
_CHANGEABLE = (*_MAPPINGS, list, deque, set)


class Snapshot:
    """Where every object lay that can be changed in place.

    Args:
        roots: containers, arrays and tensors by name.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self._roots = dict(roots)
        self._before = {path: _reference(thing) for path, thing in places(self._roots)}

    def change(self) -> Change:
        """What has changed since."""
        return self._moves(), shared(self._roots)

    def _moves(self) -> Moves:
        was: dict[int, Path] = {}
        for path, reference in self._before.items():
            if (thing := reference()) is not None:
                was.setdefault(id(thing), path)
        return [
            (path, was.get(id(thing)))
            for path, thing in places(self._roots)
            if path not in self._before or self._before[path]() is not thing
        ]


def places(holder: Any, path: Path = (), seen: set[int] | None = None) -> Iterator[tuple[Path, Any]]:
    """The objects in a container that can be changed in place, each at every place where it lies."""
    seen = set() if seen is None else seen
    for key, item in _items(holder) if len(path) <= MAX_DEPTH else ():
        at = (*path, key)
        if type(item) is tuple:
            yield from places(item, at, seen)
        elif type(item) in _CHANGEABLE or _is_leaf(item):
            yield at, item
            if id(item) not in seen:
                seen.add(id(item))
                yield from places(item, at, seen)


def shared(roots: Mapping[str, Any]) -> list[tuple[Path, Path]]:
    """Places where an object lies that also lies at an earlier one, and that one."""
    first: dict[int, Path] = {}
    found = [(path, first.setdefault(id(thing), path)) for path, thing in places(roots)]
    return [(path, earlier) for path, earlier in found if path != earlier]


def change(roots: Mapping[str, Any], what: Change) -> None:
    """Do what `Snapshot.change` told: an object that is new becomes a copy of what is there.

    Raises:
        LookupError, TypeError: the containers have not the places that objects were moved to.
    """
    moves, pairs = what
    before = dict(places(roots))
    for path, origin in moves:
        if origin is None and path in before:
            _put(roots, path, _copy(before[path]))
        elif origin is not None and origin in before:
            _put(roots, path, before[origin])
    share(roots, pairs)


def share(roots: Mapping[str, Any], pairs: Iterable[tuple[Path, Path]]) -> None:
    """Let the same object lie at two places, as `shared` told, where there are such places."""
    for path, earlier in pairs:
        with contextlib.suppress(LookupError, TypeError):
            if (thing := _get(roots, earlier)) is not _get(roots, path):
                _put(roots, path, thing)


def bring_back(now: Any, value: Any) -> Any:
    """Give what is there another value, in place as far as it goes.

    Returns:
        What is to lie there: `now` if it could be given the value, else one that is new.
    """
    kind = type(now)
    if _is_leaf(now) and _is_leaf(value):
        return _fill(now, value)
    if kind is not type(value):
        return value
    if kind in _MAPPINGS:
        items = {key: bring_back(now[key], item) if key in now else item for key, item in value.items()}
        now.clear()
        now.update(items)
    elif kind is list or (kind is deque and now.maxlen == value.maxlen):
        new = [*_each(now, value), *list(value)[len(now) :]]
        now.clear()
        now.extend(new)
    elif kind is tuple and len(now) == len(value):
        return tuple(_each(now, value))
    elif kind is set:
        now.clear()
        now.update(value)
    else:
        return value
    return now


def _each(now: Iterable[Any], value: Iterable[Any]) -> list[Any]:
    return [bring_back(old, item) for old, item in zip(now, value, strict=False)]


def _fill(now: Any, value: Any) -> Any:
    # Nodes and leaves say all there is besides the bytes: kind, dtype, shape, layout, device.
    a, b = flatten(now, ""), flatten(value, "")
    if (a.node, [(x.dtype, x.shape) for x in a.leaves]) != (b.node, [(x.dtype, x.shape) for x in b.leaves]):
        return value
    if isinstance(now, np.ndarray):
        if not now.flags.writeable:
            return value
        np.copyto(now, value)
    else:
        from fedclient.trainer.torch_state import copy_tensor  # noqa: PLC0415 - imports torch

        copy_tensor(now, value)
    return now


def _items(holder: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(holder, Mapping):
        return holder.items()
    return enumerate(holder) if isinstance(holder, list | tuple | deque) else ()


def _is_leaf(thing: Any) -> bool:
    torch = sys.modules.get("torch")
    return isinstance(thing, np.ndarray) or (torch is not None and isinstance(thing, torch.Tensor))


def _reference(thing: Any) -> Callable[[], Any]:
    # What an array held is free once it is replaced; dicts and lists cannot be referred to weakly.
    return weakref.ref(thing) if _is_leaf(thing) else lambda: thing


def _copy(thing: Any) -> Any:
    if isinstance(thing, np.ndarray) or not _is_leaf(thing):
        return copy.copy(thing)
    return thing.detach().clone().requires_grad_(thing.requires_grad)


def _get(holder: Any, path: Path) -> Any:
    for key in path:
        holder = holder[key]
    return holder


def _put(roots: Any, path: Path, thing: Any) -> None:
    *above, key = path
    holder = _get(roots, tuple(above))
    if isinstance(holder, tuple):
        _put(roots, tuple(above), (*holder[:key], thing, *holder[key + 1 :]))
        return
    if isinstance(holder, list | deque):
        holder.extend([None] * (key + 1 - len(holder)))
    holder[key] = thing
