"""Checkpoints of a training run, and resuming from them."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from torch import nn

from ..errors import InputError
from ..running import RunGuard
from ..settings import as_bool
from ..weights import load_checkpoint, load_weights, save_checkpoint

__all__ = ["TrainingCheckpoint"]

logger = logging.getLogger(__name__)


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

    Attach to the trainer (:mod:`.order`). A run that starts anew removes the checkpoints of an earlier one as soon as
    it has its own. While it runs, no other training writes to the folder; where it is stopped, it says how to go on.
    (Ignite's ``Checkpoint`` neither keeps others out of the folder nor falls back on an older file where the newest is
    damaged.)

    Args:
        objects: what to save, by name: networks, optimiser, learning-rate schedule.
        validator: validator whose best score is kept, too.
        ckpt_dir: folder of ``checkpoint_epoch=N.pt``.
        resume: whether to continue from the newest checkpoint there that can be read; without any, training starts
            anew.
        n_saved: how many to keep.
    """

    def __init__(
        self, objects: dict[str, Any], validator: Engine, ckpt_dir: str, resume: bool | str = False, n_saved: int = 2
    ) -> None:
        self.objects = {**objects, "best": _BestMetric(validator)}
        self.ckpt_dir = Path(ckpt_dir)
        self.resume = as_bool(resume)
        self.n_saved = n_saved
        self._last = 0  # epoch that this run has saved, or gone on from

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        RunGuard(self.ckpt_dir, self._advice).attach(engine)
        if self.resume:
            engine.add_event_handler(Events.STARTED, self._load)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self._save)

    def _advice(self) -> str:
        """What to do after the training was stopped."""
        if not self._last:
            return "No epoch was finished and nothing is saved: run the same command again."
        saved = f"The training up to epoch {self._last} is saved in {self.ckpt_dir}"
        return f"{saved}: the same command with --resume true continues from there."

    def _files(self) -> dict[int, Path]:
        """Checkpoints by their epoch."""
        found = ((re.fullmatch(r"checkpoint_epoch=(\d+)\.pt", p.name), p) for p in self.ckpt_dir.glob("*.pt"))
        return {int(match[1]): path for match, path in found if match}

    def _items(self, engine: Engine) -> dict[str, Any]:
        """What to save: MONAI's trainer has a scaler only while it runs, and only for float16."""
        scaler = getattr(engine, "scaler", None)
        return self.objects if scaler is None else {**self.objects, "scaler": scaler}

    @idist.one_rank_only()
    def _save(self, engine: Engine) -> None:
        content = {name: item.state_dict() for name, item in self._items(engine).items()}
        save_checkpoint(self.ckpt_dir / f"checkpoint_epoch={engine.state.epoch}.pt", content)
        self._last = engine.state.epoch
        for epoch, path in self._files().items():
            if not engine.state.epoch - self.n_saved < epoch <= engine.state.epoch:
                path.unlink(missing_ok=True)  # others may have made room

    def _newest(self) -> tuple[Path, int, dict[str, Any]] | None:
        """The newest checkpoint that can be read, its epoch and its content."""
        files = self._files()
        for epoch in sorted(files, reverse=True):
            try:
                return files[epoch], epoch, load_checkpoint(files[epoch])
            except InputError as error:
                if epoch == min(files):
                    raise
                logger.warning(f"{error} Using the previous checkpoint.")
        return None

    def _load(self, engine: Engine) -> None:
        if engine.state.iteration:  # a further round of a federation, which has sent its weights
            return
        found = self._newest()
        if found is None:
            logger.info(f"No checkpoint in {self.ckpt_dir}: training starts from the beginning.")
            return
        path, newest, content = found
        length, max_epochs = engine.state.epoch_length, engine.state.max_epochs or 0
        if newest >= max_epochs:
            raise InputError(f"{path}: max_epochs={max_epochs} are done: set --max_epochs higher to continue.")
        for name, item in self._items(engine).items():
            if isinstance(item, nn.Module):
                load_weights(path, item, content.get(name))
            elif name in content:
                item.load_state_dict(content[name])
            else:
                logger.info(f"{path}: holds no {name}, which starts afresh.")
        # by epochs: a checkpoint ends one, and another batch size changes the number of iterations
        self._last = newest
        engine.load_state_dict({"epoch": newest, "epoch_length": length, "max_epochs": max_epochs})
        logger.info(f"Resumed from {path}")
