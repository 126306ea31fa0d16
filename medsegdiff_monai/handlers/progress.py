"""Live progress of a training, and of cases that are segmented."""

from __future__ import annotations

import logging
import time
from collections.abc import Sized
from datetime import datetime, timedelta
from statistics import fmean
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.handlers import from_engine
from tqdm import tqdm

__all__ = ["CaseProgress", "ExpectedDuration", "TrainingProgress"]

logger = logging.getLogger(__name__)

WARM_UP = 2  # iterations that are slower than those to come
ITERATIONS, SECONDS = 10, 30.0  # measured after them: so many, or fewer that take as long


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


class ExpectedDuration:
    """Say in the log, early in a training, how long it will take with its validations.

    That is measured on iterations after the first ones, and on one validation case, which is read and segmented for it;
    it changes nothing of the training. It is measured and said again when the trainer draws more masks of each image,
    which takes longer (:class:`.WarmStart`). Where only a few iterations are left, nothing is said.

    Args:
        validator: MONAI's evaluator of the training.
        val_interval: epochs from one validation to the next; the last epoch is validated, too.
    """

    def __init__(self, validator: Any, val_interval: int = 1) -> None:
        self.validator = validator
        self.val_interval = val_interval

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if idist.get_rank() == 0:
            engine.add_event_handler(Events.STARTED, self._begin)
            engine.add_event_handler(Events.GET_BATCH_STARTED, self._ask)
            engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)

    def _begin(self, engine: Engine) -> None:
        self._measured: list[float] = []
        self._said = False
        self._masks = _masks_per_image(engine)

    def _ask(self, engine: Engine) -> None:
        self._asked = time.perf_counter()

    def _step(self, engine: Engine) -> None:
        if self._masks != _masks_per_image(engine):
            self._begin(engine)
        if not self._said:
            self._measured.append(time.perf_counter() - self._asked)
            times = self._measured[WARM_UP:]
            if len(times) == ITERATIONS or sum(times) > SECONDS:
                self._said = True
                self._say(engine, fmean(times))

    def _say(self, engine: Engine, seconds: float) -> None:
        state: Any = engine.state
        training = seconds * (state.max_epochs * state.epoch_length - state.iteration)
        epochs = range(state.epoch, state.max_epochs + 1)
        validations = sum(epoch % self.val_interval == 0 or epoch == state.max_epochs for epoch in epochs)
        validating = self._seconds_of_a_case() * len(self.validator.data_loader) * validations
        left, part = (timedelta(seconds=round(time)) for time in (training + validating, validating))
        end = datetime.now() + left
        logger.info(f"Expected to end on {end:%d %B at %H:%M}, in {left}, of which validation takes {part}.")

    def _seconds_of_a_case(self) -> float:
        """Segment the first validation case, and leave the evaluator and the random numbers as they were."""
        began, state, loader = time.perf_counter(), self.validator.state, self.validator.data_loader
        with torch.random.fork_rng([state.device] if state.device.type == "cuda" else []):
            state.batch = loader.collate_fn([loader.dataset[0]])
            self.validator._process_function(self.validator, state.batch)
        state.batch = state.output = None
        return time.perf_counter() - began


def _masks_per_image(engine: Engine) -> int:
    return getattr(getattr(engine, "prepare_batch", None), "num_members", 1)


class CaseProgress:
    """One bar over all cases, with the time left; those that were skipped count.

    Where a volume takes long, there is another one over its windows.

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
        windows = getattr(getattr(engine, "inferer", None), "window", None)
        if windows is not None:
            windows.shows_progress = idist.get_rank() == 0
        self._bar = tqdm(total=len(self.cases), desc="Segment", dynamic_ncols=True, disable=not len(self.cases))

    def _step(self, engine: Engine) -> None:
        if self._bar is not None:
            self._bar.update(engine.state.iteration + len(self.cases.faults) - self._bar.n)

    def _close(self, engine: Engine) -> None:
        if self._bar is not None:
            self._step(engine)
            self._bar.close()
