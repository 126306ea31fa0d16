"""Curves of a training in TensorBoard."""

from __future__ import annotations

import logging
from pathlib import Path

import ignite.distributed as idist
from ignite.engine import Engine, Events
from monai.handlers import TensorBoardStatsHandler, from_engine
from monai.utils import optional_import

__all__ = ["TensorBoardLog"]

logger = logging.getLogger(__name__)


class TensorBoardLog:
    """Write loss and validation metrics for TensorBoard, where that is installed, by MONAI's handler.

    Attach to the trainer. Nothing is written before the training starts.

    Args:
        output_dir: events go to ``<output_dir>/tensorboard``.
        validator: engine whose metrics are written, too.
    """

    def __init__(self, output_dir: str, validator: Engine) -> None:
        self.log_dir = Path(output_dir) / "tensorboard"
        self.validator = validator
        self._open = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.STARTED, self)

    @idist.one_rank_only()
    def __call__(self, engine: Engine) -> None:
        """Open the log, or say why there is none; once, though a trainer may be run several times."""
        if self._open:
            return
        self._open = True
        writer_class, installed = optional_import("torch.utils.tensorboard", name="SummaryWriter")
        if not installed:
            logger.info("No TensorBoard log: it is not installed (pip install 'medsegdiff-monai[tracking]').")
            return
        writer = writer_class(log_dir=str(self.log_dir))
        loss = from_engine("loss", first=True)
        TensorBoardStatsHandler(writer, tag_name="train_loss", epoch_log=False, output_transform=loss).attach(engine)
        TensorBoardStatsHandler(writer, iteration_log=False).attach(self.validator)
        engine.add_event_handler(Events.COMPLETED, lambda: writer.flush())
        logger.info(f"TensorBoard log: tensorboard --logdir {self.log_dir}")
