"""A module built without memory for its parameters: what they hold is read from files afterwards."""

from __future__ import annotations

import weakref
from typing import Any, Self

import torch
from torch.nn.modules.module import register_module_parameter_registration_hook

_active: list[WithoutValues] = []


class WithoutValues:
    """Around the building of a module: each parameter loses its values, and its memory, once it is registered.

    Buffers stay: they are small, and what computes them is known to the module alone.
    """

    def __init__(self) -> None:
        self._seen: dict[int, tuple[Any, torch.nn.Parameter]] = {}
        self._hook: Any = None

    def __enter__(self) -> Self:
        """Begin."""
        self._hook = register_module_parameter_registration_hook(self._registered)
        _active.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Build as ever from now on."""
        _active.remove(self)
        self._hook.remove()

    def _registered(self, _module: object, _name: str, parameter: torch.nn.Parameter | None) -> Any:
        if parameter is None or parameter.is_meta:
            return None
        # One that is registered twice is tied, and stays so.
        held, empty = self._seen.get(id(parameter), (None, None))
        if held is None or held() is not parameter:
            empty = torch.nn.Parameter(parameter.detach().to("meta"), requires_grad=parameter.requires_grad)
            self._seen[id(parameter)] = weakref.ref(parameter), empty
        return empty


def is_active() -> bool:
    """Whether a module that is built now is to have no values."""
    return bool(_active)
