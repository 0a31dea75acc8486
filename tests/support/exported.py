"""A model through the server's files: taken in as an import does, and written as an export does."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path

from fedlink.manifest import Manifest
from fedserver.modelexport import export
from fedserver.modelfiles import ConvertedModel, convert


def taken_in(source: Path) -> ConvertedModel:
    out = source.with_name(f"{source.name}-in")
    out.mkdir()
    model = convert(source, out)
    return ConvertedModel(Manifest.parse(model.manifest.serialize()), model.files)


def written(model: ConvertedModel, target: Path, merge_into: Path | None = None) -> list[str]:
    paths = {f.entry: f.path for f in model.files}

    async def fetch(entry, path):
        assert not path.exists()
        shutil.copy(paths[entry], path)

    return [p.name for p in asyncio.run(export(model.manifest, fetch, target, merge_into=merge_into))]
