"""Cost of the network: time, multiply-accumulates and memory, beside MONAI's ``DiffusionModelUNet``.

``python -m benchmarks.forward`` prints Markdown. Times are wall-clock on two threads. The passes take turns, and a
ratio is the median over the turns of the ratio within a turn, so that what else the machine does weighs on all alike.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from monai.bundle import ConfigParser
from monai.networks.nets import DiffusionModelUNet
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from medsegdiff_monai.networks import MedSegDiffUNet

THREADS = 2
CONFIGS = Path(__file__).parent.parent / "bundle" / "configs"
VARIANTS = {"S": "s", "B": "b", "L": "l", "++": "plusplus", "S, 3D": "s_3d", "B, 3D": "b_3d"}
FORWARD, TRAINING = ("MONAI", "full", "encoded once"), ("MONAI, training", "full, training")
LIMITS = {"full": ("MONAI", 1.3), "encoded once": ("MONAI", 1.0), "full, training": ("MONAI, training", 1.4)}


def variant_config(variant: str) -> ConfigParser:
    """Return the training config under a variant's overlay, for one class and an RGB image in 2D, one channel in 3D."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / "train.json"), str(CONFIGS / f"variants/medsegdiff_{VARIANTS[variant]}.json")])
    dims = len(parser["roi_size"])
    parser.update({"bundle_root": "", "spatial_dims": dims, "in_channels": 3 if dims == 2 else 1, "num_classes": 1})
    return parser


def build(variant: str, device: str) -> tuple[MedSegDiffUNet, list[Tensor]]:
    """Return the network of a variant and its arguments: noisy mask, timestep, image."""
    parser = variant_config(variant)
    size, in_channels = parser["roi_size"], parser["in_channels"]
    with torch.device(device):
        net = parser.get_parsed_content("network_def")
        arguments = [torch.randn(1, 1, *size), torch.tensor([500]), torch.randn(1, in_channels, *size)]
    return net.eval(), arguments


def build_monai(device: str) -> nn.Module:
    """Return MONAI's diffusion U-Net of B's channels, blocks and attention; mask and RGB image are its input."""
    parser = variant_config("B")
    with torch.device(device):
        return DiffusionModelUNet(
            spatial_dims=2,
            in_channels=4,
            out_channels=1,
            num_res_blocks=parser["num_res_blocks"],
            channels=parser["channels"],
            attention_levels=parser["attention_levels"],
            norm_num_groups=32,
            num_head_channels=parser["num_head_channels"],
        ).eval()


def build_pass(name: str, device: str = "cpu") -> Callable[[], Tensor]:
    """Return one of the passes that are compared, at B's configuration."""
    net, (x, timesteps, image) = build("B", device)
    if name.startswith("MONAI"):
        net = build_monai(device)
        arguments = (torch.cat([x, image], dim=1), timesteps)
    elif name == "encoded once":
        with torch.no_grad():
            arguments = (x, timesteps, net.encode_context(image))
    else:
        arguments = (x, timesteps, image)

    def train() -> Tensor:
        loss = net(*arguments).square().mean()
        loss.backward()
        net.zero_grad()
        return loss

    return train if name in TRAINING else torch.no_grad()(lambda: net(*arguments))


def gmac(run: Callable[..., object], *arguments: Tensor) -> float:
    """Return the multiply-accumulates of a pass in 10^9 (convolutions, matrix products and attention; not the FFT)."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        run(*arguments)
    return counter.get_total_flops() / 2e9


def parameters(net: nn.Module) -> float:
    """Return the number of parameters in 10^6."""
    return sum(p.numel() for p in net.parameters()) / 1e6


def seconds(names: tuple[str, ...], rounds: int) -> dict[str, list[float]]:
    """Time the passes in turns, after one turn of warming up."""
    runs = {name: build_pass(name) for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if turn > 0:
                times[name].append(time.perf_counter() - start)
    return times


def peak_memory(name: str) -> float:
    """Return the peak resident memory in GB of a process of its own that runs a pass once."""
    command = [sys.executable, "-m", "benchmarks.forward", "--peak", name]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    for row in (head, ["---"] * len(head), *rows):
        print("| " + " | ".join(row) + " |", flush=True)
    print()


def print_comparison(rounds: int) -> None:
    """Print time, GMAC and peak memory of B beside MONAI's network."""
    # first the memory: a process starts with the peak that its parent had when it forked
    memory = {name: peak_memory(name) for name in (*FORWARD, *TRAINING)}
    times = seconds(FORWARD, rounds) | seconds(TRAINING, rounds)
    rows = []
    for name in (*FORWARD, *TRAINING):
        ratio, limit = "1", ""
        if name in LIMITS:
            base, bound = LIMITS[name]
            ratio = f"{statistics.median(a / b for a, b in zip(times[name], times[base])):.2f}"
            limit = f"{bound:.1f}"
        cost = f"{gmac(build_pass(name, 'meta')):.1f}" if name in FORWARD else ""
        rows.append([name, f"{statistics.median(times[name]):.2f}", ratio, limit, cost, f"{memory[name]:.2f}"])
    print_table(["B, batch 1, 256×256", "seconds", "ratio", "limit", "GMAC", "peak memory, GB"], rows)


def saved_gib(net: nn.Module, arguments: list[Tensor]) -> float:
    """Return the size in GiB of what a forward pass keeps for the backward pass, parameters left out, in float32."""
    kept: dict[int, Tensor] = {id(p): p for p in net.parameters()}
    sizes: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if id(tensor) not in kept:
            kept[id(tensor)] = tensor  # it stays alive, so that its id is its own
            sizes.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net(*arguments)
    return sum(sizes) / 2**30


def print_variants() -> None:
    """Print parameters, GMAC, what encoding the image once saves, and memory for training, for each variant."""
    rows = []
    for name in VARIANTS:
        parser = variant_config(name)
        net, (x, timesteps, image) = build(name, "meta")
        full, once = gmac(net, x, timesteps, image), gmac(net.encode_context, image)
        shape = "×".join(map(str, parser["roi_size"]))
        row = [name, shape, ", ".join(map(str, parser["channels"])), str(parser["num_res_blocks"])]
        row += [f"{parameters(net):.1f}", f"{full:.1f}", f"{full - once:.1f}", f"{once / full:.0%}"]
        rows.append([*row, f"{saved_gib(net, [x, timesteps, image]):.2f}"])
    head = ["variant", "input", "channels", "blocks", "parameters, M", "GMAC", "encoded once", "saved", "kept, GiB"]
    print_table(head, rows)
    ours, monai = parameters(build("B", "meta")[0]), parameters(build_monai("meta"))
    print(f"Parameters of B: {ours:.1f} M; of MONAI's network: {monai:.1f} M.")


def main() -> None:
    """Print the tables, or with ``--peak`` run one pass and print the peak memory of this process."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3, help="turns that are timed")
    parser.add_argument("--peak", choices=FORWARD + TRAINING, help="run this pass once and print the peak memory in GB")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    if options.peak:
        build_pass(options.peak)()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)  # Linux counts in KiB
        return
    print(f"torch {torch.__version__}, {platform.machine()}, float32, {THREADS} threads, {options.rounds} turns\n")
    print_comparison(options.rounds)
    print_variants()


if __name__ == "__main__":
    main()
