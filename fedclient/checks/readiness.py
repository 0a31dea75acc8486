"""What the workload says of its data, in a sentence for each part, and what is worth a second look."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fedclient.checks.finding import Finding, Outcome, ok, together, warning

CUT_WARNS = 0.1
"""Share of examples that lose their end before it is worth a word."""
_LABELS = 10


def readiness(name: str, data: Mapping[str, Any]) -> Finding:
    """A workload's `describe_data` as a finding; all of it goes to --json.

    Args:
        name: the workload.
        data: what it said; `train` and `test` as the built-in ones have them, anything else in other classes.
    """
    parts = {key: value for key, value in data.items() if isinstance(value, Mapping) and "examples" in value}
    findings = [_part(f"{name}: {key}", part) for key, part in parts.items()]
    if shared := data.get("in_both"):
        advice = "What is learned from must not be measured on: take it out of one of the files."
        findings.append(warning(f"{name}: {shared} texts are in train and in test", advice))
    if not findings:
        said = ", ".join(f"{key} {value}" for key, value in data.items() if isinstance(value, int | float | str))
        findings.append(ok(f"{name}: {said or 'its class describes the data; --json shows how'}"))
    found = together(findings)
    return Finding(found.outcome, found.found, found.advice, {name: dict(data)})


def _part(what: str, part: Mapping[str, Any]) -> Finding:
    text = f"{what}: {', '.join(_said(part))}"
    if not part["examples"]:
        return warning(text, "Look whether the file is the right one.")
    if part.get("truncated", 0) > CUT_WARNS:
        return warning(text, "Raise max_length in the data table, or let truncation cut where it hurts least.")
    return Finding(Outcome.OK, text)


def _said(part: Mapping[str, Any]) -> Iterator[str]:
    yield f"{part['examples']} examples"
    if length := part.get("length"):
        spread = f"median {length['median']}, 95 % up to {length['p95']}, longest {length['max']}"
        yield f"{part['tokens']} tokens ({spread})"
    if part.get("truncated"):
        yield f"{part['truncated']:.1%} cut at {part['max_length']}"
    if part.get("duplicates"):
        yield f"{part['duplicates']} duplicates"
    if part.get("without_target"):
        yield f"{part['without_target']} left out, for nothing of them could be learned"
    if labels := part.get("labels"):
        most = sorted(labels.items(), key=lambda item: -item[1])[:_LABELS]
        rest = f" and {len(labels) - _LABELS} more" if len(labels) > _LABELS else ""
        yield f"labels {', '.join(f'{label} {count}' for label, count in most)}{rest}"
