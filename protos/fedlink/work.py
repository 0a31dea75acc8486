"""How much of the work of a round a site does: limits that a site's owner sets, and those of a run."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from fedlink.config import Config, Seconds

MAX_COUNT = 1 << 53
"""The greatest limit on a count."""


class WorkLimits(Config):
    """What a site does in a round at most; a training ends with the step that reaches one of these."""

    steps: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Passes of its loops over `ctx.steps` and `ctx.batches`."""
    epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Passes over its data."""
    examples: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Examples, as `ctx.batches` counts them."""
    max_seconds: Seconds | None = Field(None, gt=0)
    """Seconds of training."""

    @property
    def table(self) -> dict[str, float]:
        """Those that are set."""
        return self.model_dump(exclude_none=True)


class RunWork(Config):
    """`[work]` of a run file: what every site is asked to do in a round at most."""

    steps: int | Literal["balanced"] | None = None
    """Passes of its loops; "balanced": as many as let the sites finish together, from their measured speed."""
    mean_steps: int | None = Field(None, ge=1, le=1_000_000)
    """With "balanced", the mean over the sites of a round."""
    epochs: int | None = Field(None, ge=1, le=1_000_000)
    """Passes over its data."""
    examples: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Examples, as `ctx.batches` counts them."""
    max_seconds: Seconds | None = Field(None, gt=0)
    """Seconds of training."""

    @property
    def balanced(self) -> bool:
        """Whether the steps of each site follow from its speed."""
        return self.steps == "balanced"

    @property
    def equal_steps(self) -> int | None:
        """The steps of a site where no speed is known."""
        return self.mean_steps if isinstance(self.steps, str) else self.steps

    def limits(self, steps: int | None = None) -> WorkLimits:
        """What one site is asked to do.

        Args:
            steps: that it was given; by default those of every site.
        """
        given: dict[str, Any] = self.model_dump(exclude={"mean_steps"})
        return WorkLimits(**given | {"steps": steps or self.equal_steps})

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.steps, int) and not 1 <= self.steps <= MAX_COUNT:
            raise ValueError(f"steps: from 1 to {MAX_COUNT}")
        if self.balanced != (self.mean_steps is not None):
            raise ValueError('steps = "balanced" and the key mean_steps, the mean over the sites, go together')
        return self
