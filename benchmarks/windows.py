"""Is a member one opinion across the windows of a large image? Measured with members matched and not.

``python -m benchmarks.windows --data_root DIR`` segments cases of ACDC_slices at native size and of Hippocampus3D with
windows of their training's field, once as shipped and once without matching the members of each window to those of
earlier ones. ACDC_slices needs the weights that ``benchmarks.accuracy`` leaves in its ``--work_dir``; the hippocampus
has those of the bundle. Writes ``benchmarks/results/windows.md``.

- **agreement**: where windows overlap, the correlation of what members of a window and of earlier windows have beside
  their mean (1: the same opinions; 0: a member is a patchwork).
- **pairwise Dice** of the fused members' masks: opinions that do not go on are averaged, and members become alike. For
  comparison, that of members in a single window in the middle of the image.
- **Dice of the mean**, which matching must not change.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import compute_dice
from monai.transforms import CenterSpatialCrop
from torch import Tensor

from medsegdiff_monai import windows

from .accuracy import METHODS, ROOT, WORK, configure

METHOD = "+ FF-Parser"
SETS = ("ACDC_slices", "Hippocampus3D")


def correlation(members: Tensor, reference: Tensor) -> float:
    """Correlation of two sets of members (members, classes, *spatial), beside the mean of each set."""
    a, b = (x - x.mean(0) for x in (members, reference))
    return float((a * b).sum() / (a.square().sum() * b.square().sum()).sqrt().clamp(min=1e-12))


@contextmanager
def recorded(matched: bool) -> Iterator[list[float]]:
    """Collect the agreement of windows; members keep their places where they are not to be matched."""
    match, found = windows.best_match, []

    def best_match(members: Tensor, reference: Tensor) -> Tensor:
        order = match(members, reference) if matched else torch.arange(len(members))
        found.append(correlation(members[order], reference))
        return order

    with patch.object(windows, "best_match", best_match):
        yield found


def pairwise_dice(members: Tensor) -> float:
    """Mean over classes and pairs of the Dice of masks (members, classes, *spatial); 1 for two empty masks."""
    first, second = torch.combinations(torch.arange(len(members))).T
    masks = members > 0.5
    return float(compute_dice(masks[first].float(), masks[second].float(), ignore_empty=False).mean())


def measure(config: ConfigParser, network: torch.nn.Module, cases: int) -> list[list[str]]:
    """Return the rows of the table for evenly spaced cases that need several windows."""
    dataset, inferer, postprocess = map(config.get_parsed_content, ("dataset", "inferer", "postprocessing"))
    roi, classes = list(inferer.roi_size), config["num_classes"]
    large = [i for i in range(len(dataset)) if any(s > r for s, r in zip(dataset[i]["image"].shape[1:], roi))]
    chosen = [large[k * len(large) // cases] for k in range(min(cases, len(large)))]
    rows = []
    for matched in (False, True):
        agreement, alike, alone, quality = [], [], [], []
        for i in chosen:
            item = dataset[i]
            image = item["image"].as_tensor()[None]
            with recorded(matched) as found:
                drawn = inferer(image, network)[0]
            members = drawn.unflatten(0, (-1, classes))
            agreement += found
            alike.append(pairwise_dice(members))
            centre = CenterSpatialCrop(roi)(image[0])[None].as_tensor()
            alone.append(pairwise_dice(inferer(centre, network)[0].unflatten(0, (-1, classes))))
            output = postprocess({**item, "pred": MetaTensor(drawn).copy_meta_from(item["image"])})
            mean, label = (output[name].as_tensor()[None] > 0.5 for name in ("mean", "label"))
            quality.append(float(compute_dice(mean, label, ignore_empty=False).mean()))
        figures = [statistics.mean(values) for values in (agreement, alike, alone, quality)]
        rows.append([str(len(chosen)), "yes" if matched else "no", *(f"{value:.3f}" for value in figures)])
    return rows


def main() -> None:
    """Measure the sets, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True)
    parser.add_argument("--data", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--seconds", type=float, default=300, help="of the training on ACDC_slices")
    parser.add_argument("--cases", type=int, default=12)
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "windows.md")
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = ["# Members across windows", "", *__doc__.partition("\n\n")[2].rstrip().splitlines(), ""]
    lines += [
        "| data | cases | matched | agreement | pairwise Dice | in one window | Dice of the mean |",
        "|---" * 7 + "|",
    ]
    for data in options.data:
        config = configure("evaluate", data, options.data_root, 0, METHODS[METHOD][1])
        network = config.get_parsed_content("network_def")
        weights = ROOT / "bundle" / "models" / "model.pt"
        if data == "ACDC_slices":
            weights = options.work_dir / f"{data} {METHOD} 0 {options.seconds:g} ensemble.pt"
        state = torch.load(weights, weights_only=True)
        network.load_state_dict(state.get("model", state))
        with torch.no_grad():
            lines += [f"| {' | '.join([data, *row])} |" for row in measure(config, network.eval(), options.cases)]
    options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines[-4:]))


if __name__ == "__main__":
    main()
