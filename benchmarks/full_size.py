"""The recipe for trainings at full size, with estimates: ``python -m benchmarks.full_size`` writes ``full_size.md``.

Nothing is trained. Multiply-accumulates and activations are counted on the real configs, without data; what a card
makes of them is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from monai.bundle import ConfigParser

from medsegdiff_monai.files import write_atomically

from .accuracy import ROOT
from .forward import gmac, parameters, saved_gib
from .peers import CONFIGS

PAGE = ROOT / "benchmarks" / "full_size.md"
TFLOPS, USED = 312, 0.3  # bfloat16 of an A100, and the share of it that a training reaches: both assumed
LEAST = 0.05  # seconds of a step, which small networks do not get below: assumed
MEMORY = 80  # GB of the card
FILLED = 0.75  # of it at most, by the estimate
SHOWN = 800_000  # images in all, as many as 100 000 iterations of batch 8
VARIANTS = {"S": "medsegdiff_s", "B": "medsegdiff_b"}
BYTES = 20  # a parameter: weight, gradient, two of AdamW, average; float32


@dataclass(frozen=True)
class Recipe:
    """A data set and its training.

    Attributes:
        title: of the data set.
        prepare: command that makes the data set ``DATA`` of the download ``RAW``.
        images: that are trained on, about.
        overlay: of the data set.
        variants: of the network; the overlay's own where there are none.
        note: where the data are, and what their number rests on.
    """

    title: str
    prepare: str
    images: int
    overlay: str
    variants: tuple[str, ...]
    note: str

    def configs(self, variant: str = "", base: str = "train") -> list[str]:
        """The configs of a training, in their order."""
        files = [f"{base}.json", f"datasets/{self.overlay}.json"]
        return files + ([f"variants/{VARIANTS[variant]}.json"] if variant else [])


PREPARE = "medsegdiff prepare {} --source RAW --output DATA"
RECIPES = (
    Recipe(
        "REFUGE-2 (optic disc and cup)", PREPARE.format("refuge"), 1200, "refuge2", ("S", "B"),
        "refuge.grand-challenge.org; the official split.",
    ),
    Recipe(
        "BraTS-2021 (whole tumour, axial slices)", PREPARE.format("brats --slices 2D --regions whole"), 112_000,
        "brats2021", ("S", "B"), "synapse.org, syn25829067: 1251 labelled cases, 64 % to train on, about 140 slices "
        "with brain each.",
    ),
    Recipe(
        "DDTI (thyroid nodules)", PREPARE.format("ddti"), 307, "ddti", ("S", "B"),
        "cimalab.unal.edu.co: 480 pictures, 64 % to train on.",
    ),
    Recipe(
        "LIDC-IDRI (lung nodules, four radiologists)",
        "python -m benchmarks.lidc_full --source RAW/LIDC-IDRI-slices --output DATA", 9290, "lidc", ("",),
        "github.com/periclesanfe/Pulmoseg: 15 486 slices of 128 × 128, 60 % of the patients to train on.",
    ),
)  # fmt: skip

TEXT = f"""# Trainings at full size

Written by `python -m benchmarks.full_size`. **None of these trainings has been run: hours and memory are estimates.**
Multiply-accumulates and activations are counted on the configs. Assumed are a card of {TFLOPS} TFLOP/s in bfloat16 with
{MEMORY} GB (an A100), of which a training uses {USED:.0%}; that a training step costs three forward passes, of the
image once and of each of its masks; and that no step takes less than {LEAST * 1000:.0f} ms (an H200 needs about as
much for the last network, see `results/gpu.md`, and half of it in bfloat16 with `--compile true`). Loading of data and
validation come on top. Memory is what a forward pass keeps, in bfloat16, for all masks of a batch, and {BYTES} bytes
for each parameter. Where a batch would fill more than {FILLED:.0%} of the card, the command accumulates smaller ones.

Each training shows about {SHOWN:,} images, as many as 100,000 iterations of batch 8. An interrupted one goes on with
`--resume true`. On several cards: `torchrun --nproc_per_node N -m monai.bundle run training`, with
`bundle/configs/multi_gpu_train.json` as the last config. The commands run in a clone, in an environment with
`pip install -e .`; the tests run them at toy size on the CPU.
"""


class Estimate(NamedTuple):
    """What a training costs, by its config.

    Attributes:
        parameters: in 10^6.
        gmac: 10^9 multiply-accumulates of an image in a training step.
        epochs: of the training.
        batch: images that fit.
        accumulated: such batches in a step.
        hours: on the assumed card.
        memory: GB.
    """

    parameters: float
    gmac: float
    epochs: int
    batch: int
    accumulated: int
    hours: float
    memory: float


def estimate(recipe: Recipe, variant: str) -> Estimate:
    """Estimate a training from its configs."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / file) for file in recipe.configs(variant)])
    parser.update({"bundle_root": ""})
    field, masks, batch = (parser.get_parsed_content(k) for k in ("field_size", "train_num_members", "batch_size"))
    with torch.device("meta"):
        net = parser.get_parsed_content("network_def")
        mask = torch.randn(1, parser["num_classes"], *field)
        arguments = [mask, torch.tensor([500]), torch.randn(1, parser["in_channels"], *field)]
    whole, once = gmac(net, *arguments), gmac(net.encode_context, arguments[-1])
    cost = 3 * (once + masks * (whole - once))
    epochs = max(1, round(SHOWN / recipe.images))
    size = parameters(net)
    kept = saved_gib(net, arguments) * 2**30 / 1e9 / 2 * masks  # of an image, at most
    fixed = size * BYTES / 1e3
    small = batch
    while small > 1 and small * kept + fixed > FILLED * MEMORY:
        small //= 2
    shown = recipe.images * epochs
    hours = max(2 * cost * shown / (TFLOPS * 1e3 * USED), LEAST * shown / small) / 3600
    return Estimate(size, cost, epochs, small, batch // small, hours, small * kept + fixed)


def command(recipe: Recipe, variant: str, found: Estimate) -> list[str]:
    """The commands that prepare, train, evaluate."""
    models = f"OUT/{recipe.overlay}{f'_{variant.lower()}' if variant else ''}"

    def files(base: str) -> str:
        return ",".join(f"'bundle/configs/{file}'" for file in recipe.configs(variant, base))

    batches = f" --batch_size {found.batch} --accumulation_steps {found.accumulated}" if found.accumulated > 1 else ""
    interval = max(1, found.epochs // 10)
    return [
        "python -m monai.bundle run training --dataset_dir DATA --amp bfloat16 \\",
        f"  --max_epochs {found.epochs} --val_interval {interval}{batches} \\",
        f"  --output_dir {models} --ckpt_dir {models}/models \\",
        f'  --config_file "[{files("train")}]"',
        "python -m monai.bundle run evaluating --dataset_dir DATA --amp bfloat16 --eval_split test --num_members 16 \\",
        f"  --output_dir {models}/test --checkpoint {models}/models/model.pt \\",
        f'  --config_file "[{files("evaluate")}]"',
    ]


def page() -> str:
    """The page."""
    heads = ["data", "variant", "parameters, M", "GMAC / image", "images / step", "epochs", "hours, estimated"]
    heads.append("GB, estimated")
    table = ["", f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    parts: list[str] = []
    for recipe in RECIPES:
        parts += ["", f"## {recipe.title}", "", f"{recipe.note}", "", "```", recipe.prepare, "```"]
        for variant in recipe.variants:
            found = estimate(recipe, variant)
            parts += ["", f"Variant {variant}:" if variant else "With the overlay's own network:", ""]
            parts += ["```", *command(recipe, variant, found), "```"]
            step = f"{found.batch} × {found.accumulated}" if found.accumulated > 1 else str(found.batch)
            cells = [recipe.title, variant, f"{found.parameters:.1f}", f"{found.gmac:.0f}", step, str(found.epochs)]
            table.append("| " + " | ".join([*cells, f"{found.hours:.1f}", f"{found.memory:.1f}"]) + " |")
    return "\n".join([*TEXT.splitlines(), *table, *parts]) + "\n"


def main(output: Path = PAGE) -> None:
    """Write the page."""
    write_atomically(output, page().encode())


if __name__ == "__main__":
    main()
