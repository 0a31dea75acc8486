"""Raw little-endian bytes to float64 and back, and what no tensor may hold."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from fedlink.tensors import DTYPES, arithmetic_dtype
from fedserver.aggregation.pipeline import Window

Raw = npt.NDArray[np.uint8]
"""Bytes of whole elements; aligned for the widest dtype."""

# A number is NaN or infinite where all of these bits are set (E4M3 and E8M0 have no infinity).
_NOT_FINITE = {"F16": 0x7C00, "BF16": 0x7F80, "F8_E5M2": 0x7C, "F8_E4M3": 0x7F, "F8_E8M0": 0xFF}
_BY_WAY_OF_FLOAT32 = ("BF16", "F8_E4M3", "F8_E5M2")


def sound(raw: Raw, dtype: str) -> bool:
    """Whether all elements are finite (floating and complex dtypes) or 0 and 1 (BOOL); true for other dtypes."""
    if dtype in _NOT_FINITE:
        mask = _NOT_FINITE[dtype]
        return not bool(((raw.view(DTYPES[dtype].raw) & mask) == mask).any())
    if dtype in ("F32", "C64"):
        return bool(np.isfinite(raw.view("<f4")).all())
    if dtype == "F64":
        return bool(np.isfinite(raw.view("<f8")).all())
    return dtype != "BOOL" or not bool((raw > 1).any())


def decode(raw: Raw, dtype: str, out: Window) -> None:
    """Read elements of a floating dtype as float64, exactly."""
    with np.errstate(invalid="ignore"):
        np.copyto(out, raw.view(arithmetic_dtype(dtype)), casting="unsafe")


def encode(values: Window, dtype: str, out: Raw) -> None:
    """Write float64 as elements of a floating dtype, rounded once, ties to even; too large becomes inf or NaN."""
    target: npt.NDArray[Any] = out.view(arithmetic_dtype(dtype))
    with np.errstate(over="ignore", invalid="ignore"):
        # ml_dtypes goes through float32 and so would round twice.
        narrowed = _float32_to_odd(values) if dtype in _BY_WAY_OF_FLOAT32 else values
        np.copyto(target, narrowed, casting="unsafe")


def _float32_to_odd(values: Window) -> npt.NDArray[np.float32]:
    """To float32, inexact values to the neighbour with an odd last bit: rounding that to any narrower dtype is exact.

    See S. Boldo, G. Melquiond, "When double rounding is odd", 2005.
    """
    near = values.astype(np.float32)
    wrong = (near != values) & ((near.view(np.uint32) & 1) == 0)
    if wrong.any():
        side = np.where(values > near, np.float32(np.inf), np.float32(-np.inf))
        near = np.where(wrong, np.nextafter(near, side), near)
    return near
