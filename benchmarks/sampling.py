"""Dice and cost of members × steps × sampler on one trained network, beside other methods on the same data.

``python -m benchmarks.sampling --data_root DIR --data SET`` trains ours and the peers (see ``benchmarks.peers``) for
the same time, in turns, and writes ``sampling_SET.md``, ``.csv`` and ``.png``. Weights and finished rows are kept in
``--work_dir``; a rerun goes on from them. A pass is one image × one member × one step.
"""

from __future__ import annotations

import argparse
import csv
import ctypes
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from monai.metrics import compute_dice
from torch import Tensor, nn

from medsegdiff_monai.fusion import MemberSummary
from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverPlusPlusScheduler

from .accuracy import ROOT, SETS, configure
from .forward import parameters
from .peers import PEERS, Peer, finish, ours, start, train_in_turns

SAMPLERS = {"DDIM": DDIMScheduler, "DPM-Solver++ 2M": DPMSolverPlusPlusScheduler, "DDPM": DDPMScheduler}
STEPS = (1, 2, 5, 10, 20, 50, 100)
MEMBERS = (1, 5, 25)
COLUMNS = ("method", "parameters_m", "sampler", "steps", "members", "passes", "dice", "std", "seconds", "memory_mb")
ROUNDS = 5  # of timing


@dataclass
class Setting:
    """Where things are and what the network is trained with."""

    data_root: Path
    data: str
    seconds: float
    cases: int
    seed: int
    work_dir: Path
    output_dir: Path

    def parser(self, name: str) -> ConfigParser:
        """Return a bundle config under the settings of the data set."""
        return configure(name, self.data, self.data_root, self.seed)


class Rows:
    """Finished rows, kept in a file that a rerun reads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []

    def has(self, **key: object) -> bool:
        """Whether there is a row with these values."""
        return any(all(row.get(k) == v for k, v in key.items()) for row in self.rows)

    def add(self, **row: Any) -> None:
        """Keep a row."""
        self.rows.append(row)
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)


def check_work_dir(setting: Setting) -> None:
    """Refuse to go on with what a run of other settings has left."""
    file = setting.work_dir / "setting.json"
    own = {k: v for k, v in asdict(setting).items() if k not in ("work_dir", "output_dir", "data_root")}
    if file.is_file() and (there := json.loads(file.read_text())) != own:
        raise SystemExit(f"{file}: holds a run of other settings, {there}: give another --work_dir.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(own))


def fit(setting: Setting, methods: dict[str, Callable[[ConfigParser], Peer]]) -> dict[str, tuple[Peer, nn.Module, int]]:
    """Train methods in turns, or read what an earlier run has trained; returns iterations too."""
    started = {}
    for name, build in methods.items():
        peer, training = start(build, setting.parser("train"), setting.seconds)
        started[name] = peer, training, setting.work_dir / f"{name}.pt"
    train_in_turns({file: training for _, training, file in started.values() if not file.is_file()})
    return {name: (peer, *finish(training, file)) for name, (peer, training, file) in started.items()}


class Cases:
    """Preprocessed test cases, spread over the list, and the Dice of what is made of them."""

    def __init__(self, setting: Setting) -> None:
        parser = setting.parser("evaluate")
        dataset = parser.get_parsed_content("dataset")
        count = min(setting.cases, len(dataset))
        self.items = [dataset[i * len(dataset) // count] for i in range(count)]
        self.images = torch.stack([item["image"].as_tensor() for item in self.items])
        self.classes: int = parser["num_classes"]
        # of the same parser: what it inverts is what the images went through
        self._postprocess = parser.get_parsed_content("postprocessing")

    def dice(self, members: Sequence[Tensor]) -> list[float]:
        """Dice on the grid of the input, by the shipped fusion; takes (members * classes, *roi_size) for each case."""
        scores = []
        for item, member in zip(self.items, members):
            pred = MetaTensor(member).copy_meta_from(item["image"])
            result = self._postprocess({**item, "pred": pred})
            dice = compute_dice(result["mask"][None], result["label"][None], ignore_empty=False)
            scores.append(float(dice.mean()))
        return scores


def peak_memory_mb(run: Callable[[], object]) -> float | None:
    """Return by how much a call raises this process's resident memory at its peak; Linux with glibc only."""
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        run()
        return None
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as free
    clear.write_text("5")
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 1024


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def seconds(run: Callable[[], object]) -> float:
    """Return the CPU time of a call on one thread: other work on the machine does not count."""
    start = time.process_time()
    run()
    return time.process_time() - start


def inferer(setting: Setting, sampler: str, steps: int, members: int, **more: Any) -> Any:
    """Return the shipped inferer with another sampler, number of steps and members."""
    parser = setting.parser("evaluate")
    parser.update({"num_steps": steps, "num_members": members})
    parser["scheduler"]["_target_"] = f"medsegdiff_monai.schedulers.{SAMPLERS[sampler].__name__}"
    parser["inferer"].update(more)
    return parser.get_parsed_content("inferer")


def grid(setting: Setting, rows: Rows, net: nn.Module, cases: Cases) -> None:
    """Score members × steps × sampler; fewer members are the first ones of the most."""
    for sampler, steps in ((sampler, steps) for sampler in SAMPLERS for steps in STEPS):
        missing = [m for m in MEMBERS if not rows.has(sampler=sampler, steps=steps, members=m, amp=False)]
        if missing:
            draw = inferer(setting, sampler, steps, MEMBERS[-1])
            drawn = [draw(image[None], net)[0] for image in cases.images]
            for members in missing:
                rows.add(**score(net, cases, drawn, sampler, steps, members, amp=False))
    if not rows.has(amp=True):
        sampler, steps, members = shipped(setting)
        draw = inferer(setting, sampler, steps, members, amp=True)
        drawn = [draw(image[None], net)[0].float() for image in cases.images]
        rows.add(**score(net, cases, drawn, sampler, steps, members, amp=True))


def score(
    net: nn.Module, cases: Cases, drawn: Sequence[Tensor], sampler: str, steps: int, members: int, amp: bool
) -> dict[str, Any]:
    """Score the first members that were drawn."""
    dice = cases.dice([probability[: members * cases.classes] for probability in drawn])
    return {
        "method": "ours",
        "parameters_m": parameters(net),
        "sampler": sampler,
        "steps": steps,
        "members": members,
        "passes": steps * members,
        "amp": amp,
        **summary(dice),
    }


def summary(dice: list[float]) -> dict[str, Any]:
    """What a row keeps of the Dice of the cases."""
    return {"dice": statistics.mean(dice), "std": statistics.stdev(dice), "of_cases": [round(d, 5) for d in dice]}


def shipped(setting: Setting) -> tuple[str, int, int]:
    """Return sampler, steps and members of ``inference.json``."""
    parser = setting.parser("inference")
    target = parser["scheduler"]["_target_"].split(".")[-1]
    return next(n for n, c in SAMPLERS.items() if c.__name__ == target), parser["num_steps"], parser["num_members"]


def peers(
    trained_peers: dict[str, tuple[Peer, nn.Module, int]], rows: Rows, cases: Cases, seed: int
) -> Iterator[tuple[str, Any]]:
    """Score one sample of each peer, and yield what segments an image, to be timed."""
    for name, (peer, trained, _) in trained_peers.items():
        segment = torch.no_grad()(partial(peer.segment, trained))
        if not rows.has(method=name):
            torch.manual_seed(seed)
            dice = cases.dice(list(segment(cases.images)))
            rows.add(
                method=name,
                parameters_m=parameters(trained),
                sampler="its own",
                steps=peer.passes,
                members=1,
                passes=peer.passes,
                **summary(dice),
            )
        yield name, segment


def clock(setting: Setting, rows: Rows, net: nn.Module, image: Tensor, segmenters: dict[str, Callable]) -> None:
    """Measure time and memory of each row for an image, one after the other; not kept, but anew in each run."""
    for row in rows.rows:
        if row["method"] == "ours":
            alone = inferer(setting, *(row[key] for key in ("sampler", "steps", "members")), amp=row["amp"])
            run = partial(alone, image, net)
        else:
            run = partial(segmenters[row["method"]], image)
        row["memory_mb"] = peak_memory_mb(run)  # and warm up
        row["seconds"] = statistics.median(seconds(run) for _ in range(1 if row["passes"] > 100 else ROUNDS))


def ratios(setting: Setting, net: nn.Module, image: Tensor, segmenters: dict[str, Callable]) -> list[str]:
    """Compare the time of our default with others in turns; each ratio is the median over the turns."""
    sampler, steps, members = shipped(setting)
    default = inferer(setting, sampler, steps, members)
    single = inferer(setting, sampler, steps, members, member_batch_size=1)

    def with_uncertainty() -> None:
        members = MemberSummary(default(image, net)[0].unflatten(0, (-1, default.num_classes)))
        members.fuse("staple")
        members.predictive_entropy()
        members.mutual_information()

    runs = {
        "default": lambda: default(image, net),
        "with uncertainty": with_uncertainty,
        "one by one": lambda: single(image, lambda *args: net(*args)),  # nothing to encode the image with
        **{name: partial(segment, image) for name, segment in segmenters.items()},
    }
    times: dict[str, list[float]] = {name: [] for name in runs}
    with torch.no_grad():
        for turn in range(ROUNDS + 1):
            for name, run in runs.items():
                took = seconds(run)
                if turn:  # the first one warms up
                    times[name].append(took)

    def ratio(a: str, b: str) -> float:
        return statistics.median(x / y for x, y in zip(times[a], times[b]))

    peer, monai = "med-seg-diff-pytorch", "MONAI UNet"
    what = f"{members} members × {steps} steps"
    return [
        f"- 250 passes of {peer} take {ratio(peer, 'default'):.0f} times as long as our default ({what}) for an image.",
        f"- The same passes one by one, without encoding the image once and without batches of members, take "
        f"{ratio('one by one', 'default'):.2f} times as long as our default.",
        f"- Our default takes as long as {ratio('default', monai):.1f} passes of MONAI's UNet; with STAPLE and both "
        f"maps of uncertainty, on the network's field, {ratio('with uncertainty', monai):.1f}.",
    ]


def against_default(setting: Setting, rows: Rows) -> list[str]:
    """Say how far the default is below the best row and below the most passes; paired over the cases."""
    ours = [row for row in rows.rows if row["method"] == "ours" and not row["amp"]]
    sampler, steps, members = shipped(setting)
    default = next(r for r in ours if (r["sampler"], r["steps"], r["members"]) == (sampler, steps, members))
    others = [("the best row", max(ours, key=lambda r: r["dice"]))]
    others += [("most passes", row) for row in ours if (row["steps"], row["members"]) == (STEPS[-1], MEMBERS[-1])]
    others += [("the default under bfloat16 autocast", next(row for row in rows.rows if row.get("amp")))]
    lines = [f"- Dice of our default ({sampler}, {members} members × {steps} steps): {default['dice']:.4f}."]
    for what, row in others:
        apart = [a - b for a, b in zip(row["of_cases"], default["of_cases"])]
        error = statistics.stdev(apart) / len(apart) ** 0.5
        lines.append(
            f"- {row['sampler']}, {row['members']} × {row['steps']} ({what}): {row['dice']:.4f}, "
            f"{statistics.mean(apart):+.4f} ± {error:.4f} (standard error over the cases)."
        )
    return lines


def write(setting: Setting, rows: Rows, iterations: dict[str, int], lines: list[str]) -> None:
    """Write table and plot."""
    from matplotlib.figure import Figure

    out, config = setting.output_dir, setting.parser("inference")
    out.mkdir(parents=True, exist_ok=True)
    name = f"sampling_{setting.data}"
    with (out / f"{name}.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [*COLUMNS, "amp"], restval="", extrasaction="ignore")
        table.writeheader()
        table.writerows(rows.rows)
    text = [
        "# Members, steps and samplers",
        "",
        f"`python -m benchmarks.sampling --data_root DIR --data {setting.data} --seconds {setting.seconds:g} "
        f"--cases {setting.cases} --seed {setting.seed}`",
        "",
        f"{setting.data} at {config['roi_size']}, channels {config['channels']}, {len(rows.rows[0]['of_cases'])} "
        "cases, STAPLE, Dice on the original grid; "
        f"each method trained for {setting.seconds:g} seconds of CPU time (iterations: "
        f"{', '.join(f'{name} {count}' for name, count in iterations.items())}); seed {setting.seed}; "
        f"{torch.get_num_threads()} threads of {platform.machine()}, torch {torch.__version__}. Timesteps: "
        f"{', '.join(f'{name} {sampler().timestep_spacing}' for name, sampler in SAMPLERS.items())}. Seconds are CPU "
        "time for one image, memory what it adds at its peak. One run: the standard deviation is over cases.",
        "",
        *lines,
        "",
        "| " + " | ".join(COLUMNS) + " |",
        "|" + " --- |" * len(COLUMNS),
    ]
    for row in rows.rows:
        shown = {**row, "method": row["method"] + (", bfloat16" if row.get("amp") else "")}
        cells = (shown.get(c) for c in COLUMNS)
        text.append(
            "| " + " | ".join("" if c is None else f"{c:.3f}" if isinstance(c, float) else str(c) for c in cells) + " |"
        )
    (out / f"{name}.md").write_text("\n".join(text) + "\n")

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for sampler in SAMPLERS:
        for members, marker in zip(MEMBERS, ("o", "s", "^")):
            some = [r for r in rows.rows if r["sampler"] == sampler and r["members"] == members and not r["amp"]]
            axis.plot(
                [r["passes"] for r in some], [r["dice"] for r in some], marker=marker, label=f"{sampler} × {members}"
            )
    for row in rows.rows:
        if row["method"] != "ours":
            axis.plot(row["passes"], row["dice"], marker="*", markersize=12, linestyle="", label=row["method"])
    axis.set(xscale="log", xlabel="network passes per image", ylabel="Dice")
    axis.legend(fontsize=7, ncols=2)
    figure.savefig(out / f"{name}.png", dpi=120)


def main() -> None:
    """Train, measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--data", choices=[name for name in SETS if name != "Hippocampus3D"], default="LGG_MRI")
    parser.add_argument("--seconds", type=float, default=900, help="CPU time of each training")
    parser.add_argument("--cases", type=int, default=44, help="of the test set, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work_dir", type=Path, default=ROOT / "benchmarks" / "work" / "sampling")
    parser.add_argument("--output_dir", type=Path, default=ROOT / "benchmarks" / "results")
    setting = Setting(**vars(parser.parse_args()))
    setting.work_dir /= setting.data
    torch.set_num_threads(1)
    check_work_dir(setting)
    rows = Rows(setting.work_dir / "rows.jsonl")
    fitted = fit(setting, {"ours": ours, **PEERS})
    iterations = {name: count for name, (_, _, count) in fitted.items()}
    cases, (_, net, _) = Cases(setting), fitted.pop("ours")
    grid(setting, rows, net, cases)
    segmenters = dict(peers(fitted, rows, cases, setting.seed))
    image = cases.images[:1]
    lines = [*against_default(setting, rows), *ratios(setting, net, image, segmenters)]
    clock(setting, rows, net, image, segmenters)
    write(setting, rows, iterations, lines)


if __name__ == "__main__":
    main()
