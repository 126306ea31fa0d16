"""Methods on the same data: ours, a U-Net, MONAI's diffusion U-Net, and ``med-seg-diff-pytorch``.

Each is trained for the same time with the bundle's own loader (and so its augmentation), AdamW, gradient clipping,
cosine decay over the time, and averaged weights. The time is that of the CPU, on one thread: other work on the machine
does not count. On a GPU it is that of the clock, and all methods train in bfloat16. ``pip install -e '.[benchmarks]'``
and, for the last method, ``pip install --no-deps med-seg-diff-pytorch`` (its code needs less than it declares).
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.inferers import DiffusionInferer, SlidingWindowInferer
from monai.networks.nets import DiffusionModelUNet, SegResNet, UNet
from monai.networks.schedulers import DDIMScheduler, DDPMScheduler
from monai.utils import convert_to_tensor, set_determinism
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from medsegdiff_monai.files import replacing
from medsegdiff_monai.handlers import WarmStart
from medsegdiff_monai.inferers import DRAWN_TOGETHER
from medsegdiff_monai.objective import mask_loss

from .forward import parameters

__all__ = [
    "CONFIGS",
    "PEERS",
    "Peer",
    "Training",
    "each_rater",
    "finish",
    "flipping",
    "matching_unet",
    "ours",
    "save",
    "segresnet",
    "start",
    "train_in_turns",
    "unet",
    "weights_name",
]

CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"

MONAI_STEPS = 50
PEER_STEPS = 250  # what the public code recommends
UNET_LEARNING_RATE = 0.01  # better in minutes than 0.003 and less, with which 3D hardly begins to learn
SEGRESNET_LEARNING_RATE = 0.002
TURN = 30.0  # seconds of training at a time, where several train in turns


@dataclass
class Peer:
    """A method that segments.

    Attributes:
        module: what is trained.
        loss: loss of images (batch, channels, *spatial) and the masks of their raters (batch, raters, classes,
            *spatial) in {0, 1}.
        segment: probabilities of images on the network's field, given the trained module; members as channels.
        passes: network passes per image.
        learning_rate: first learning rate, where it is not the config's.
        drawn_together: members in a row that are not independent of each other.
        advance: told, before each iteration, which share of the training's time has gone.
        autocasts: whether it computes in the precision of its config by itself.
    """

    module: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    segment: Callable[[nn.Module, Tensor], Tensor]
    passes: int
    learning_rate: float | None = None
    drawn_together: int = 1
    advance: Callable[[float], None] = lambda share: None
    autocasts: bool = False


def each_rater(logits: Tensor, raters: Tensor) -> Tensor:
    """Mean over raters of the Dice + BCE of one mask.

    Args:
        logits: (batch, classes, *spatial).
        raters: masks (batch, raters, classes, *spatial) in {0, 1}.
    """
    return mask_loss(logits[:, None].expand_as(raters).flatten(0, 1), raters.flatten(0, 1))


def one_rater(raters: Tensor) -> Tensor:
    """The mask (batch, classes, *spatial) of a rater who is drawn for each image."""
    return raters[torch.arange(len(raters)), torch.randint(raters.shape[1], (len(raters),))]


def ours(parser: ConfigParser) -> Peer:
    """What ``train.json`` trains, with the config's ``objective``, sampled as ``inference.json`` does."""
    network, loss, prepare, noised = (
        parser.get_parsed_content(name)
        for name in ("network_def", "loss", "train#trainer#prepare_batch", "train#inferer")
    )
    shipped = ConfigParser.load_config_file(CONFIGS / "inference.json")
    members, steps = (parser.get(name, shipped[name]) for name in ("num_members", "num_steps"))  # of an overlay
    parser["validate#inferer"].update({"num_members": members, "num_steps": steps})
    infer = parser.get_parsed_content("validate#inferer")

    def step(image: Tensor, raters: Tensor) -> Tensor:
        inputs, target, _, more = prepare({"image": image, "label": raters})
        return loss(noised(inputs, network, **more), target)

    return Peer(
        network,
        step,
        lambda trained, image: infer(image, trained),
        members * steps,
        None,
        DRAWN_TOGETHER,
        WarmStart(prepare).at,
        autocasts=True,
    )


def matching_unet(parser: ConfigParser, out_channels: int, dropout: float = 0.0) -> UNet:
    """MONAI's ``UNet`` with residual units, as wide as it takes to have about the parameters of our network."""
    levels = len(parser["channels"])
    target = parameters(parser.get_parsed_content("network_def"))

    def build(width: int) -> UNet:
        return UNet(
            parser["spatial_dims"],
            parser["in_channels"],
            out_channels,
            channels=[width * 2**i for i in range(levels)],
            strides=[2] * (levels - 1),
            num_res_units=2,
            dropout=dropout,
        )

    return build(min(range(8, 97, 4), key=lambda width: abs(parameters(build(width)) - target)))


def discriminative(net: nn.Module, parser: ConfigParser, learning_rate: float) -> Peer:
    """A network that gives one mask, trained on Dice and BCE with each rater."""
    window = SlidingWindowInferer(parser["roi_size"], 1, 0.5, mode="gaussian")  # as for ours

    def segment(trained: nn.Module, image: Tensor) -> Tensor:
        whole = list(image.shape[2:]) == list(parser["roi_size"])
        return (trained(image) if whole else window(image, trained)).sigmoid()

    return Peer(net, lambda image, raters: each_rater(net(image), raters), segment, 1, learning_rate)


def flipping(build: Callable[[ConfigParser], Peer]) -> Callable[[ConfigParser], Peer]:
    """Return what builds the same method, whose probability is the mean of an image and its mirror image."""

    def built(parser: ConfigParser) -> Peer:
        peer, dims = build(parser), [2 + axis for axis in parser["flip_axes"]]  # along which training flips

        def segment(trained: nn.Module, image: Tensor) -> Tensor:
            return (peer.segment(trained, image) + peer.segment(trained, image.flip(dims)).flip(dims)) / 2

        return replace(peer, segment=segment, passes=2 * peer.passes)

    return built


def unet(parser: ConfigParser) -> Peer:
    """MONAI's ``UNet``."""
    return discriminative(matching_unet(parser, parser["num_classes"]), parser, UNET_LEARNING_RATE)


def segresnet(parser: ConfigParser) -> Peer:
    """MONAI's ``SegResNet`` with its own numbers of blocks, as wide as it takes to have about our parameters."""
    target = parameters(parser.get_parsed_content("network_def"))

    def build(width: int) -> SegResNet:
        return SegResNet(parser["spatial_dims"], width, parser["in_channels"], parser["num_classes"])

    net = build(min(range(8, 65, 8), key=lambda width: abs(parameters(build(width)) - target)))
    return discriminative(net, parser, SEGRESNET_LEARNING_RATE)


def monai_diffusion(parser: ConfigParser) -> Peer:
    """MONAI's ``DiffusionModelUNet`` of our width on mask and image, epsilon-MSE, sampled by its own DDIM.

    It learns from one rater of each image at a time, who is drawn.
    """
    net = DiffusionModelUNet(
        spatial_dims=parser["spatial_dims"],
        in_channels=parser["in_channels"] + parser["num_classes"],
        out_channels=parser["num_classes"],
        channels=parser["channels"],
        num_res_blocks=parser["num_res_blocks"],
        attention_levels=[False] * len(parser["channels"]),
        norm_num_groups=math.gcd(*parser["channels"]),
        num_head_channels=parser["num_head_channels"],
    )
    inferer = DiffusionInferer(DDPMScheduler(num_train_timesteps=1000))
    sampler = DDIMScheduler(num_train_timesteps=1000)
    sampler.set_timesteps(MONAI_STEPS)

    def loss(image: Tensor, raters: Tensor) -> Tensor:
        mask = one_rater(raters)
        noise, timesteps = torch.randn_like(mask), torch.randint(0, 1000, (len(mask),), device=mask.device)
        out = inferer(2 * mask - 1, net, noise, timesteps, condition=image, mode="concat")
        return (out - noise).square().mean()

    def segment(trained: nn.Module, image: Tensor) -> Tensor:
        noise = torch.randn(len(image), parser["num_classes"], *image.shape[2:], device=image.device)
        out = inferer.sample(noise, trained, sampler, conditioning=image, mode="concat", verbose=False)
        return ((out + 1) / 2).clamp(0, 1)

    return Peer(net, loss, segment, MONAI_STEPS)


def med_seg_diff_pytorch(parser: ConfigParser) -> Peer:
    """The class ``MedSegDiff`` of ``med-seg-diff-pytorch`` at our width: epsilon-MSE, T = 1000, its own sampler.

    It learns from one rater of each image at a time, who is drawn.
    """
    os.environ["TQDM_DISABLE"] = "1"  # a bar for each image
    from med_seg_diff_pytorch import MedSegDiff, Unet

    channels = parser["channels"]
    net = Unet(
        dim=channels[0],
        dim_mults=tuple(c // channels[0] for c in channels),
        full_self_attn=(*[False] * (len(channels) - 1), True),
        image_size=parser["roi_size"][0],
        mask_channels=parser["num_classes"],
        input_img_channels=parser["in_channels"],
    )
    diffusion = MedSegDiff(net, timesteps=1000, sampling_timesteps=PEER_STEPS)

    def segment(trained: nn.Module, image: Tensor) -> Tensor:
        return trained.sample(image).clamp(0, 1)

    return Peer(diffusion, lambda image, raters: diffusion(one_rater(raters), image), segment, PEER_STEPS)


PEERS = {"MONAI UNet": unet, "MONAI DiffusionModelUNet": monai_diffusion, "med-seg-diff-pytorch": med_seg_diff_pytorch}


def _ema(averages: list[Tensor], new: list[Tensor], count: Tensor | int) -> None:
    """Update the average that the bundle's training keeps: tensors of one device and type."""
    weight = max(0.005, 9 / (10 + int(count)))
    if averages[0].is_floating_point():
        torch._foreach_lerp_(averages, new, weight)
    else:
        torch._foreach_copy_(averages, new)


class Training:
    """Training of a peer by CPU time of this process, or by the clock on a GPU; it can be left between iterations.

    Args:
        peer: what to train.
        loader: batches with ``image`` (batch, channels, *spatial) and ``label`` (batch, raters, classes, *spatial).
        seconds: time at which the learning rate has fallen to 0.
        lr: first learning rate.
        device: where to train; on a GPU in bfloat16.
    """

    def __init__(self, peer: Peer, loader: Iterable, seconds: float, lr: float, device: str = "cpu") -> None:
        self.peer, self.seconds, self.lr, self.device = peer, seconds, lr, torch.device(device)
        self.clock = time.process_time if device == "cpu" else time.perf_counter
        self.batches = chain.from_iterable(repeat(loader))
        self.average = AveragedModel(peer.module, multi_avg_fn=_ema, use_buffers=True)
        self.optimizer = torch.optim.AdamW(peer.module.parameters(), lr=lr)
        self.elapsed = 0.0
        self.card = device  # its name, once trained
        self.random = torch.get_rng_state()  # of its own, whoever else trains in between

    def until(self, elapsed: float) -> None:
        """Train until so many seconds have been trained for in all."""
        self.peer.module.train().to(self.device)
        self.average.module.to(self.device)
        autocast = self.device.type != "cpu" and not self.peer.autocasts
        torch.set_rng_state(self.random)
        start = self.clock() - self.elapsed
        while self.elapsed < elapsed:
            batch = next(self.batches)
            self.peer.advance(self.elapsed / self.seconds)
            for group in self.optimizer.param_groups:
                group["lr"] = self.lr * (1 + math.cos(math.pi * self.elapsed / self.seconds)) / 2
            self.optimizer.zero_grad()
            image, raters = (
                convert_to_tensor(batch[key], track_meta=False).to(self.device) for key in ("image", "label")
            )
            with torch.autocast(self.device.type, torch.bfloat16, enabled=autocast):
                loss = self.peer.loss(image, raters)
            loss.backward()
            nn.utils.clip_grad_norm_(self.peer.module.parameters(), 1.0)
            self.optimizer.step()
            self.average.update_parameters(self.peer.module)
            self.elapsed = self.clock() - start
        self.random = torch.get_rng_state()

    def state_dict(self) -> dict[str, Any]:
        """Return what :meth:`load_state_dict` takes up."""
        parts = {"network": self.peer.module, "average": self.average, "optimizer": self.optimizer}
        return {
            "elapsed": self.elapsed,
            "random": self.random,
            **{name: part.state_dict() for name, part in parts.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what an earlier run has left; the batches begin anew."""
        self.elapsed, self.random = state["elapsed"], state["random"]
        self.peer.module.to(self.device)  # before the optimiser's state, which goes to where the weights are
        self.peer.module.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])


def start(
    build: Callable[[ConfigParser], Peer],
    parser: ConfigParser,
    seconds: float,
    rate: float | None = None,
    device: str = "cpu",
) -> tuple[Peer, Training]:
    """Return a method and its training, as a config describes them, with another learning rate where one is given."""
    set_determinism(parser["seed"])
    peer = build(parser)
    rate = rate or peer.learning_rate or parser["learning_rate"]
    return peer, Training(peer, parser.get_parsed_content("train#dataloader"), seconds, rate, device)


def train_in_turns(trainings: Mapping[Path, Training]) -> None:
    """Train several peers a little each, in turns, so that they share what else the machine does.

    Args:
        trainings: by the file of its weights. Beside it, ``.part`` keeps what an interrupted run goes on from.
    """
    parts = {file: file.with_suffix(".part") for file in trainings}
    for file, training in trainings.items():
        if parts[file].is_file():
            training.load_state_dict(torch.load(parts[file], map_location="cpu", weights_only=True))
    while unfinished := {file: t for file, t in trainings.items() if t.elapsed < t.seconds}:
        mark = min(t.elapsed for t in unfinished.values()) + TURN
        for file, training in unfinished.items():
            training.until(min(mark, training.seconds))
            save(training.state_dict(), parts[file])
    for file, training in trainings.items():
        average = training.average
        card = torch.cuda.get_device_name() if training.device.type == "cuda" else training.device.type
        save({"model": average.module.state_dict(), "iterations": int(average.n_averaged), "card": card}, file)
        parts[file].unlink(missing_ok=True)


def finish(training: Training, weights: Path) -> tuple[nn.Module, int]:
    """Train to the end, or read what an earlier run has written.

    Returns:
        The module with its averaged weights, on the CPU and in evaluation mode, and the number of iterations.
    """
    if not weights.is_file():
        train_in_turns({weights: training})
    trained = torch.load(weights, map_location="cpu", weights_only=True)
    module = training.average.module.cpu()
    module.load_state_dict(trained["model"])
    training.card = trained.get("card", "cpu")
    return module.eval(), trained["iterations"]


def weights_name(*run: Any) -> str:
    """The name of the file of weights of a run, from all that shaped it."""
    return " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in run) + ".pt"


def save(content: dict[str, Any], file: Path) -> None:
    """Write a file of weights at once or not at all."""
    with replacing(file) as temporary:
        torch.save(content, temporary)
