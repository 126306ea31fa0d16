"""A site of the federation: MONAI's client for bundles, driven by NVIDIA FLARE; started by job.py."""

from __future__ import annotations

import argparse

import nvflare.client as flare
from monai.fl.client import MonaiAlgo
from monai.fl.utils.constants import ExtraItems, FlStatistics
from monai.fl.utils.exchange_object import ExchangeObject


def main() -> None:
    """Evaluate and train what the server sends, round by round; images stay here."""
    parser = argparse.ArgumentParser()
    for name in ("bundle_root", "data", "work"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--overlay", nargs="*", default=[])
    parser.add_argument("--local_epochs", type=int, required=True)
    parser.add_argument("--rounds", type=int, required=True)
    args = parser.parse_args()
    flare.init()
    site = flare.get_site_name()
    settings = {
        "dataset_dir": f"{args.data}/{site}",
        "ckpt_dir": f"{args.work}/{site}/models",
        "output_dir": f"{args.work}/{site}",
        "max_epochs": args.rounds * args.local_epochs,  # over which the learning rate falls
    }
    algo = MonaiAlgo(
        args.bundle_root,
        local_epochs=args.local_epochs,
        config_train_filename=["configs/train.json", *args.overlay],
        config_evaluate_filename=["configs/train.json", "configs/evaluate.json", *args.overlay],
        train_kwargs=dict(settings),
        eval_kwargs=dict(settings),
    )
    algo.initialize({ExtraItems.CLIENT_NAME: site})
    while flare.is_running():
        received = ExchangeObject(weights=flare.receive().params)
        dice = float(algo.evaluate(received).metrics["val_mean_dice"])
        print(f"{site}: Dice of the weights received {dice:.3f}", flush=True)
        algo.train(received)
        trained = algo.get_weights()
        flare.send(
            flare.FLModel(
                params=trained.weights,
                params_type=flare.ParamsType.DIFF,
                metrics={"val_mean_dice": dice},
                meta={"NUM_STEPS_CURRENT_ROUND": trained.statistics[FlStatistics.NUM_EXECUTED_ITERATIONS]},
            )
        )
    algo.finalize()


if __name__ == "__main__":
    main()
