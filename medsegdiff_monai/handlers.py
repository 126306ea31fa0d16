"""Ignite handlers: weights, checkpoints, progress and history of a training run."""

from __future__ import annotations

import csv
import io
import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from ignite.engine import Engine, Events
from ignite.handlers import DiskSaver
from ignite.handlers.ema_handler import EMAHandler
from monai.engines import IterationEvents
from monai.handlers import CheckpointLoader, from_engine
from torch import nn
from tqdm import tqdm

from .errors import InputError
from .settings import as_bool

__all__ = [
    "BestModelSaver",
    "GradientClipping",
    "ModelEMA",
    "StopOnBadLoss",
    "TrainingCheckpoint",
    "TrainingHistory",
    "TrainingProgress",
    "WeightsLoader",
    "write_atomically",
]


logger = logging.getLogger(__name__)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file so that a reader never sees half of it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


class ModelEMA(EMAHandler):
    """Ignite's ``EMAHandler`` for an averaged network that the config has made, set to the network when a run starts.

    Ignite copies the weights when the handler is built, which is before a checkpoint is loaded. The momentum falls as
    9 / (10 + iteration) to its final value (as in TensorFlow's ``ExponentialMovingAverage``), so that short runs are
    not held back by their first weights; it depends on the iteration alone, so that a resumed run goes on.

    Args:
        model: network in training.
        ema_model: network of the same architecture that receives the averaged weights.
        momentum: weight of the current weights in each update.
    """

    def __init__(self, model: nn.Module, ema_model: nn.Module, momentum: float = 0.005) -> None:
        super().__init__(model, momentum=momentum)
        self.ema_model = ema_model.requires_grad_(False).eval()

    def attach(self, engine: Engine) -> None:  # type: ignore[override]
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, lambda: self.ema_model.load_state_dict(self.model.state_dict()))
        super().attach(engine, warn_if_exists=False)

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        setattr(engine.state, name, max(self.momentum, 9 / (10 + engine.state.iteration)))
        super()._update_ema_model(engine, name)


def _load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint, weights only.

    Raises:
        InputError: for a missing, truncated or foreign file.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such checkpoint: train first, or set --checkpoint FILE.")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever it likes; the file is what matters
        raise InputError(f"{path}: is truncated or no checkpoint of weights: replace the file.") from error
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds no weights but a {type(content).__name__}: replace the file.")
    return dict(content)


def _load_weights(path: str | Path, model: nn.Module, weights: Any) -> None:
    """Load weights into a network.

    Raises:
        InputError: where they are of another architecture.
    """
    if not isinstance(weights, Mapping):
        raise InputError(f"{path}: holds no weights but a {type(weights).__name__}: replace the file.")
    difference = _mismatch(model, weights)
    if difference is not None:
        raise InputError(
            f"{path}: weights of another architecture ({difference}): set channels, num_classes and the like, or the "
            "overlays, as in training."
        )
    model.load_state_dict(weights)


def _mismatch(model: nn.Module, weights: Mapping[str, Any]) -> str | None:
    """The first difference between a network and weights for it, in words."""
    own = model.state_dict()
    for name in own:
        if not isinstance(weights.get(name), torch.Tensor):
            return f"it lacks {name}"
        if own[name].shape != weights[name].shape:
            return f"{name} is {list(weights[name].shape)} there, {list(own[name].shape)} in the network"
    extra = [name for name in weights if name not in own]
    return f"the network has no {extra[0]}" if extra else None


class WeightsLoader(CheckpointLoader):
    """Load the weights of a network when a run starts; MONAI's ``CheckpointLoader`` with plain error messages.

    Args:
        load_path: file of a state dict, flat or under the key ``model``.
        model: network to load it into.
    """

    def __init__(self, load_path: str, model: nn.Module) -> None:
        super().__init__(load_path=load_path, load_dict={"model": model})
        self.model = model

    def __call__(self, engine: Engine) -> None:
        """Load the weights.

        Raises:
            InputError: for a missing or truncated file, or weights of another architecture.
        """
        content = _load_checkpoint(self.load_path)
        _load_weights(self.load_path, self.model, content.get("model", content))
        logger.info(f"Restored all variables from {self.load_path}")


class BestModelSaver:
    """Write the weights after each validation that is the best so far: a plain state dict, replaced atomically.

    Attach to the validator; its key metric decides, the higher the better.

    Args:
        model: network whose weights are written.
        path: file to write.
    """

    def __init__(self, model: nn.Module, path: str) -> None:
        self.model = model
        self.path = Path(path)

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the weights if this validation was the best."""
        state: Any = engine.state  # MONAI's workflows add to it
        if state.best_metric_epoch == state.epoch:
            saver = DiskSaver(str(self.path.parent), atomic=True, create_dir=True, require_empty=False)
            saver(self.model.state_dict(), self.path.name)


class _BestMetric:
    """The best score of a validator, as something that a checkpoint can hold."""

    def __init__(self, validator: Engine) -> None:
        self.state: Any = validator.state

    def state_dict(self) -> dict[str, float]:
        return {"best_metric": float(self.state.best_metric), "best_metric_epoch": self.state.best_metric_epoch}

    def load_state_dict(self, values: Mapping[str, float]) -> None:
        self.state.best_metric = values["best_metric"]
        self.state.best_metric_epoch = values["best_metric_epoch"]


class TrainingCheckpoint:
    """Keep the last checkpoints of a run, one after each epoch, and resume from the newest.

    Attach it to the trainer, after the handlers for averaged weights, learning rate and validation: it saves what they
    have done in an epoch. A run that starts anew removes the checkpoints of an earlier one as soon as it has its own.

    Args:
        objects: what to save, by name: networks, optimiser, learning-rate schedule.
        validator: validator whose best score is kept, too.
        ckpt_dir: folder of ``checkpoint_epoch=N.pt``.
        resume: whether to continue from the newest checkpoint there; without one, training starts anew.
        n_saved: how many to keep.
    """

    def __init__(
        self,
        objects: dict[str, Any],
        validator: Engine,
        ckpt_dir: str,
        resume: bool | str = False,
        n_saved: int = 2,
    ) -> None:
        self.objects = {**objects, "best": _BestMetric(validator)}
        self.ckpt_dir = Path(ckpt_dir)
        self.resume = as_bool(resume)
        self.n_saved = n_saved

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        if self.resume:
            engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _files(self) -> dict[int, Path]:
        """Checkpoints by their epoch."""
        found = ((re.fullmatch(r"checkpoint_epoch=(\d+)\.pt", p.name), p) for p in self.ckpt_dir.glob("*.pt"))
        return {int(match[1]): path for match, path in found if match}

    def _save(self, engine: Engine) -> None:
        saver = DiskSaver(str(self.ckpt_dir), atomic=True, create_dir=True, require_empty=False)
        content = {name: item.state_dict() for name, item in self.objects.items()}
        saver(content, f"checkpoint_epoch={engine.state.epoch}.pt")
        for epoch, path in self._files().items():
            if not engine.state.epoch - self.n_saved < epoch <= engine.state.epoch:
                path.unlink()

    def _load(self, engine: Engine) -> None:
        files = self._files()
        if not files:
            logger.info(f"No checkpoint in {self.ckpt_dir}: training starts anew.")
            return
        newest = max(files)
        content = _load_checkpoint(files[newest])
        length, max_epochs = engine.state.epoch_length, engine.state.max_epochs or 0
        if newest >= max_epochs:
            raise InputError(f"{files[newest]}: max_epochs={max_epochs} are done: set --max_epochs higher to train on.")
        for name, item in self.objects.items():
            if isinstance(item, nn.Module):
                _load_weights(files[newest], item, content.get(name))
            else:
                item.load_state_dict(content[name])
        # by epochs: a checkpoint ends one, and another batch size changes the number of iterations
        engine.load_state_dict({"epoch": newest, "epoch_length": length, "max_epochs": max_epochs})
        logger.info(f"Resumed from {files[newest]}")


class GradientClipping:
    """Scale the gradients down to a largest norm before each step of the optimiser.

    Args:
        model: network in training.
        max_norm: largest norm of all gradients together.
    """

    def __init__(self, model: nn.Module, max_norm: float = 1.0) -> None:
        self.model = model
        self.max_norm = max_norm

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.BACKWARD_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Clip the gradients."""
        nn.utils.clip_grad_norm_(self.model.parameters(), self.max_norm)


class StopOnBadLoss:
    """Stop a training before a loss that is not finite reaches the weights, and name the cases of the batch."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(IterationEvents.LOSS_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Check the loss.

        Raises:
            InputError: where it is not finite.
        """
        state: Any = engine.state
        if not torch.isfinite(state.output["loss"]).all():
            cases = ", ".join(map(str, state.batch.get("case", ["unknown"])))
            raise InputError(
                f"the loss is {float(state.output['loss'])} at iteration {state.iteration}, on the cases {cases}: set "
                "--learning_rate lower, or --amp false; the last good checkpoint is kept."
            )


class TrainingProgress:
    """One bar over the whole training, with the time left and the loss."""

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._open)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._step)
        engine.add_event_handler(Events.COMPLETED | Events.EXCEPTION_RAISED, self._close)
        self._bar: tqdm | None = None

    def _open(self, engine: Engine) -> None:
        if self._bar is None:
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
