"""A class of whose processes one takes its time, saying that it is alive, while the others wait for it."""

from __future__ import annotations

import sys
import time

from pairs import Pairs


def linger(seconds, alive):
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        alive()
        time.sleep(0.05)


class Lingering(Pairs):
    """`[data]`: seconds; rank, which takes them in a step; update, whether the first one takes them for its update."""

    def trouble(self, ctx):
        if ctx.step == 2 and ctx.rank == self.site.data["rank"]:
            linger(self.site.data["seconds"], ctx.alive)

    def train(self, model, ctx):
        super().train(model, ctx)
        worker = sys.modules["__main__"]
        write = worker.write_update

        def write_slowly(*args, alive, **options):
            if self.site.data["update"]:
                linger(self.site.data["seconds"], alive)
            return write(*args, alive=alive, **options)

        worker.write_update = write_slowly
