"""One ensemble of several weights, such as those of different folds or seeds: the members are shared among them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from monai.utils import ensure_tuple
from torch import Tensor, nn

from .errors import InputError
from .grading import training_range
from .inferers import ANTITHETIC, DRAWN_TOGETHER, DiffusionEnsembleInferer, Views
from .networks import TrainingRecord
from .weights import load_weights, network_weights

__all__ = ["DeepEnsemble", "DeepEnsembleInferer", "load_checkpoints", "merge_records", "network_for"]


class DeepEnsemble(nn.Module):
    """Networks of one architecture, each with weights of its own (Lakshminarayanan et al., arXiv 1612.01474).

    Args:
        network: the first one; the others begin as copies of it.
        number: how many there are.

    Attributes:
        networks: all of them.
        record: what their trainings learnt together, see :func:`merge_records`.
    """

    record: TrainingRecord

    def __init__(self, network: nn.Module, number: int) -> None:
        super().__init__()
        self.networks = nn.ModuleList([network, *(copy.deepcopy(network) for _ in range(number - 1))])
        record = getattr(network, "record", None)
        if isinstance(record, TrainingRecord):
            self.record = copy.deepcopy(record)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Which of the networks is asked depends on the member, which only :class:`DeepEnsembleInferer` knows.

        Raises:
            InputError: always.
        """
        raise InputError(
            f"checkpoint lists {len(self.networks)} files of weights, which this inferer does not share among its "
            "members: name one, or set inferer#_target_ to medsegdiff_monai.deep_ensemble.DeepEnsembleInferer."
        )


def network_for(
    network: nn.Module, checkpoint: str | Sequence[str], device: str | torch.device | None = None
) -> nn.Module:
    """Return what is needed for the weights, on a device.

    Args:
        network: the network that they are of.
        checkpoint: one file of weights, or several.
        device: where it runs; None: where it is.

    Returns:
        The network itself for one file, a :class:`DeepEnsemble` for several.
    """
    number = len(ensure_tuple(checkpoint))
    return (network if number == 1 else DeepEnsemble(network, number)).to(device)


def load_checkpoints(checkpoint: str | Sequence[str], network: nn.Module) -> None:
    """Load what :func:`network_for` has made for these files.

    Args:
        checkpoint: one file of weights, or several.
        network: the network, or the ensemble.

    Raises:
        InputError: for a missing, truncated or foreign file, and weights that do not fit the network or each other.
    """
    files = ensure_tuple(checkpoint)
    networks = list(network.networks) if isinstance(network, DeepEnsemble) else [network]
    for file, one in zip(files, networks, strict=True):
        load_weights(file, one, network_weights(file, one))
    if isinstance(network, DeepEnsemble) and hasattr(network, "record"):
        merge_records(network.record, [one.record for one in networks], files)


def merge_records(merged: TrainingRecord, records: Sequence[Any], files: Sequence[str | Path]) -> None:
    """Put together what several trainings learnt of their results.

    Calibration curves, and scales and shifts of the expected Dice, are averaged; a class of which one training knows
    none has none. No training has seen the errors of the whole ensemble, so that the expected Dice has no interval.
    The range of cases is that of all trainings together; the axes of flips are those that all of them flipped.

    Args:
        merged: where it is put.
        records: of each training.
        files: their weights, for messages.

    Raises:
        InputError: where they name different classes.
    """
    named = {tuple(names): file for record, file in zip(records, files) if (names := record.names())}
    if len(named) > 1:
        (first, one), (second, other) = list(named.items())[:2]
        raise InputError(
            f"{other}: has the classes {', '.join(second)}, but {one} has {', '.join(first)}: give weights that were "
            "trained on the same classes, in the same order."
        )
    for names in named:
        merged.set_names(names)
    curves, grading = (torch.stack([getattr(r, name) for r in records]) for name in ("reliability", "grading"))
    known = (curves.amax(2) > 0).all(0)
    merged.reliability.copy_(curves.mean(0) * known[:, None])
    graded = (grading[..., 0] > 0).all(0)
    merged.grading.copy_(grading.mean(0) * graded[:, None])
    merged.grading[:, 2] = 0
    merged.flipped.copy_(torch.stack([record.flipped for record in records]).amin(0))
    for name in ("extent", "intensity", "size"):
        ranges = [ends for record in records if (ends := getattr(record, name)).any()]
        if ranges:
            getattr(merged, name).copy_(training_range([end for ends in ranges for end in ends]))


class DeepEnsembleInferer(DiffusionEnsembleInferer):
    """A :class:`DiffusionEnsembleInferer` that shares its members among the networks of a :class:`DeepEnsemble`.

    Of K networks, member i is drawn from number i modulo K, with the noise that member i always has. Five members of
    two weights are three and two, and as many passes as five members of one. Where K is a multiple of four, so that all
    members of a network would see the same view of the image, they see both in turn. Any other network is sampled as
    ever.

    Raises:
        InputError: at the call, for fewer members than networks.
    """

    def _ensemble(self, image: Tensor, network: Any) -> Tensor:
        if isinstance(network, DeepEnsemble) and self.num_members < len(network.networks):
            raise InputError(
                f"num_members={self.num_members} is fewer than the {len(network.networks)} files of weights in "
                "checkpoint, of which each makes one at least."
            )
        return super()._ensemble(image, network)

    def views(self, members: range, network: Any) -> Views:
        """Return how members, of those that one network draws, see the image."""
        number = members.step  # of networks
        if number % DRAWN_TOGETHER == 0:
            rank, network_number = divmod(members.start, number)  # rank among the members of this network
            first = network_number + ANTITHETIC * rank
            members = range(first, first + ANTITHETIC * len(members), ANTITHETIC)
        return super().views(members, network)

    def _encode(self, image: Tensor, members: range, network: Any) -> Any:
        if not isinstance(network, DeepEnsemble):
            return super()._encode(image, members, network)
        shares = _shares(members, len(network.networks))
        return [
            super(DeepEnsembleInferer, self)._encode(image, members[m], n) for n, m in zip(network.networks, shares)
        ]

    def _windows(self, image: Tensor, noise: Tensor, members: range, network: Any) -> Tensor:
        if not isinstance(network, DeepEnsemble):
            return super()._windows(image, noise, members, network)
        out = noise.new_empty(len(image), *noise.shape[:2], *image.shape[2:])
        for one, mine in zip(network.networks, _shares(members, len(network.networks))):
            if members[mine]:
                out[:, mine] = super()._windows(image, noise[mine], members[mine], one)
        return out

    def _denoise(self, noise: Tensor, members: range, context: Any, network: Any) -> Tensor:
        if not isinstance(network, DeepEnsemble):
            return super()._denoise(noise, members, context, network)
        out = torch.empty_like(noise)
        for one, encoded, mine in zip(network.networks, context, _shares(members, len(network.networks))):
            if members[mine]:
                out[:, mine] = super()._denoise(noise[:, mine], members[mine], encoded, one)
        return out


def _shares(members: range, number: int) -> list[slice]:
    """Which of consecutive members each of the networks draws."""
    return [slice((k - members.start) % number, None, number) for k in range(number)]
