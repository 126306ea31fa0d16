"""Calibration of a network on the cases that its training validates with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import ignite.distributed as idist
import torch
from ignite.engine import Engine, Events
from monai.metrics import compute_dice
from torch import nn

from ..cases import raters_of
from ..distributed import gather
from ..grading import CaseFacts, ReliabilityCounts, fit_grading, members_agreement, training_range
from ..metrics import known_part

__all__ = ["FitCalibration"]


class FitCalibration:
    """Fit the calibration of probabilities and of the expected Dice at each validation, and keep it with the weights.

    What the training's cases are like, and how they were flipped, is kept too, for those that come to be segmented.
    Attach to the validator.

    Args:
        network: the network that is validated, with a :class:`medsegdiff_monai.networks.TrainingRecord` as ``record``.
        cases: the training's data list; cases without ``facts``, which the check of the data adds, do not count.
        regions: names of the classes, which are kept too, see :class:`medsegdiff_monai.transforms.Regions`.
        flip_axes: spatial axes along which training flips images.
    """

    def __init__(
        self,
        network: nn.Module,
        cases: Sequence[Mapping[str, Any]] = (),
        regions: Mapping[str, Sequence[int]] | None = None,
        flip_axes: Sequence[int] = (),
    ) -> None:
        self.record: Any = network.record
        self.names = list(regions or ())
        self.flip_axes = list(flip_axes)
        self.facts = [CaseFacts.from_json(case["facts"]) for case in cases if "facts" in case]
        self._start()

    def attach(self, engine: Engine) -> None:
        """Attach to a validator."""
        engine.add_event_handler(Events.EPOCH_STARTED, self._start)
        engine.add_event_handler(Events.ITERATION_COMPLETED, self._add)
        engine.add_event_handler(Events.EPOCH_COMPLETED, self)

    def _start(self) -> None:
        self._counts = ReliabilityCounts(len(self.record.grading))
        self._cases: list[tuple[list[float], list[float]]] = []  # agreement and Dice of each class

    def _add(self, engine: Engine) -> None:
        state: Any = engine.state
        for item, output in zip(state.batch, state.output):
            raters = raters_of(item, output)
            maps = [output[name] for name in ("mask", "mean", "member_masks")]
            label, mask, mean, members, *rated = known_part(
                output["label"], *maps, *([] if raters is None else [raters])
            )
            self._counts.add(mean, rated[0].double().mean(0) if rated else label)
            agreement = members_agreement(members, mean, mask)
            dice = compute_dice(mask[None], label[None], ignore_empty=False)[0]
            self._cases.append((agreement.tolist(), dice.tolist()))

    def __call__(self, engine: Engine) -> None:
        """Fit; all ranks together have seen the whole split, and fit the same."""
        self._counts.counts = torch.as_tensor(idist.all_reduce(self._counts.counts))
        cases = gather(self._cases)
        fits = [fit_grading(*zip(*((a[k], d[k]) for a, d in cases))) for k in range(len(self.record.grading))]
        self.record.reliability.copy_(self._counts.table())
        self.record.grading.copy_(torch.tensor(fits))
        self.record.flipped.zero_()[self.flip_axes] = 1
        if self.names:
            self.record.set_names(self.names)
        if self.facts:
            for name in ("extent", "intensity", "size"):
                getattr(self.record, name).copy_(training_range([getattr(facts, name) for facts in self.facts]))
