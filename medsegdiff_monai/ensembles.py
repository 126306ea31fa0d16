"""Ensembles of any network of MONAI: several networks, dropout, or flips, in place of samples of a diffusion model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, combinations
from typing import Any, Protocol

import torch
from monai.data import MetaTensor
from monai.inferers import Inferer, SlidingWindowInferer
from monai.networks import eval_mode
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from .errors import InputError

__all__ = ["Dropout", "EnsembleInferer", "Flips", "Networks"]

Segment = Callable[[Tensor, Any], Tensor]  # image (batch, channels, *spatial) to probabilities, network given


class Members(Protocol):
    """How the members of an ensemble come about."""

    def __call__(self, image: Tensor, network: nn.Module, segment: Segment) -> Iterator[Tensor]:
        """Segment an image once for each member; networks are in evaluation mode afterwards as before."""


@dataclass(frozen=True)
class Networks:
    """A deep ensemble (Lakshminarayanan et al., arXiv 1612.01474): a member for each network.

    Args:
        networks: the trained networks; the one that the inferer is called with is not used.
    """

    networks: Sequence[nn.Module]

    def __call__(self, image: Tensor, network: nn.Module, segment: Segment) -> Iterator[Tensor]:
        """Segment with each network."""
        for member in self.networks:
            with eval_mode(member):
                out = segment(image, member)
            yield out


@dataclass(frozen=True)
class Dropout:
    """MC dropout (Gal and Ghahramani, arXiv 1506.02142): passes of one network whose dropout layers are active.

    Args:
        num_members: number of passes.
        seed: of what is dropped; member i drops the same in every image of the same size.
    """

    num_members: int = 5
    seed: int = 0

    def __call__(self, image: Tensor, network: nn.Module, segment: Segment) -> Iterator[Tensor]:
        """Segment so many times.

        Raises:
            InputError: where the network has no dropout.
        """
        layers = [m for m in network.modules() if isinstance(m, _DropoutNd) and m.p > 0]
        if not layers:
            raise InputError("the network has no active dropout, so members are equal: build it with dropout above 0.")
        for member in range(self.num_members):
            drawn = []
            for one in image.split(1):  # so that a case does not depend on those beside it
                with eval_mode(network), _active(layers), _seeded(self.seed * 1_000_003 + member, image.device):
                    drawn.append(segment(one, network))
            yield torch.cat(drawn)


@contextmanager
def _active(layers: Sequence[nn.Module]) -> Iterator[None]:
    for layer in layers:
        layer.train()
    try:
        yield
    finally:
        for layer in layers:
            layer.eval()


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from generators of that seed, and leave those of the process as they were."""
    others = {} if device.type == "cpu" else {"device_type": device.type}
    with torch.random.fork_rng([] if device.type == "cpu" else [device], **others):
        torch.manual_seed(seed)
        yield


@dataclass(frozen=True)
class Flips:
    """Test-time augmentation: the image flipped along each set of axes, the image itself among them.

    Args:
        axes: spatial axes from 0; n of them make 2^n members.
    """

    axes: Sequence[int]

    def __call__(self, image: Tensor, network: nn.Module, segment: Segment) -> Iterator[Tensor]:
        """Segment each flipped image, and flip the result back."""
        for chosen in chain.from_iterable(combinations(self.axes, n) for n in range(len(self.axes) + 1)):
            dims = [2 + axis for axis in chosen]
            with eval_mode(network):
                out = segment(image.flip(dims), network)
            yield out.flip(dims)


def _sigmoid(logits: Tensor) -> Tensor:
    return logits.sigmoid()


def _softmax_of_foreground(logits: Tensor) -> Tensor:
    return logits.softmax(1)[:, 1:]


ACTIVATIONS = {"sigmoid": _sigmoid, "softmax": _softmax_of_foreground}


class EnsembleInferer(Inferer):
    """Make an ensemble of any network that segments in one pass, for a config in place of ``DiffusionEnsembleInferer``.

    What comes out has the same layout, so that fusion, uncertainty, grades and the report are the same::

        "inferer": {"_target_": "medsegdiff_monai.ensembles.EnsembleInferer", "roi_size": "@field_size",
                    "members": {"_target_": "medsegdiff_monai.ensembles.Flips", "axes": [0, 1]}}

    Args:
        members: :class:`Networks`, :class:`Dropout` or :class:`Flips`.
        roi_size: field of the network; images of another size are covered by MONAI's ``SlidingWindowInferer``, which
            pads those that are smaller.
        activation: makes probabilities of what the network returns: ``sigmoid`` of a channel for each class, or
            ``softmax`` where the first channel is the background, which is left out then.
        overlap: share by which windows overlap.
        sw_batch_size: windows that are segmented at a time.

    Raises:
        InputError: for another ``activation``.
    """

    def __init__(
        self,
        members: Members,
        roi_size: Sequence[int],
        activation: str = "sigmoid",
        overlap: float = 0.5,
        sw_batch_size: int = 1,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise InputError(f"activation={activation!r} must be one of {', '.join(ACTIVATIONS)}.")
        self.members = members
        self.activation = ACTIVATIONS[activation]
        self.window = SlidingWindowInferer(tuple(roi_size), sw_batch_size, overlap, mode="gaussian")

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Segment images of any size.

        Args:
            inputs: (batch, channels, *spatial).
            network: called with windows of the image alone.
            *args: not used.
            **kwargs: not used.

        Returns:
            Probabilities (batch, members * classes, *spatial), the classes of a member in a row; a ``MetaTensor``
            where ``inputs`` is one.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        out = torch.cat(list(self.members(image, network, self._segment)), dim=1)
        return MetaTensor(out).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else out

    def _segment(self, image: Tensor, network: Callable) -> Tensor:
        """Probabilities of one pass, (batch, classes, *spatial)."""
        out = self.window(image, lambda window: self.activation(network(window)))
        assert isinstance(out, Tensor)
        return out
