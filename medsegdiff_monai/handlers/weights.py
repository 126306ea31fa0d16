"""Weights of a network: averaged, loaded, and the best ones kept."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ignite.distributed as idist
from ignite.engine import Engine, Events
from ignite.handlers.ema_handler import EMAHandler
from monai.handlers import CheckpointLoader
from monai.utils import ensure_tuple
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from ..deep_ensemble import load_checkpoints
from ..engines import optimizer_step
from ..errors import InputError
from ..weights import load_weights, network_weights, save_checkpoint, with_fresh_layers

__all__ = ["BestModelSaver", "ModelEMA", "WeightsLoader"]

logger = logging.getLogger(__name__)


class ModelEMA(EMAHandler):
    """Ignite's ``EMAHandler`` for an averaged network that the config has made, set to the network when a run starts.

    Ignite copies the weights when the handler is built, which is before a checkpoint is loaded. The momentum falls as
    9 / (10 + step) to its final value (as in TensorFlow's ``ExponentialMovingAverage``), so that short runs are not
    held back by their first weights; it depends on the optimiser's step alone, so that a resumed run goes on. The count
    starts anew where the same trainer is run again with other weights, as in the rounds of a federation. (torch's
    ``AveragedModel`` is a wrapper: it hides the network's ``encode_context`` and ``record``, and renames its weights.)

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
        engine.add_event_handler(Events.STARTED, self._start)
        super().attach(engine, warn_if_exists=False)

    def _start(self, engine: Engine) -> None:
        self.ema_model.load_state_dict(self.model.state_dict())
        # a checkpoint is loaded later, and its steps are part of this run
        self.first_step = (optimizer_step(engine) or 0) if engine.state.iteration else 0

    def _update_ema_model(self, engine: Engine, name: str) -> None:
        step = optimizer_step(engine)
        if step is not None:
            momentum = max(self.momentum, 9 / (10 + step - self.first_step))
            setattr(engine.state, name, momentum)
            # Ignite goes from weight to weight: on a GPU, as many kernels to start as half of a small network's step
            get_ema_multi_avg_fn(1 - momentum)(list(self.ema_model.parameters()), list(self.model.parameters()), step)
            for averaged, buffer in zip(self.ema_model.buffers(), self.model.buffers()):
                averaged.copy_(buffer)


class WeightsLoader(CheckpointLoader):
    """Load the weights of a network when a run starts; MONAI's ``CheckpointLoader`` with plain error messages.

    Args:
        load_path: file of a state dict, or one that :func:`medsegdiff_monai.weights.network_weights` knows; without
            ``adapt`` also several, see :func:`medsegdiff_monai.deep_ensemble.load_checkpoints`.
        model: network to load it into.
        adapt: layers that depend on the channels of image and mask, which may be others in the file, as may the size of
            the field (:func:`medsegdiff_monai.weights.with_fresh_layers`); without any, the weights must fit as they
            are.
    """

    def __init__(self, load_path: str | Sequence[str], model: nn.Module, adapt: Sequence[str] = ()) -> None:
        super().__init__(load_path=load_path, load_dict={"model": model})  # type: ignore[arg-type]
        self.model = model
        self.adapt = adapt

    def __call__(self, engine: Engine) -> None:
        """Load the weights.

        Raises:
            InputError: for a missing or truncated file, or weights of another architecture.
        """
        if engine.state.iteration:  # a further round of a federation, which has sent its weights
            return
        if self.adapt:
            weights = network_weights(self.load_path, self.model)
            load_weights(self.load_path, self.model, with_fresh_layers(self.load_path, self.model, weights, self.adapt))
        else:
            load_checkpoints(self.load_path, self.model)
        logger.info(f"Restored all variables from {', '.join(ensure_tuple(self.load_path))}")


class BestModelSaver:
    """Write the weights after each validation that is the best so far: a plain state dict, replaced atomically.

    Attach to the trainer (:mod:`.order`): only validations of the training count, not those of weights that others
    sent, as in a federation. The key metric of the validator decides, the higher the better. Where
    there are no cases to validate on, the weights of each epoch are written.

    Args:
        model: network whose weights are written.
        path: file to write.
        validator: engine that validates during the training.
    """

    def __init__(self, model: nn.Module, path: str, validator: Engine) -> None:
        self.model = model
        self.path = Path(path)
        self.validator = validator
        self._written = False

    def attach(self, engine: Engine) -> None:
        """Attach to a trainer."""
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)
        engine.add_event_handler(Events.COMPLETED, self._look)

    @idist.one_rank_only()
    def __call__(self, engine: Engine) -> None:
        """Write the weights if the validation of this epoch was the best."""
        state: Any = self.validator.state  # MONAI's workflows add to it
        unjudged = not len(getattr(self.validator, "data_loader", [0]))
        if unjudged or state.best_metric_epoch == engine.state.epoch:
            save_checkpoint(self.path, self.model.state_dict())
            self._written = True

    @idist.one_rank_only()
    def _look(self, engine: Engine) -> None:
        if self._written and not self.path.is_file():
            raise InputError(
                f"{self.path}: was removed during training: its last checkpoint in the same folder can be given as "
                "--checkpoint."
            )
