"""A batch size by measuring: the largest whose training step fits into memory.

The rule. One step is tried with 1, 2, 4, ... examples, those that take most, until memory runs out or the batch is as
large as the run wants its optimizer steps to be. Then the gap between what fits and what does not is halved until they
are `CLOSE` to each other, and the larger that fits is the answer.

The effective batch, what an optimizer step sees, stays what the run asked for: it is cut into ceil(effective / found)
forward passes whose gradients add up: a size below it is tried with two, for the second finds the gradients of the
first in memory. So what is learned from a step does not change with the size found, and the
learning rate needs no scaling. (Where one enlarges the effective batch itself, the usual rules are to scale the rate
with it for SGD, Goyal et al. 2017, arXiv:1706.02677, and with its square root for the Adam family.)

Running out of memory is an exception of torch, numpy or Python. On a CPU the system would rather kill the process, or
another one; so the address space is limited meanwhile to what is free, and this process offers itself as the first to
be killed. Several processes with a whole model each try their parts of a size at the same time, and share what is free;
it fits if it does in all. They exchange no gradients meanwhile: one without memory would leave the others waiting.
Each size is noted at the site before it is tried: if the process dies, the daemon, which is another process, begins the
search again, and it goes on with that size; if the process dies of it once more, below it.
"""

from __future__ import annotations

import gc
from collections.abc import Callable

from fedclient.trainer.api import Context
from fedclient.trainer.found import Attempts, CannotMeasureError
from fedclient.trainer.memory import free_device_memory, is_out_of_memory, keep_whole, within_free_memory

CLOSE = 1.1
"""The search ends where what does not fit is at most so many times what fits."""


class NothingFitsError(RuntimeError):
    """Not even a batch of one example fits."""


def find_batch_size(ctx: Context, attempt: Callable[[int], object], *, most: int) -> int:
    """The largest batch with which a training step fits into memory; this module says how it is looked for.

    Args:
        ctx: of `Workload.calibrate`.
        attempt: does a training step with so many examples, those that take most memory, as the run would do it: with
            the optimizer's state, twice, so that the second finds everything there; and below `most` over two batches
            of that size whose gradients add up, if the run then accumulates. Of several processes each does its part
            (`Context.share`), and does not wait for another. It may leave the weights as it likes if they are brought
            back afterwards (`fedclient.trainer.undone`).
        most: no larger batch is wanted: that of an optimizer step, or all examples.

    Raises:
        CannotMeasureError: each process has a share of the model.
        NothingFitsError: not even one example fits.
    """
    team = ctx.team
    if not team.whole:
        raise CannotMeasureError(
            'batch_size = "auto" cannot be measured with strategy = "fsdp", where a process without memory would leave '
            "the others waiting in the middle of a step: set a number"
        )
    keep_whole()
    processes = f"/{team.world_size}" if team.world_size > 1 else ""
    kind = f"{ctx.device}/{most}/{sorted(vars(ctx.settings).items())}{processes}"
    attempts = Attempts(None if team.rank else ctx.kept, kind)
    fits: int
    fails: int
    fits, fails = team.told([attempts.fits, attempts.fails or most + 1])
    while not fails <= max(fits + 1, int(fits * CLOSE)):
        size = min(2 * fits or 1, most) if fails > most else (fits + fails) // 2
        ctx.agree()
        ctx.alive()
        attempts.trying(size)
        try:
            own = _fits(attempt, size, ctx)
        except BaseException:
            attempts.broken_off()
            raise
        if fitted := team.all_true(own):
            fits = size
        else:
            fails = size
        attempts.tried(size, fits=fitted)
        ctx.note(f"a batch of {size} {'fits' if fitted else 'does not fit'} into memory")
    attempts.over()
    if not fits:
        raise NothingFitsError("a training step with one example does not fit into memory")
    return fits


def _fits(attempt: Callable[[int], object], size: int, ctx: Context) -> bool:
    team = ctx.team
    try:
        # None takes any before all have seen what there is.
        with within_free_memory(ctx.device, among=team.beside, ready=lambda: team.all_true(True)):
            attempt(size)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fits = False
    else:
        fits = True
    if not fits:
        # Not in the handler: the error holds on to everything that the attempt had.
        gc.collect()
    free_device_memory()
    return fits
