"""One update against the model it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from fedlink.errors import FedlinkError, Reason
from fedlink.manifest import Manifest, TensorEntry
from fedlink.tensors import Kind, Role, TensorError, TensorSpec, header_length, read_header, update_spec, windows
from fedserver.aggregation.files import WINDOW_BYTES, ShardReader
from fedserver.aggregation.numbers import Raw, sound

# A header longer than its tensors can explain is not parsed: JSON grows thirtyfold in memory.
_HEADER_SLACK = 64 << 10


def check_update(
    model: Manifest,
    update: Manifest,
    files: Sequence[Path],
    *,
    kind: Kind,
    update_dtype: str,
    max_bytes: int,
    unwanted: Callable[[], bool] = lambda: False,
) -> None:
    """Check an update before it counts: one pass over its files in windows of 1 MiB. Blocking.

    An update holds exactly the model's parameters and buffers, no frozen tensor and no alias,
    with the model's shapes; deltas and gradients in `update_dtype` (F64 in F64), buffers in the
    model's dtype; every number finite, every boolean 0 or 1. Each file's own header says what
    the manifest says.

    Args:
        model: the version the task named.
        update: what the client sent.
        files: where each of `update.files` lies, in the same order; already verified by digest.
        kind: DELTA or GRADIENT, as the run's strategy wants.
        update_dtype: safetensors dtype of deltas and gradients (one of `tensors.UPDATE_DTYPES`).
        max_bytes: the most bytes all files together may have.
        unwanted: asked before every window; once it says so, the pass ends.

    Raises:
        FedlinkError: BAD_MANIFEST, TOO_LARGE, TENSOR_MISSING, TENSOR_UNEXPECTED, SHAPE_MISMATCH,
            DTYPE_MISMATCH or NOT_FINITE, with the tensor's name in the metadata (`tensor`) where one is at fault;
            BLOB_CORRUPT if a file is shorter than it was; DRAINING if the verdict is not wanted any more.
        OSError: a file cannot be read.
    """
    _check_tensors(model, update, kind, update_dtype, max_bytes)
    if len(files) != len(update.files):
        raise FedlinkError(Reason.BAD_MANIFEST, f"update names {len(update.files)} files, {len(files)} were sent")
    window = np.empty(WINDOW_BYTES, np.uint8)
    with ShardReader() as reader:
        for index, path in enumerate(files):
            _check_header(update, index, path)
            for entry in update.in_file(index):
                _check_values(reader, files, entry, window, unwanted)


def _check_tensors(model: Manifest, update: Manifest, kind: Kind, update_dtype: str, max_bytes: int) -> None:
    if update.kind is not kind:
        raise FedlinkError(Reason.BAD_MANIFEST, f"update is of kind {update.kind}; this run takes {kind}")
    if update.total_size > max_bytes:
        raise FedlinkError(
            Reason.TOO_LARGE,
            f"update has {update.total_size} bytes; at most {max_bytes} are allowed",
            metadata={"size": str(update.total_size), "limit": str(max_bytes)},
        )
    wanted = {
        name: update_spec(t.spec, update_dtype) for name, t in model.by_name.items() if t.spec.role is not Role.FROZEN
    }
    found = {name: t.spec for name, t in update.by_name.items()}
    for name in sorted(wanted.keys() - found.keys()):
        raise _refusal(Reason.TENSOR_MISSING, name, "is missing")
    for name in sorted(found.keys() - wanted.keys()):
        raise _refusal(Reason.TENSOR_UNEXPECTED, name, _why_unexpected(model, name))
    for name, spec in found.items():
        want = wanted[name]
        if spec.shape != want.shape:
            raise _refusal(Reason.SHAPE_MISMATCH, name, f"has the shape {spec.shape}, not {want.shape}")
        if spec.dtype != want.dtype:
            raise _refusal(Reason.DTYPE_MISMATCH, name, f"is of {spec.dtype}, not {want.dtype}")
        if spec.role is not want.role:
            raise _refusal(Reason.BAD_MANIFEST, name, f"is said to be a {spec.role}, not a {want.role}")


def _why_unexpected(model: Manifest, name: str) -> str:
    if name in model.by_name:
        return "is frozen in this run and may not be sent"
    if name in model.aliases:
        return f"is tied to {model.aliases[name]!r} and travels under that name only"
    return "is not in the model"


def _check_header(update: Manifest, index: int, path: Path) -> None:
    entry = update.files[index]
    try:
        with path.open("rb") as f:
            length = header_length(f.read(8), entry.blob.size)
        plausible = length <= _HEADER_SLACK + sum(_most_header_bytes(t.spec) for t in update.in_file(index))
        header = read_header(path) if plausible else None
    except TensorError as e:
        tensor = {"tensor": e.tensor} if e.tensor else None
        raise FedlinkError(Reason.BAD_MANIFEST, f"file {entry.name} of the update: {e}", metadata=tensor) from None
    if header is None:
        raise FedlinkError(
            Reason.BAD_MANIFEST,
            f"file {entry.name} of the update has a header of {length} bytes; its tensors cannot need so much",
        )
    update.check_header(index, header)


def _most_header_bytes(spec: TensorSpec) -> int:
    return 6 * len(spec.name.encode()) + 24 * len(spec.shape) + 256


def _check_values(
    reader: ShardReader, files: Sequence[Path], entry: TensorEntry, window: Raw, unwanted: Callable[[], bool]
) -> None:
    spec = entry.spec
    for start, length in windows(spec.nbytes, WINDOW_BYTES):
        if unwanted():
            raise FedlinkError(Reason.DRAINING, "the check of the update is not wanted any more: the server stops")
        raw = window[:length]
        reader.read(files, entry, start, raw.data)
        if not sound(raw, spec.dtype):
            what = "a byte other than 0 and 1" if spec.dtype == "BOOL" else "NaN or Inf"
            raise _refusal(Reason.NOT_FINITE, spec.name, f"holds {what}")


def _refusal(reason: Reason, tensor: str, text: str) -> FedlinkError:
    return FedlinkError(reason, f"tensor {tensor!r} of the update {text}", metadata={"tensor": tensor})
