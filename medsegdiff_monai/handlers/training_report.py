"""A page on how a training went."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events

from ..files import write_atomically
from .history import Rows, metric_names, plot_curves, read_history

__all__ = ["TrainingReport"]


class TrainingReport:
    """Write ``training_report.md`` and ``training_report.png``, after each validation and in the end.

    Curves, best epoch, scores there and at last, time and what of it was spent waiting for data, and settings: of a
    training that is finished, stopped early or interrupted alike. Attach to the trainer (:mod:`.order`).

    Args:
        output_dir: folder to write to.
        validator: engine whose key metric decides which epoch is the best.
        settings: values of the config variables, by name.
        facts: what else to list, before them.
    """

    def __init__(
        self, output_dir: str, validator: Engine, settings: Mapping[str, Any], facts: Mapping[str, Any] | None = None
    ) -> None:
        self.output_dir = Path(output_dir)
        self.validator: Any = validator  # MONAI's workflows add to its state
        self.settings = {**(facts or {}), **settings}

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._validated)
        engine.add_event_handler(Events.COMPLETED, self._finish)

    def _validated(self, engine: Engine) -> None:
        if self.validator.state.epoch == engine.state.epoch:
            self._write(engine, "training continues")

    def _finish(self, engine: Engine) -> None:
        self._write(engine, "stopped early" if engine.state.epoch < (engine.state.max_epochs or 0) else "finished")

    @idist.one_rank_only()
    def _write(self, engine: Engine, status: str) -> None:
        rows = read_history(self.output_dir)
        text = "\n".join([*self._summary(engine, rows, status), "", *self._scores(rows), "", *self._settings(), ""])
        write_atomically(self.output_dir / "training_report.png", self._picture(rows))
        write_atomically(self.output_dir / "training_report.md", text.encode())

    def _best(self, rows: Rows) -> dict[str, float]:
        """The row of the best validation; empty before the first one."""
        best = self.validator.state.best_metric_epoch
        return next((row for row in rows if row["epoch"] == best), {})

    def _summary(self, engine: Engine, rows: Rows, status: str) -> list[str]:
        training, waiting, validating = (
            sum(row.get(key, 0.0) for row in rows) for key in ("seconds", "seconds_waiting", "seconds_validating")
        )
        best, key = self._best(rows), self.validator.state.key_metric_name
        score = f"{key} {best[key]:.4f} at epoch {best['epoch']:.0f}" if best else "none yet"
        return [
            "# Training report",
            "",
            "![Curves](training_report.png)",
            "",
            f"- Epochs: {engine.state.epoch} of {engine.state.max_epochs}, {status}",
            f"- Best validation: {score}; its averaged weights are in `model.pt`",
            f"- Time: {_clock(training + validating)}, of which validation took {_clock(validating)}",
            f"- Waiting for data: {waiting / max(training, 1e-9):.1%} of the training time",
        ]

    def _scores(self, rows: Rows) -> list[str]:
        best, last = self._best(rows), next((row for row in reversed(rows) if metric_names([row])), {})
        if not last:
            return ["No validation yet."]
        lines = [f"| validation | best, epoch {best['epoch']:.0f} | last, epoch {last['epoch']:.0f} |", "|---|---|---|"]
        # a run that was resumed with more members has metrics that its best epoch lacks
        return lines + [f"| {n} | {best.get(n, float('nan')):.4f} | {last[n]:.4f} |" for n in metric_names([last])]

    def _settings(self) -> list[str]:
        return ["| setting | value |", "|---|---|", *(f"| {name} | {_cell(v)} |" for name, v in self.settings.items())]

    def _picture(self, rows: Rows) -> bytes:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        plot_curves(left, right, rows)
        best, key = self._best(rows), self.validator.state.key_metric_name
        if best:
            right.axvline(best["epoch"], color="grey", linestyle=":")
            figure.suptitle(f"Best epoch {best['epoch']:.0f}: {key} {best[key]:.4f}", fontsize=10)
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=120)
        return picture.getvalue()


def _cell(value: Any) -> str:
    """A value in a table of Markdown, in the notation of an overlay."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.replace("|", "\\|")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
