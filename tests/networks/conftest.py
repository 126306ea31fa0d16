"""What the network tests share."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from medsegdiff_monai.networks import MedSegDiffUNet


@pytest.fixture(autouse=True)
def _reproducible():
    """The same random numbers for every test, and one thread: on tensors this small, two mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


def _small_net(randomise: bool = True, **changes) -> MedSegDiffUNet:
    """A network of four small levels in eval mode; parameters that start at zero are drawn at random on request."""
    arguments = dict(
        spatial_dims=2, in_channels=3, out_channels=2, channels=(8, 8, 12, 16), num_res_blocks=1,
        attention_levels=(False, False, True, True), num_head_channels=4, ff_size=16, norm_num_groups=4,
    )  # fmt: skip
    net = MedSegDiffUNet(**{**arguments, **changes})
    for parameter in net.parameters() if randomise else ():
        if parameter.dim() > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    return net.eval()


@pytest.fixture(scope="session")
def small_net() -> Callable[..., MedSegDiffUNet]:
    """Factory of small networks; keyword arguments change its defaults."""
    return _small_net
