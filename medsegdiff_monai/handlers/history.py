"""Loss, metrics and times of each epoch."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers import Timer
from monai.handlers import from_engine

from ..files import write_atomically
from ..running import RunGuard

__all__ = ["TrainingHistory", "metric_names", "plot_curves", "read_history"]

Rows = list[dict[str, float]]

NOT_METRICS = ("epoch", "loss", "masks_per_image", "seconds", "seconds_waiting", "seconds_validating")


def read_history(output_dir: str | Path) -> Rows:
    """Read the ``history.csv`` of a run, a row for each epoch; without one, nothing."""
    file = Path(output_dir) / "history.csv"
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8") as f:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]


def metric_names(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """The validation metrics in a history."""
    return list(dict.fromkeys(key for row in rows for key in row if key not in NOT_METRICS))


def plot_curves(left: Any, right: Any, rows: Rows) -> None:
    """Draw the loss into one pair of axes, the validation metrics into another."""
    for number, part in groupby(rows, lambda row: row.get("masks_per_image", 1.0)):  # losses on different scales
        label = f"{number:.0f} mask{'s' if number > 1 else ''} per image"
        left.plot(*zip(*((r["epoch"], r["loss"]) for r in part)), marker=".", label=label)
    left.set(xlabel="epoch", ylabel="training loss", yscale="log")
    if len(left.lines) > 1:
        left.legend(fontsize="small")
    for name in metric_names(rows):
        points = [(r["epoch"], r[name]) for r in rows if name in r]
        right.plot(*zip(*points), marker=".", label=name)
    right.set(xlabel="epoch", ylabel="validation", ylim=(0, 1))
    if right.lines:
        right.legend(fontsize="small")


class TrainingHistory:
    """Write loss, validation metrics and times of each epoch as ``history.csv``, the curves as ``curves.png``.

    ``seconds`` is the time of an epoch without its validation, ``seconds_waiting`` that in which the network waited
    for a batch, ``masks_per_image`` how many masks of an image the loss scored. Attach to the trainer (:mod:`.order`).

    Args:
        output_dir: folder to write to.
        validator: engine whose metrics are taken.
    """

    def __init__(self, output_dir: str, validator: Engine) -> None:
        self.output_dir = Path(output_dir)
        self.validator = validator
        self.rows: Rows = []
        self._losses: list[float] = []
        self._waiting = Timer()

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        RunGuard(self.output_dir).attach(engine)
        batch = {"resume": Events.GET_BATCH_STARTED, "pause": Events.GET_BATCH_COMPLETED}
        self._waiting.attach(engine, start=Events.EPOCH_STARTED, **batch)
        engine.add_event_handler(Events.EPOCH_STARTED, self._begin)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _begin(self, engine: Engine) -> None:
        if not self.rows:  # go on with the history of a resumed run
            self.rows = [row for row in read_history(self.output_dir) if row["epoch"] < engine.state.epoch]
        self._losses.clear()
        self._waiting.pause()  # until the first batch is asked for

    def _step(self, engine: Engine) -> None:
        self._losses.append(float(from_engine("loss", first=True)(engine.state.output)))

    @idist.one_rank_only()
    def _write(self, engine: Engine) -> None:
        row = {
            "epoch": float(engine.state.epoch),
            "loss": sum(self._losses) / len(self._losses),
            "masks_per_image": float(getattr(getattr(engine, "prepare_batch", None), "num_members", 1)),
            "seconds": engine.state.times[Events.EPOCH_COMPLETED.name] or 0.0,
            "seconds_waiting": self._waiting.value(),
        }
        validation: Any = self.validator.state
        if validation.epoch == engine.state.epoch:
            row["seconds_validating"] = float(validation.times[Events.COMPLETED.name])
            row.update({k: float(v) for k, v in validation.metrics.items() if isinstance(v, float)})
        self.rows.append(row)
        text = io.StringIO()
        table = csv.DictWriter(text, list(dict.fromkeys(key for r in self.rows for key in r)), restval="")
        table.writeheader()
        table.writerows(self.rows)
        write_atomically(self.output_dir / "history.csv", text.getvalue().encode())
        write_atomically(self.output_dir / "curves.png", self._plot())

    def _plot(self) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 3.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_curves(left, right, self.rows)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()
