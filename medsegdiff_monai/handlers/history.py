"""Loss and metrics of each epoch."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from ignite.engine import Engine, Events
from monai.handlers import from_engine

from ..files import write_atomically

__all__ = ["TrainingHistory"]


class TrainingHistory:
    """Write loss and validation metrics of each epoch as ``history.csv`` and ``curves.png``.

    Attach to the trainer, after MONAI's ``ValidationHandler``.

    Args:
        output_dir: folder to write to.
        validator: engine whose metrics are taken.
    """

    def __init__(self, output_dir: str, validator: Engine) -> None:
        self.output_dir = Path(output_dir)
        self.validator = validator
        self.rows: list[dict[str, float]] = []
        self._losses: list[float] = []

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self._read)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._write)

    def _read(self, engine: Engine) -> None:
        """Go on with the history of a resumed run."""
        file = self.output_dir / "history.csv"
        if engine.state.epoch and file.is_file():
            with file.open(newline="", encoding="utf-8") as f:
                rows = [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(f)]
            self.rows = [row for row in rows if row["epoch"] <= engine.state.epoch]

    def _step(self, engine: Engine) -> None:
        self._losses.append(float(from_engine("loss", first=True)(engine.state.output)))

    def _write(self, engine: Engine) -> None:
        row = {"epoch": float(engine.state.epoch), "loss": sum(self._losses) / len(self._losses)}
        if self.validator.state.epoch == engine.state.epoch:
            row.update({k: float(v) for k, v in self.validator.state.metrics.items() if isinstance(v, float)})
        self.rows.append(row)
        self._losses.clear()
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
        left.plot([r["epoch"] for r in self.rows], [r["loss"] for r in self.rows])
        left.set(xlabel="epoch", ylabel="training loss", yscale="log")
        for name in dict.fromkeys(key for r in self.rows for key in r if key not in ("epoch", "loss")):
            points = [(r["epoch"], r[name]) for r in self.rows if name in r]
            right.plot(*zip(*points), marker=".", label=name)
        right.set(xlabel="epoch", ylabel="validation", ylim=(0, 1))
        if right.lines:
            right.legend()
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()
