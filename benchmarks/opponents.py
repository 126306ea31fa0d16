"""Further ways to several masks of an image: dropout while segmenting, and the Probabilistic U-Net.

The Probabilistic U-Net (Kohl et al., arXiv 1806.05034) is in one package on PyPI, ``lightning-uq-box``, as a module of
Lightning, with its own optimiser and a dozen requirements. Its file with the network's parts needs none of these:
``pip install --no-deps lightning-uq-box``. Without it, :data:`HAS_PROBABILISTIC_UNET` is false.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import torch.nn.functional as F
from monai.bundle import ConfigParser
from torch import Tensor, nn
from torch.distributions import Independent, Normal, kl_divergence

from .peers import Peer, each_rater, matching_unet

__all__ = ["HAS_PROBABILISTIC_UNET", "dropout_unet", "probabilistic_unet"]

DROPOUT = 0.2
LATENT = 6  # dimensions, as in the paper
FEATURES = 16  # channels of the U-Net that the latent is joined to
HAS_PROBABILISTIC_UNET = importlib.util.find_spec("lightning_uq_box") is not None


def dropout_unet(parser: ConfigParser) -> Peer:
    """MONAI's ``UNet`` with dropout, which stays on for ``num_members`` passes (Gal and Ghahramani, 1506.02142)."""
    net = matching_unet(parser, parser["num_classes"], DROPOUT)
    members = parser["num_members"]

    def segment(trained: nn.Module, image: Tensor) -> Tensor:
        for module in trained.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        return trained(image.repeat_interleave(members, 0)).sigmoid().unflatten(0, (len(image), members)).flatten(1, 2)

    return Peer(net, lambda image, raters: each_rater(net(image), raters), segment, members)


def _parts() -> ModuleType:
    """The package's file of parts; importing it by name would import all that it requires."""
    package = importlib.util.find_spec("lightning_uq_box")
    assert package is not None and package.submodule_search_locations
    file = Path(package.submodule_search_locations[0]) / "models" / "prob_unet.py"
    spec = importlib.util.spec_from_file_location("lightning_uq_box_prob_unet", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def probabilistic_unet(parser: ConfigParser) -> Peer:
    """MONAI's ``UNet``, with prior, posterior and combination of ``lightning-uq-box``; ELBO; a single class."""
    parts, channels, members = _parts(), parser["in_channels"], parser["num_members"]
    net = nn.ModuleDict(
        {
            "unet": matching_unet(parser, FEATURES),
            "prior": parts.AxisAlignedConvGaussian(channels, parser["channels"], 2, LATENT),
            "posterior": parts.AxisAlignedConvGaussian(channels, parser["channels"], 2, LATENT, posterior=True),
            "combine": parts.Fcomb(FEATURES + LATENT, FEATURES, 1, 4, initializers={"w": "orthogonal"}),
        }
    )

    def loss(image: Tensor, raters: Tensor) -> Tensor:
        number = raters.shape[1]
        prior, features = net["prior"](image).base_dist, net["unet"](image).repeat_interleave(number, 0)
        prior = Independent(Normal(*(x.repeat_interleave(number, 0) for x in (prior.loc, prior.scale))), 1)
        mask = raters.flatten(0, 1)
        posterior = net["posterior"](image.repeat_interleave(number, 0), mask)
        logits = net["combine"](features, posterior.rsample())
        reconstruction = F.binary_cross_entropy_with_logits(logits, mask, reduction="none").flatten(1).sum(1)
        elbo = reconstruction + kl_divergence(posterior, prior)
        return elbo.mean() / mask[0].numel()  # by pixel, as other losses are

    def segment(trained: Any, image: Tensor) -> Tensor:
        latent = trained["prior"](image).sample((members,)).transpose(0, 1).flatten(0, 1)
        features = trained["unet"](image).repeat_interleave(members, 0)
        return trained["combine"](features, latent).sigmoid().unflatten(0, (len(image), members)).flatten(1, 2)

    return Peer(net, loss, segment, 1)
