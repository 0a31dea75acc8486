"""The small float formats by their definitions, for checking arithmetic that was made elsewhere."""

from __future__ import annotations

import math
from bisect import bisect_left
from functools import cache

from fedlink.tensors import DTYPES

LAYOUT = {"F16": (5, 10), "BF16": (8, 7), "F8_E4M3": (4, 3), "F8_E5M2": (5, 2)}


def value_of(bits: int, dtype: str) -> float:
    """What a bit pattern means, by the definition of the format."""
    exponent_bits, fraction_bits = LAYOUT[dtype]
    fraction = bits & ((1 << fraction_bits) - 1)
    exponent = bits >> fraction_bits & ((1 << exponent_bits) - 1)
    sign = -1.0 if bits >> (exponent_bits + fraction_bits) else 1.0
    bias = (1 << (exponent_bits - 1)) - 1
    top = exponent == (1 << exponent_bits) - 1
    if dtype == "F8_E4M3" and top and fraction == 7:
        return math.nan
    if dtype != "F8_E4M3" and top:
        return math.nan if fraction else sign * math.inf
    if exponent == 0:
        return sign * math.ldexp(fraction, 1 - bias - fraction_bits)
    return sign * math.ldexp((1 << fraction_bits) + fraction, exponent - bias - fraction_bits)


@cache
def positive(dtype: str) -> list[float]:
    """The finite positive values in order; the index is the bit pattern."""
    values = (value_of(bits, dtype) for bits in range(1 << (DTYPES[dtype].bits - 1)))
    return [v for v in values if math.isfinite(v)]


def nearest(x: float, dtype: str) -> float:
    """The nearest value of the format, ties to the even bit pattern."""
    values = positive(dtype)
    at = bisect_left(values, abs(x))
    if at == 0:
        return math.copysign(values[0], x)
    low, high = at - 1, at
    if abs(x) - values[low] == values[high] - abs(x):
        best = low if low % 2 == 0 else high
    else:
        best = low if abs(x) - values[low] < values[high] - abs(x) else high
    return math.copysign(values[best], x)
