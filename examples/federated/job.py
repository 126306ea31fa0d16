"""FedAvg of the bundle over the folders of a data set, in NVIDIA FLARE's simulator."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from monai.bundle import ConfigParser
from nvflare.app_opt.pt.recipes.fedavg import FedAvgRecipe
from nvflare.recipe import SimEnv

HERE = Path(__file__).resolve().parent


def main() -> None:
    """Run the federation; the server's weights end up below ``--work``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a folder with a Decathlon-style folder for each site")
    parser.add_argument("--work", type=Path, required=True, help="folder to write to")
    parser.add_argument("--overlay", type=Path, nargs="*", default=[], help="overlays for the bundle's configs")
    parser.add_argument("--bundle_root", type=Path, default=HERE.parents[1] / "bundle")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--local_epochs", type=int, default=2)
    args = parser.parse_args()
    sites = sorted(folder.name for folder in args.data.iterdir() if (folder / "dataset.json").is_file())
    if not sites:
        parser.error(f"{args.data}: no folder in it holds a dataset.json: give --data DIR with one for each site")
    root, overlays = args.bundle_root.resolve(), [str(overlay.resolve()) for overlay in args.overlay]
    config = ConfigParser()
    config.read_config([str(root / "configs" / "train.json"), *overlays])
    network = config.get_parsed_content("network_def", instantiate=False)
    command = ["--bundle_root", root, "--data", args.data.resolve(), "--work", args.work.resolve()]
    command += ["--rounds", args.rounds, "--local_epochs", args.local_epochs, "--overlay", *overlays]
    recipe = FedAvgRecipe(
        name="medsegdiff",
        model={"class_path": network.get_config()["_target_"], "args": network.resolve_args()},
        min_clients=len(sites),
        num_rounds=args.rounds,
        train_script=str(HERE / "client.py"),
        train_args=shlex.join(map(str, command)),
        key_metric="val_mean_dice",
    )
    run = recipe.execute(SimEnv(clients=sites, workspace_root=str(args.work.resolve())))
    print(f"Results: {run.get_result(clean_up=False)}")  # else FLARE deletes those of its PocEnv


if __name__ == "__main__":
    main()
