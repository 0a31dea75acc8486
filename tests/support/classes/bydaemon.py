"""A script, and no class: it trains a numpy model, and misbehaves in every way, on request."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import helper
import numpy as np

from fedclient import trainer as fed

MODES = fed.setting(
    "mode",
    "good",
    choices=(
        "good",
        "no_load",
        "no_save",
        "raise",
        "exit",
        "late",
        "twice",
        "other",
        "uncounted",
        "quiet",
        "endless",
        "hangs",
    ),
)
steps = fed.setting("steps", 3)
pause = fed.setting("pause", 0.0)


def measure(model):
    return {"loss": float(model["w"].mean())} | ({} if MODES == "uncounted" else {"num_examples": 7})


if MODES == "no_load":
    sys.exit()
# What only a program's main thread may do, and what a second run in one process would find otherwise.
assert threading.current_thread() is threading.main_thread()
signal.signal(signal.SIGUSR1, signal.SIG_DFL)
assert "BYDAEMON" not in os.environ
os.environ["BYDAEMON"] = "1"
helper.runs += 1
assert helper.runs == 1
assert sys.argv[1:] == ["--first", "second"], sys.argv
model = {"w": np.zeros(4, np.float32), "count": np.array(0)}
try:
    fed.load(model, evaluate=measure)
finally:
    with Path("begun").open("a") as f:
        f.write("x")
os.chdir("..")
try:
    for _ in range(steps):
        time.sleep(pause)
        model["w"] += np.float32(np.random.default_rng(fed.seed(3)).normal())
        model["count"] += 1
        fed.log(loss=float(model["w"].mean()))
        if MODES not in ("quiet", "hangs") and not fed.step(steps):
            break
    if MODES == "hangs":
        fed.step()
        time.sleep(60)
    while MODES == "endless":
        time.sleep(0.02)
        fed.step()
finally:
    print("the script's finally")
if MODES == "raise":
    raise ValueError("secret patient")
if MODES == "exit":
    sys.exit(3)
if MODES == "no_save":
    sys.exit(0)
if MODES == "twice":
    fed.load(model)
fed.save({} if MODES == "other" else model, num_examples=5, loss=0.25)
# What comes after it is not part of the update.
model["w"] = model["w"] * np.nan
print("the script's end")
if MODES == "late":
    raise KeyError("late")
