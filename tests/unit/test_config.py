"""Configuration: what a person writes, and what is said of what it cannot mean."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import Field

from fedlink.config import Bytes, Config, Seconds, parse_rate
from fedlink.errors import FedlinkError, Reason


class Inner(Config):
    term: Seconds = 1.0


class Made(Config):
    term: Seconds = Field(30.0, ge=1)
    limit: Bytes = 0
    inner: Inner = Inner()


@pytest.mark.parametrize(
    ("term", "seconds"),
    [("30s", 30.0), ("10m", 600.0), ("1.5h", 5400.0), ("2d", 172800.0), (" 2500ms ", 2.5), ("45", 45.0), (7, 7.0)],
)
def test_durations(term: Any, seconds: float) -> None:
    assert Made.checked({"term": term}, "x").term == seconds


@pytest.mark.parametrize(("limit", "size"), [("512MB", 512_000_000), ("20 GiB", 20 << 30), (5, 5)])
def test_sizes(limit: Any, size: int) -> None:
    assert Made.checked({"limit": limit}, "x").limit == size


@pytest.mark.parametrize(
    ("text", "rate"),
    [("100mbit", 10**8), ("2.5 Gbit/s", 2_500_000_000), (" 56kbps", 56_000), ("800 bit", 800), ("1Tbit", 10**12)],
)
def test_speeds_of_lines(text: str, rate: int) -> None:
    assert parse_rate(text) == rate


@pytest.mark.parametrize("text", ["", "fast", "100", "10MB/s", "0mbit", "-1mbit", "1 e9 bit", "100000000tbit"])
def test_what_is_no_speed_is_told_with_what_to_write(text: str) -> None:
    with pytest.raises(ValueError, match='is no speed of a line: write "100mbit" or "1gbit"'):
        parse_rate(text)


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"term": "soon"}, 'x: term: \'soon\' is no duration: write "30s", "10m" or "2h", or a number of seconds'),
        ({"inner": {"term": "1 year"}}, "x: inner.term: '1 year' is no duration"),
        ({"limit": "much"}, 'x: limit: \'much\' is no size: write "512MB" or "20GiB", or a number of bytes'),
        ({"trem": 3}, "x: trem: unknown key; did you mean term?"),
        ({"colour": 3}, "x: colour: unknown key"),
        ({"inner": {"trem": 3}}, "x: inner.trem: unknown key"),
        ({"term": "10ms"}, "x: term: Input should be greater than or equal to 1"),
        ({"term": None}, "x: term: "),
    ],
)
def test_what_is_wrong_is_said_with_what_to_write(table: dict[str, Any], said: str) -> None:
    with pytest.raises(FedlinkError) as caught:
        Made.checked(table, "x")
    assert caught.value.reason is Reason.BAD_CONFIG
    assert caught.value.message.startswith(said)
