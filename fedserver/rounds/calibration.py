"""What becomes of the settings that a run gives as "auto": what its sites measured, put together. Pure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

from fedlink.settings_schema import Property, Schema, check_settings, open_settings


@dataclass(frozen=True)
class Measured:
    """What sites measured before the first round of a run."""

    settings: Mapping[str, Any] = field(default_factory=dict)
    """What all sites train with."""
    own: tuple[str, ...] = ()
    """Settings that each site trains with its own value of."""
    sites: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    """What each found, by setting."""
    missing: Mapping[str, str] = field(default_factory=dict)
    """Sites that were asked and gave nothing, and why."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """From what `serialize` gave."""
        table = json.loads(text)
        return cls(**table | {"own": tuple(table["own"])})

    def serialize(self) -> str:
        """As text for the database."""
        return json.dumps(asdict(self))


def wanted(schemas: Collection[Schema], settings: Mapping[str, Any]) -> tuple[str, ...]:
    """The settings that at least one of these sites has to measure."""
    return tuple(sorted({name for schema in schemas for name in open_settings(schema, settings)}))


def put_together(
    names: Sequence[str],
    own: Collection[str],
    schemas: Mapping[str, Schema],
    found: Mapping[str, Mapping[str, float]],
    missing: Mapping[str, str],
) -> Measured:
    """The median over the sites of each setting that is not their own, within what each of them allows.

    What a site found and its own schema does not allow is left out of account.

    Args:
        names: the settings that were to be measured.
        own: those that each site keeps to itself.
        schemas: of the sites' settings; a site without one has gone.
        found: what each site found.
        missing: who found nothing, and why.
    """
    sites: dict[str, dict[str, float]] = {}
    refused = dict(missing)
    for site, values in found.items():
        known = schemas[site].properties if site in schemas else {}
        typed = {name: _typed(known[name], values[name]) for name in names if name in values and name in known}
        if len(typed) < len(names):
            refused[site] = "it found no " + ", ".join(sorted(set(names) - set(typed)))
        elif wrong := [text for text in check_settings(schemas[site], typed) if text.partition(":")[0] in typed]:
            refused[site] = f"it found what it does not allow: {'; '.join(wrong)}"
        else:
            sites[site] = typed
    settings = {}
    for name in names:
        if name not in own and sites:
            properties = [schemas[site].properties[name] for site in sites]
            settings[name] = _within(properties, statistics.median(values[name] for values in sites.values()))
    return Measured(settings, tuple(name for name in names if name in own), sites, refused)


def _typed(known: Property, value: float) -> float:
    return int(value) if known.type == "integer" and value == int(value) else value


def _within(properties: Sequence[Property], value: float) -> float:
    """The nearest number that all of these allow; a site that allows none of it refuses it later."""
    low = max((p.minimum for p in properties if p.minimum is not None), default=value)
    high = min((p.maximum for p in properties if p.maximum is not None), default=value)
    within = min(max(value, low), high)
    return int(within) if properties[0].type == "integer" else within
