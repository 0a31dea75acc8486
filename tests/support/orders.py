"""Tasks as the daemon keeps them."""

from __future__ import annotations

from typing import Any

from fedclient.spool import Order
from fedlink.tensors import Kind


def order(token: bytes = b"token", **fields: Any) -> Order:
    values: dict[str, Any] = {
        "token": token,
        "run": "r1",
        "round": 3,
        "attempt": 1,
        "workload": "heart",
        "version": 2,
        "model_digest": bytes(range(32)),
        "model_size": 100,
        "settings_json": '{"rate": 1}',
        "seed": 2**62,
        "update": Kind.DELTA,
        "update_dtype": "F32",
        "max_update_bytes": 10,
    }
    return Order(**{**values, **fields})
