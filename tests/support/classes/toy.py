"""A numpy workload that draws from every generator, and fails in every way, on request."""

from __future__ import annotations

import ctypes
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from fedclient.trainer import Bounds, Workload

Fault = Literal[
    "none", "exception", "memory", "hang", "segfault", "exit", "sys_exit", "kill", "noisy", "no_count", "dtype"
]


class Toy(Workload):
    @dataclass(frozen=True)
    class Settings:
        learning_rate: Annotated[float, Bounds(0, 10)] = 0.5
        steps: Annotated[int, Bounds(minimum=0)] = 3
        fault: Fault = "none"
        at: int = 1
        pause: float = 0.0
        scales: tuple[float, ...] = ()
        child_pid_file: str = ""

    def build_model(self):
        tied = np.random.normal(size=(2, 3)).astype(np.float32)  # noqa: NPY002
        return {
            "w": np.random.normal(size=(4, 5)).astype(np.float32),  # noqa: NPY002
            "bias": np.array(random.random()),
            "tied": tied,
            "tied_again": tied,
            "empty": np.zeros((0, 7), np.float32),
            "half": np.ones(3, np.float16),
            "count": np.array(0, np.int64),
            "mask": np.array([True, False]),
        }

    def train(self, model, ctx):
        fault = ctx.settings.fault
        for step in ctx.steps(ctx.settings.steps):
            noise = np.random.normal(size=(4, 5)) + random.random() + ctx.rng().random()  # noqa: NPY002
            model["w"] -= (ctx.settings.learning_rate * noise).astype(np.float32)
            model["bias"] = model["bias"] - np.float64(0.25)
            model["tied"] += 1
            model["half"] *= np.float16(1.5)
            model["count"] += 1
            ctx.log(loss=float(np.square(model["w"]).mean()), diverged=float("nan"))
            if ctx.settings.pause:
                time.sleep(ctx.settings.pause)
            if step == ctx.settings.at:
                self.fail(fault, model, ctx)
        if fault != "no_count":
            ctx.num_examples = 17

    def fail(self, fault, model, ctx):
        if ctx.settings.child_pid_file:
            child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
            self.site.path(ctx.settings.child_pid_file).write_text(f"{os.getpid()} {child.pid}")
        if fault == "exception":
            print("about to fail", flush=True)
            raise ValueError("secret patient 4711")
        if fault == "memory":
            np.ones(1 << 62, np.uint8)
        if fault == "hang":
            time.sleep(3600)
        if fault == "segfault":
            ctypes.string_at(0)
        if fault == "exit":
            os._exit(3)
        if fault == "sys_exit":
            sys.exit("bye")
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "noisy":
            print("x" * 200_000)
        if fault == "dtype":
            model["w"] = model["w"].astype(np.float64)

    def gradient(self, model, ctx):
        ctx.num_examples = 5
        return {"w": np.full((4, 5), 0.5), "bias": 2.0}

    def evaluate(self, model, ctx):
        ctx.num_examples = 9
        return {"accuracy": float(model["w"].mean()), "pid": os.getpid(), "secrets": len(_credentials())}


class Minimal(Workload):
    def build_model(self):
        return {"w": np.zeros(2, np.float32)}

    def train(self, model, ctx):
        model["w"] += 1
        ctx.num_examples = 1


class NotOne:
    pass


class NoMethods(Workload):
    def build_model(self):
        return {}


class BadSettings(Minimal):
    @dataclass(frozen=True)
    class Settings:
        table: dict = None


def _credentials():
    return [name for name in os.environ if "FEDLINK" in name or "TOKEN" in name]
