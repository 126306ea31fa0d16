"""Variants of the paper: they compose with every data set, run forward and take a training step.

Parameters and activations are on the ``meta`` device: shapes are real, memory is not needed.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from monai.bundle import ConfigParser
from monai.transforms import Compose

from medsegdiff_monai.networks import DynamicConditioning, FFParser
from medsegdiff_monai.networks.medsegdiff_unet import MaskGate
from medsegdiff_monai.objective import ensemble_score, noise_loss
from medsegdiff_monai.schedulers import DDPMScheduler

from .conftest import CONFIGS, ROOT

DATASETS = {2: ("brats2021", "ddti", "generic_2d", "lgg_mri", "mni152", "refuge2"), 3: ("brats2021_3d", "hippocampus")}
VARIANTS = {
    2: ("medsegdiff_s", "medsegdiff_b", "medsegdiff_l", "medsegdiff_plusplus"),
    3: ("medsegdiff_s_3d", "medsegdiff_b_3d"),
}
PAIRS = [(d, v) for dims in (2, 3) for d, v in product(DATASETS[dims], VARIANTS[dims])]


def compose(*overlays: str) -> ConfigParser:
    """train.json under the named overlays, in their order."""
    found = [next(CONFIGS.rglob(f"{name}.json")) for name in overlays]
    parser = ConfigParser()
    parser.read_config([str(file) for file in [CONFIGS / "train.json", *found]])
    parser.update({"bundle_root": str(ROOT / "bundle"), "train#dataset#data": []})
    return parser


def count(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize("paper", [False, True], ids=["default", "paper"])
@pytest.mark.parametrize("dataset, variant", PAIRS)
def test_every_pair_takes_a_training_step(dataset, variant, paper):
    parser = compose(dataset, variant, *(["paper"] if paper else []))
    size = parser["roi_size"]
    assert size == {2: [256, 256]}.get(len(size), size)
    with torch.device("meta"):
        network = parser.get_parsed_content("network_def")
        image = torch.empty(1, parser["in_channels"], *size)
        mask = torch.empty(1, parser["num_classes"], *size)
        optimizer = torch.optim.AdamW(network.parameters(), lr=parser["learning_rate"])
        times = torch.empty(1)
    out = network(mask, times, image)
    assert out.shape == mask.shape
    loss = parser.get_parsed_content("loss")
    loss(out, mask[:, None] if not paper else mask).backward()
    assert all(p.grad is not None and p.grad.shape == p.shape for p in network.parameters())
    optimizer.step()
    assert parser["learning_rate"] == 1e-4
    assert isinstance(parser.get_parsed_content("train#preprocessing"), Compose)
    assert loss is (noise_loss if paper else ensemble_score)


def test_the_paper_overlay_sets_the_papers_sampling():
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "inference.json"), str(CONFIGS / "variants" / "paper.json")])
    parser["bundle_root"] = ""
    inferer = parser.get_parsed_content("inferer")
    assert (inferer.num_steps, inferer.num_members) == (100, 25)
    scheduler = inferer.scheduler
    assert type(scheduler) is DDPMScheduler and scheduler.prediction_type == "epsilon"
    linear = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)  # Ho et al., arXiv 2006.11239, section 4
    torch.testing.assert_close(scheduler.betas, linear, rtol=1e-5, atol=0)
    assert parser.get_parsed_content("postprocessing").transforms[-2].fusion == "staple"


def test_the_paper_overlay_trains_as_the_paper_does():
    """Noise is predicted, from masks that raters drew, at any timestep alike, by a network without our additions."""
    parser = compose("generic_2d", "paper")
    prepare = parser.get_parsed_content("train#trainer#prepare_batch")
    assert (prepare.objective.last_share, prepare.objective.own_guess, prepare.num_members) == (0.0, 0.0, 1)
    network = parser.get_parsed_content("network_def")
    assert (network.stem_stride, network.mask_level, network.light_decoder) == (1, 0, False)
    assert not any(isinstance(m, MaskGate) for m in network.modules())
    assert any(isinstance(m, MaskGate) for m in compose("generic_2d").get_parsed_content("network_def").modules())
    assert parser["learning_rate"] == 1e-4


@pytest.mark.parametrize("variant, downsamplings", [("s", 4), ("b", 5), ("l", 6), ("plusplus", 6)])
def test_downsamplings_are_the_papers(variant, downsamplings):
    assert len(compose(f"medsegdiff_{variant}")["channels"]) - 1 == downsamplings


def test_each_ablation_is_one_variable_and_takes_its_parameters_along():
    ablations = ("without_dynamic_conditioning", "without_ff_parser")
    networks = [
        compose("generic_2d", *overlays).get_parsed_content("network_def")
        for overlays in (*((name,) for name in ablations), ())
    ]
    kinds = [{type(m) for m in network.modules()} & {FFParser, DynamicConditioning} for network in networks]
    assert kinds == [set(), {DynamicConditioning}, {DynamicConditioning, FFParser}]
    sizes = [count(network) for network in networks]
    assert sizes == sorted(set(sizes))
    for name in ablations:
        assert len(ConfigParser.load_config_file(CONFIGS / "variants" / f"{name}.json")) == 1
