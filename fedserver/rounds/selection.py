"""Which sites take part: eligibility and the draw of a cohort. Pure."""

from __future__ import annotations

import fnmatch
import hashlib
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedlink.run_file import Cohort
from fedlink.settings_schema import Schema, check_settings, open_settings


@dataclass(frozen=True, slots=True)
class Offer:
    """A workload as a site offers it."""

    schema: Schema
    abilities: frozenset[str]
    """Of "train", "gradient", "evaluate", "calibrate"."""
    allowed_runs: tuple[str, ...]
    """Shell patterns of run names; empty means every run."""


def refusal(
    offers: Mapping[str, Offer], *, run: str, workload: str, ability: str, settings: Mapping[str, Any]
) -> str | None:
    """Why a site that makes these offers can take no part in a run, or None if it can."""
    offer = offers.get(workload)
    if offer is None:
        return f"does not offer workload {workload!r}"
    if offer.allowed_runs and not any(fnmatch.fnmatchcase(run, p) for p in offer.allowed_runs):
        return f"does not allow run {run!r}"
    if ability not in offer.abilities:
        return f"cannot do {ability!r}"
    errors = check_settings(offer.schema, settings)
    if "calibrate" not in offer.abilities:
        errors += [f"{name}: it cannot be measured there" for name in open_settings(offer.schema, settings)]
    return f"refuses the settings: {'; '.join(errors)}" if errors else None


def cohort_size(eligible: int, policy: Cohort) -> int:
    """How many of so many eligible sites take part."""
    if policy.select == "count" and policy.count:
        return min(eligible, policy.count)
    if policy.select == "fraction" and policy.fraction:
        return min(eligible, max(1, math.ceil(eligible * policy.fraction)))
    return eligible


def draw(eligible: frozenset[str], policy: Cohort, *, seed: Sequence[int]) -> tuple[str, ...]:
    """Draw a cohort, the same for the same sites and seed, sorted by name."""
    names = sorted(eligible)
    wanted = cohort_size(len(names), policy)
    # A hash, so that neighbouring seeds and rounds give unrelated draws.
    digest = hashlib.sha256(",".join(map(str, seed)).encode()).digest()
    return tuple(sorted(random.Random(digest).sample(names, wanted)))  # noqa: S311 - reproducible, not secret
