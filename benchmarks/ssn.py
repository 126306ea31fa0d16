"""A stochastic segmentation network (Monteiro et al., arXiv 2006.06015): the logits of a mask are jointly Gaussian.

Their covariance is of low rank plus a diagonal, so that a whole mask is drawn at once and pixels go together:
``eta = mean + P z + sqrt(D) e`` with standard normal ``z`` (rank) and ``e`` (pixels). The paper's numbers: rank 10, 20
samples in the loss. Sampling by that formula needs no decomposition of the covariance, and so nothing to fall back on.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from monai.bundle import ConfigParser
from monai.networks.layers.factories import Conv
from torch import Tensor, nn

from .peers import Peer, matching_unet

__all__ = ["StochasticSegmentationNetwork", "log_likelihood_loss", "ssn"]

RANK = 10
SAMPLES = 20  # in the loss
FEATURES = 16  # channels that the three heads share
EPS = 1e-5  # least variance of a logit by itself


class StochasticSegmentationNetwork(nn.Module):
    """Heads for mean, diagonal and factor on the features of a network.

    Args:
        features: takes images to (batch, ``FEATURES``, *spatial).
        spatial_dims: 2 or 3.
        num_classes: channels of the mask.
    """

    def __init__(self, features: nn.Module, spatial_dims: int, num_classes: int) -> None:
        super().__init__()
        self.features = features
        heads = (Conv[Conv.CONV, spatial_dims](FEATURES, n * num_classes, 1) for n in (1, 1, RANK))
        self.mean, self.log_variance, self.factor = heads

    def forward(self, image: Tensor, num_samples: int) -> Tensor:
        """Draw logits of masks: (batch, samples, classes, *spatial)."""
        features = F.relu(self.features(image)).float()
        with torch.autocast(image.device.type, enabled=False):  # sums over all pixels need more digits than bfloat16's
            return self._draw(features, num_samples)

    def _draw(self, features: Tensor, num_samples: int) -> Tensor:
        mean, variance = self.mean(features), self.log_variance(features).exp() + EPS
        factor = self.factor(features).unflatten(1, (RANK, -1))
        size = (len(mean), num_samples)
        common = torch.einsum("bsr,br...->bs...", torch.randn(*size, RANK, device=mean.device), factor)
        own = variance.sqrt()[:, None] * torch.randn(*size, *mean.shape[1:], device=mean.device)
        return mean[:, None] + common + own


def log_likelihood_loss(logits: Tensor, raters: Tensor) -> Tensor:
    """``-log (1/S sum_s p(y | eta_s))`` of the mask y of each rater, averaged over raters and images.

    The pixels of a mask are independent given its logits, so that their logarithms add up. Divided by the number of
    pixels, so that the clipping of gradients does the same as for other losses.

    Args:
        logits: (batch, samples, classes, *spatial).
        raters: masks (batch, raters, classes, *spatial) in {0, 1}.
    """
    eta, y = logits.flatten(2).float(), raters.flatten(2).float()
    # log p = y log sigmoid(eta) + (1 - y) log sigmoid(-eta) = y eta - softplus(eta)
    with torch.autocast(logits.device.type, enabled=False):
        log_p = eta @ y.mT - F.softplus(eta).sum(-1, keepdim=True)  # batch, samples, raters
    return (math.log(eta.shape[1]) - log_p.logsumexp(1)).mean() / eta.shape[2]


def ssn(parser: ConfigParser) -> Peer:
    """A stochastic segmentation network on MONAI's ``UNet``, which draws ``num_members`` masks from one pass."""
    features = matching_unet(parser, FEATURES)
    net = StochasticSegmentationNetwork(features, parser["spatial_dims"], parser["num_classes"])

    def loss(image: Tensor, raters: Tensor) -> Tensor:
        return log_likelihood_loss(net(image, SAMPLES), raters)

    def segment(trained: nn.Module, image: Tensor) -> Tensor:
        return trained(image, parser["num_members"]).sigmoid().flatten(1, 2)

    return Peer(net, loss, segment, 1)
