"""Configuration files: a strict pydantic base, TOML with errors a person can act on."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, ValidationError

from fedlink.errors import FedlinkError, Reason

NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
"""What a run, client, workload or model may be called."""

_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*(ms|s|m|h|d|)")
_UNITS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|[KMGT]i?B|)")
_SIZES = {"": 1, "B": 1, **{f"{p}B": 1000**i for i, p in enumerate("KMGT", 1)}}
_SIZES |= {f"{p}iB": 1024**i for i, p in enumerate("KMGT", 1)}
_RATE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:bit|bit/s|bps)")
_RATES = {prefix: 1000**i for i, prefix in enumerate(["", *"kmgt"])}
_MAX_RATE = 10**15


def check_name(value: str) -> str:
    """Return a valid name.

    Raises:
        ValueError: not 1 to 64 characters of [A-Za-z0-9._-], or it begins with a dot.
    """
    if not NAME.fullmatch(value):
        raise ValueError(f"{value[:80]!r} is not a name: use 1 to 64 characters of A-Z a-z 0-9 . _ - (no leading dot)")
    return value


def parse_duration(value: Any) -> Any:
    """Seconds from "250ms", "30s", "10m", "1.5h", "2d" or a number; what is no text passes, for pydantic to judge.

    Raises:
        ValueError: a text that is no duration.
    """
    if not isinstance(value, str):
        return value
    if m := _DURATION.fullmatch(value.strip()):
        return float(m[1]) * _UNITS[m[2]]
    raise ValueError(f'{value[:80]!r} is no duration: write "30s", "10m" or "2h", or a number of seconds')


def parse_size(value: Any) -> Any:
    """Bytes from "512MB", "20 GiB" or a number; what is no text passes, for pydantic to judge.

    Raises:
        ValueError: a text that is no size.
    """
    if not isinstance(value, str):
        return value
    if m := _SIZE.fullmatch(value.strip()):
        return int(float(m[1]) * _SIZES[m[2]])
    raise ValueError(f'{value[:80]!r} is no size: write "512MB" or "20GiB", or a number of bytes')


def parse_rate(text: str) -> int:
    """Bits a second from "100mbit", "2.5 Gbit/s" or "56kbps".

    Raises:
        ValueError: no speed, or none above 0.
    """
    m = _RATE.fullmatch(text.strip().lower())
    rate = int(float(m[1]) * _RATES[m[2]]) if m else 0
    if 0 < rate <= _MAX_RATE:
        return rate
    raise ValueError(f'{text[:80]!r} is no speed of a line: write "100mbit" or "1gbit" (bits a second)')


Name = Annotated[str, AfterValidator(check_name)]
"""A run's, client's, workload's or model's name."""
Seconds = Annotated[float, BeforeValidator(parse_duration)]
"""A duration in seconds; in TOML also "30s", "10m", "2h"."""
Bytes = Annotated[int, BeforeValidator(parse_size)]
"""A size in bytes; in TOML also "512MB", "20GiB"."""


class Config(BaseModel):
    """Base of every configuration model: frozen, unknown keys refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def checked(cls, table: Mapping[str, Any], where: str) -> Self:
        """Validate a table.

        Raises:
            FedlinkError: BAD_CONFIG; one sentence that names the place, the key and what is wrong with it.
        """
        try:
            return cls.model_validate(table)
        except ValidationError as e:
            raise FedlinkError(Reason.BAD_CONFIG, f"{where}: {explain(e, cls)}") from None


def explain(error: ValidationError, model: type[BaseModel] | None = None) -> str:
    """A validation error as one line: each key, and what is wrong with it.

    Args:
        error: what pydantic says.
        model: what was to be made; its keys are proposed for one that is unknown.
    """
    parts = []
    for item in error.errors(include_url=False, include_context=False):
        key = ".".join(str(p) for p in item["loc"])
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            text = "unknown key" + _proposal(item["loc"], model)
        text = "missing" if item["type"] == "missing" else text
        parts.append(f"{key}: {text}" if key else text)
    return "; ".join(parts)


def _proposal(place: tuple[int | str, ...], model: type[BaseModel] | None) -> str:
    """The key that was probably meant, if it is one of the top."""
    known = list(model.model_fields) if model and len(place) == 1 else []
    close = get_close_matches(str(place[-1]), known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        FedlinkError: BAD_CONFIG, naming the file and the line.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} does not exist") from None
    except (OSError, UnicodeDecodeError) as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} cannot be read: {e}") from None
    except tomllib.TOMLDecodeError as e:
        raise FedlinkError(Reason.BAD_CONFIG, f"{path} is not valid TOML: {e}") from None
