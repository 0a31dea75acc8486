"""What a run will move and take, round by round, by its run file and its model's manifest. Pure.

What the server takes on its disk is `footprint`'s.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Self

from fedlink.blobs import DIGEST_SIZE, BlobRef
from fedlink.manifest import FileEntry, Manifest, manifest_of_files
from fedlink.run_file import WIRE_DTYPES, Retention, RunSpec
from fedlink.tensors import Role, TensorSpec, build_header, shard_name, update_spec
from fedserver.runtime.footprint import Footprint, cohort_of, versions_at

# Memory, as docs/benchmark.md has it measured; all of it is resident memory at its peak.
SERVER_BASE = 110_000_000
"""Bytes of a server that has nothing to do: Python, gRPC, numpy, SQLAlchemy, SQLite."""
SERVER_FOLD = 45_000_000
"""Bytes that checking and averaging add, whatever the model: `test_fold_memory` holds them to 40 MB."""
SERVER_STREAM = 60_000_000
"""Bytes that each bulk stream adds, after many rounds: 12 MiB of chunks, and what gRPC and malloc's heaps keep of them.
Measured: 61 MB with one site, 25 MB each with two and small models, 56 MB each with four."""
SERVER_SITE = 50_000
"""Bytes for each connected site: a held poll, a session, its registration; 39 kB measured with 5,000."""
DAEMON = 240_000_000
"""Bytes of a site's daemon, which holds no model either: 130 to 240 MB measured, from 47 MB to 6 GB of model."""

LINE_SHARE = 0.93
"""The part of a line's bits that is payload: 1,448 of the 1,538 bytes of a frame, less 1 % for TLS and gRPC."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a run will move and take; bytes, and for bytes moved those of one site in one round."""

    clients: int
    """Sites that could take part; 0 if none was known."""
    cohort: int
    """Sites that train in each round."""
    fetching: int
    """Sites that fetch each version: the cohort, and whoever measures it."""
    bytes_down_first: int
    """In a site's first round, if it has nothing of the model: all of it, and the manifest."""
    bytes_down_later: int
    """In each later round: the files that training changed, and the manifest."""
    bytes_up: int
    """An update, and its manifest."""
    version: int
    """What a new version adds to the server's disk."""
    server_disk: int
    """The most that the run's updates and versions take at once, without the starting model."""
    server_memory: int
    """About the peak of the server's process."""
    bulk_streams: int
    """The server's setting, which bounds that."""
    site_disk: int
    """The most at a site: the model, and then two checkpoints, or one and the update. An optimizer's state is extra."""
    checkpoint: int
    """One checkpoint: what trains, and its gradients; 0 where none is written."""
    daemon_memory: int
    """About the peak of a site's daemon."""
    trainer_memory: int
    """The model with its frozen base, and its largest tensor once more while it is read. The framework, gradients,
    optimizer and activations are extra; the update is written in windows, and adds nothing."""

    def serialize(self) -> str:
        """As JSON, for the run's record."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Self:
        """What `serialize` gave."""
        return cls(**json.loads(text))

    def down(self, round_: int, sites: int) -> int:
        """Bytes that so many sites fetch in a round; sites that come later are taken for ones that were there."""
        return sites * (self.bytes_down_first if round_ == 1 else self.bytes_down_later)

    def up(self, sites: int) -> int:
        """Bytes that so many sites send in a round."""
        return sites * self.bytes_up

    def disk(self, round_: int, sites: int, kept: Retention) -> int:
        """About the most that the run takes of the server's disk, when a round of so many sites is committed."""
        updates = sites * (round_ if kept.keep_updates else 1)
        return updates * self.bytes_up + versions_at(round_, kept) * self.version

    def memory(self, sites: int) -> int:
        """About the peak of the server's process, if so many sites fetch a version."""
        return _server_memory(sites, self.bulk_streams)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Seconds that a round's transfers take, all sites moving at once."""

    down_first: float
    down_later: float
    up: float


def predict(model: Manifest, spec: RunSpec, sites: int, takes: Footprint, *, bulk_streams: int) -> Prediction:
    """What a run will move and take.

    Args:
        model: what it starts from.
        spec: its run file.
        sites: that could take part.
        takes: its footprint on the server's disk.
        bulk_streams: the server's setting.
    """
    cohort = cohort_of(sites, spec)
    fetching = max(cohort, sites) if spec.evaluation.enabled else cohort
    manifest = len(model.serialize())
    # A file that the model has twice is one blob, and fetched once.
    sizes = {f.blob.digest: f.blob.size for f in model.files}
    changing = {f.blob.digest for i, f in enumerate(model.files) if _changing(model, i)}
    down = manifest + sum(sizes.values())
    up, checkpoint = update_bytes(model, spec), _checkpoint(model, spec)
    return Prediction(
        clients=sites,
        cohort=cohort,
        fetching=fetching,
        bytes_down_first=down,
        bytes_down_later=manifest + sum(sizes[digest] for digest in changing),
        bytes_up=up,
        version=takes.version,
        server_disk=takes.total,
        server_memory=_server_memory(fetching, bulk_streams),
        bulk_streams=bulk_streams,
        site_disk=down + checkpoint + max(checkpoint, up),
        checkpoint=checkpoint,
        daemon_memory=DAEMON,
        trainer_memory=sum(t.spec.nbytes for t in model.tensors)
        + sum(t.spec.nbytes for t in model.base)
        + max((t.spec.nbytes for t in model.tensors), default=0),
    )


def transfers(predicted: Prediction, *, link: int, server_link: int) -> Transfers | None:
    """How long a round's transfers take.

    Args:
        predicted: what is moved.
        link: bits a second of each site's line; 0 if unknown.
        server_link: bits a second of the server's, which all sites share; 0 if it is never the narrow place.

    Returns:
        None if neither is known.
    """

    def seconds(nbytes: int, sites: int) -> float:
        rates = [rate for rate in (link, server_link / max(1, sites)) if rate]
        return nbytes * 8 / (min(rates) * LINE_SHARE)

    if not link and not server_link:
        return None
    return Transfers(
        seconds(predicted.bytes_down_first, predicted.fetching),
        seconds(predicted.bytes_down_later, predicted.fetching),
        seconds(predicted.bytes_up, predicted.cohort),
    )


def update_bytes(model: Manifest, spec: RunSpec) -> int:
    """The bytes of an update to this model: a file for each of the model's that training changes, and the manifest."""
    dtype = WIRE_DTYPES[spec.update_dtype]
    shards = [specs for i in range(len(model.files)) if (specs := _changing(model, i))]
    files = []
    for index, specs in enumerate(shards):
        _, header = build_header([update_spec(s, dtype) for s in specs])
        # Digests are all of one length, and so is the manifest whatever they are.
        blob = BlobRef(bytes(DIGEST_SIZE), header.file_size)
        files.append((FileEntry(shard_name(index, len(shards), "update"), blob), header))
    roles = {s.name: s.role for specs in shards for s in specs}
    manifest = manifest_of_files(spec.update_kind, files, roles)
    return manifest.total_size + len(manifest.serialize())


def _server_memory(sites: int, bulk_streams: int) -> int:
    # A site moves one blob at a time. More sites than streams share the streams' memory, or wait their turn.
    return SERVER_BASE + SERVER_FOLD + min(sites, bulk_streams) * SERVER_STREAM + sites * SERVER_SITE


def _changing(model: Manifest, file: int) -> list[TensorSpec]:
    """The tensors of a file that an update holds."""
    return [t.spec for t in model.in_file(file) if t.spec.role is not Role.FROZEN]


def _checkpoint(model: Manifest, spec: RunSpec) -> int:
    if spec.strategy == "fedsgd":
        return 0
    specs = [t.spec for t in model.tensors if t.spec.role is not Role.FROZEN]
    return sum(s.nbytes for s in specs) + sum(s.nbytes for s in specs if s.is_delta)
