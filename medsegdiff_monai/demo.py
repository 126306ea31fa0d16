"""The demo: real MRI, three bundle commands, and a score."""

from __future__ import annotations

import csv
import shlex
import subprocess
import sys
from pathlib import Path

from .data.raw.mni152 import write_mni152_slices
from .errors import InputError
from .settings import find_bundle_root

__all__ = ["run_demo"]


def _bundle(run_id: str, config: str, **variables: object) -> None:
    """Print a bundle command as a user would type it, and run it.

    Raises:
        InputError: where it fails.
    """
    command = ["-m", "monai.bundle", "run", run_id, "--config_file", config]
    for name, value in variables.items():
        command += [f"--{name}", str(value)]
    print(f"\n$ python {shlex.join(command)}", flush=True)
    if subprocess.run([sys.executable, *command]).returncode:
        raise InputError(f"the demo stopped: `{run_id}` failed, its message is above.")


def run_demo(output_dir: str) -> None:
    """Train, evaluate and segment, and print Dice on the held-out slabs, seconds per image and where the results are.

    Args:
        output_dir: folder to write to.

    Raises:
        InputError: where a command fails.
    """
    root = find_bundle_root()
    out = Path(output_dir)
    data = write_mni152_slices(out / "data")

    def configs(name: str) -> str:
        return f"['{root}/configs/{name}.json','{root}/configs/datasets/mni152.json']"

    common = {"dataset_dir": data, "ckpt_dir": out / "models"}
    _bundle("training", configs("train"), **common, output_dir=out / "training")
    _bundle("evaluating", configs("evaluate"), **common, output_dir=out / "evaluation")
    _bundle("inference", configs("inference"), **common, output_dir=out / "inference", overwrite="true")
    with (out / "evaluation" / "cases.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    scores = {k.removeprefix("dice_"): _mean(rows, k) for k in rows[0] if k.startswith("dice_")}
    best = max(rows, key=lambda row: sum(float(row[f"dice_{name}"]) for name in scores))["case"]
    print(f"\nDice on {len(rows)} held-out slices:")
    for name, score in scores.items():
        print(f"  {name:<14} {score:.3f}")
    print(f"  {'mean':<14} {sum(scores.values()) / len(scores):.3f}")
    print(f"Seconds per image: {_mean(rows, 'seconds'):.2f}")
    print(f"Picture:           {out / 'evaluation' / best / f'{best}_overlay.png'}")
    print(f"Curves:            {out / 'training' / 'curves.png'}")
    print(f"Scores of cases:   {out / 'evaluation' / 'cases.csv'}")
    print(f"Masks and maps:    {out / 'inference'}")
    print(f"Weights:           {out / 'models' / 'model.pt'}")


def _mean(rows: list[dict[str, str]], key: str) -> float:
    return sum(float(row[key]) for row in rows) / len(rows)
