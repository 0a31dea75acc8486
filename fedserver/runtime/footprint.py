"""What a run takes on the server's disk, by its run file and its model's manifest. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from fedlink.manifest import Manifest
from fedlink.run_file import WIRE_DTYPES, Retention, RunSpec
from fedlink.tensors import DTYPES, Role, update_spec
from fedserver.rounds.selection import cohort_size
from fedserver.rounds.wording import size


@dataclass(frozen=True, slots=True)
class Footprint:
    """The most that lies on the disk at once for a run, its starting model not counted; sizes in bytes."""

    updates: int
    """How many are there at once."""
    update: int
    """One of them."""
    versions: int
    """How many are there at once, with the one in the making."""
    version: int
    """One of them."""

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.updates * self.update + self.versions * self.version

    def __str__(self) -> str:
        updates = f"{self.updates} update{'s' * (self.updates != 1)} of {size(self.update)}"
        versions = f"{self.versions} version{'s' * (self.versions != 1)} of {size(self.version)}"
        return f"{updates} and {versions}, {size(self.total)} in all"


def footprint(model: Manifest, spec: RunSpec, sites: int) -> Footprint:
    """What a run takes.

    Args:
        model: what it starts from.
        spec: its run file.
        sites: that could take part.
    """
    rounds = spec.rounds if spec.retention.keep_updates else 1
    versions = versions_at(spec.rounds, spec.retention)
    return Footprint(
        cohort_of(sites, spec) * rounds, max_update_bytes(model, spec), versions, next_version_bytes(model)
    )


def cohort_of(sites: int, spec: RunSpec) -> int:
    """How many of so many sites train in a round: never less than must be there for one to begin."""
    return max(spec.cohort.min_clients, cohort_size(sites, spec.cohort))


def versions_at(round_: int, kept: Retention) -> int:
    """How many versions that a run has made are there at most when a round is committed."""
    # Besides the newest ones: the best one, and the one that was in the making.
    return min(round_, kept.keep_versions + 2)


def shortage(takes: Footprint, *, room: int, reserve: int) -> str:
    """Why the disk cannot hold a run, and what helps; empty if it can.

    Args:
        takes: what the run takes.
        room: bytes that may be taken now.
        reserve: bytes that stay free besides.
    """
    if takes.total <= room:
        return ""
    return (
        f"the server's disk cannot hold it: it takes up to {takes}, and {size(room)} are free besides "
        f"disk_reserve ({size(reserve)}); make room for {size(takes.total - room)} more, or take "
        "fewer sites ([cohort]) or keep less ([retention])"
    )


def max_update_bytes(model: Manifest, spec: RunSpec) -> int:
    """The most bytes an update to this model may have: its data, and room for headers."""
    trained = [t.spec for t in model.tensors if t.spec.role is not Role.FROZEN]
    dtype = WIRE_DTYPES[spec.update_dtype]
    data = sum(update_spec(s, dtype).nbytes for s in trained)
    return data + sum(len(s.name.encode()) * 2 + 512 for s in trained) + 4096 * (len(model.files) + 1)


def sums_bytes(model: Manifest) -> int:
    """About how many bytes sums over some updates take: float64 of what is averaged, and one shard of it twice."""
    shards = [sum(8 * t.spec.elements for t in model.in_file(i) if t.spec.averaged) for i in range(len(model.files))]
    return sum(shards) + max(shards, default=0)


def next_version_bytes(model: Manifest) -> int:
    """About how many bytes the next version of a model takes: what trains, and a float32 master of what is narrower."""
    specs = [t.spec for t in model.tensors if t.spec.role is not Role.FROZEN]
    narrow = [s for s in specs if s.is_delta and DTYPES[s.dtype].bits < 32]
    return sum(s.nbytes for s in specs) + sum(4 * s.elements for s in narrow)
