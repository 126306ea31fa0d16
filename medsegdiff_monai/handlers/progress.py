"""Live progress of a training, and of cases that are segmented."""

from __future__ import annotations

from collections.abc import Sized
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.handlers import from_engine
from tqdm import tqdm

__all__ = ["CaseProgress", "TrainingProgress"]


class TrainingProgress:
    """One bar over the whole training, with the time left and the loss."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._close)
        self._bar: tqdm | None = None

    def _open(self, engine: Engine) -> None:
        if self._bar is None and idist.get_rank() == 0:
            state: Any = engine.state
            self._bar = tqdm(
                total=state.max_epochs * state.epoch_length, initial=state.iteration, desc="Train", dynamic_ncols=True
            )

    def _step(self, engine: Engine) -> None:
        if self._bar is not None:
            loss = float(from_engine("loss", first=True)(engine.state.output))
            self._bar.set_postfix(epoch=f"{engine.state.epoch}/{engine.state.max_epochs}", loss=f"{loss:.3f}")
            self._bar.update()

    def _close(self, engine: Engine, *error: Exception) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        if error:
            raise error[0]


class CaseProgress:
    """One bar over all cases, with the time left; those that were skipped count.

    Args:
        cases: list of the cases, with ``faults`` of those that were skipped.
    """

    def __init__(self, cases: Sized) -> None:
        self.cases: Any = cases
        self._bar: tqdm | None = None

    def attach(self, engine: Engine) -> None:
        """Attach to an evaluator."""
        engine.add_event_handler(Events.STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED, self._close)

    def _open(self, engine: Engine) -> None:
        self._bar = tqdm(total=len(self.cases), desc="Segment", dynamic_ncols=True, disable=not len(self.cases))

    def _step(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.update(engine.state.iteration + len(self.cases.faults) - self._bar.n)

    def _close(self, engine: Engine) -> None:
        if self._bar is not None:
            self._step(engine)
            self._bar.close()
