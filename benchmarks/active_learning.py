"""Which cases should be labelled next? Cases chosen by what the members say, beside cases drawn at random.

``python -m benchmarks.active_learning --data_root DIR`` begins with a tenth of the training cases, drawn at random,
trains the bundle on them, and adds a tenth of all in each of five rounds, chosen among those that are not labelled yet
by the network of the round before: those of the least expected Dice, of the least pairwise Dice of the members, of the
greatest entropy, or at random. A fifth of the labelled cases validates, as always. Each round trains from new weights
for the same CPU time of one thread, and is scored on the cases that evaluation uses. A line for each round is appended
to ``benchmarks/active_learning.jsonl``, rounds that are there are not repeated, and
``benchmarks/results/active_learning.md`` is written from what is there.
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import monai
import numpy as np
import torch
from scipy.stats import bootstrap
from torch import Tensor

from medsegdiff_monai import __version__
from medsegdiff_monai.data.datalist import hold_out
from medsegdiff_monai.data.entries import first_file
from medsegdiff_monai.fusion import binary_entropy
from medsegdiff_monai.grading import fit_grading, grade

from .accuracy import ROOT, SETS, append, configure
from .peers import finish, ours, start
from .results import spread, versions
from .uncertainty import Run, Seen, look, read_lists, save_lists

RESULTS = ROOT / "benchmarks" / "active_learning.jsonl"
PAGE = ROOT / "benchmarks" / "results" / "active_learning.md"
WORK = ROOT / "benchmarks" / "work" / "active_learning"
NAMES = ("LGG_MRI", "Hippocampus3D")
ROUNDS = 5
SHARE = 0.1  # of the cases, to begin with and in each round
RANDOM = "random"

Item = dict[str, Any]


def _agreement(one: Seen) -> Tensor:
    assert one.agreement is not None
    return one.agreement


# how sure a network is of a case, given what it expects at which agreement
STRATEGIES: dict[str, Callable[[Seen, Tensor], float] | None] = {
    RANDOM: None,
    "expected Dice": lambda one, fits: float(grade(_agreement(one), fits).expected.mean()),
    "pairwise Dice": lambda one, fits: float(_agreement(one).mean()),
    "entropy": lambda one, fits: -float(binary_entropy(one.mean).mean()),
}


def name_of(item: Item) -> str:
    """What tells a case from others of its data set."""
    return Path(first_file(item["image"])).name


def trained(data: str, labelled: Sequence[Item], seed: int, options: argparse.Namespace) -> tuple[Run, Path, int]:
    """Train on labelled cases, or read what was trained on the same ones.

    Returns:
        What makes members of images; the folder of the lists, of which ``validation`` was held out; the iterations.
    """
    kept, held = hold_out(list(labelled), seed)
    cases = sorted(map(name_of, labelled))
    digest = hashlib.sha256(json.dumps([data, seed, options.seconds, cases]).encode()).hexdigest()[:16]
    root = options.work_dir / digest
    save_lists(root / data, {"training": kept, "validation": held, "test": read_lists(options.data_root / data)[1]})
    peer, training = start(ours, configure("train", data, root, seed), options.seconds)
    module, iterations = finish(training, root / "weights.pt")
    return partial(peer.segment, module), root, iterations


def choose(data: str, strategy: str, pool: Sequence[Item], number: int, run: Run, root: Path, seed: int) -> list[str]:
    """The names of the cases to label next, of those that are not labelled, which are in the order of the draw."""
    sureness = STRATEGIES[strategy]
    if sureness is None:
        return [name_of(item) for item in pool[:number]]
    held = look(configure("evaluate", data, root, seed, {"eval_split": "validation"}), run)
    agreement, dice = (torch.stack(values).T for values in ([_agreement(o) for o in held], [o.dice for o in held]))
    fits = torch.tensor([fit_grading(*(table[k].tolist() for table in (agreement, dice))) for k in range(len(dice))])
    save_lists(root / "pool" / data, {"training": [], "test": pool})
    seen = look(configure("evaluate", data, root / "pool", seed), run)
    order = sorted(range(len(pool)), key=lambda i: sureness(seen[i], fits))
    return [name_of(pool[i]) for i in order[:number]]


def key(data: str, strategy: str, seed: int, number: int, options: argparse.Namespace) -> dict[str, Any]:
    """What tells one round from another."""
    known = {"data": data, "strategy": strategy, "seed": seed, "seconds": options.seconds, "round": number}
    return {**known, "share": SHARE, "version": __version__}


def find(results: Path, known: dict[str, Any]) -> dict[str, Any] | None:
    """The line of a round, where it is in the results file."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return next((row for row in map(json.loads, lines) if row.items() >= known.items()), None)


def rounds(data: str, strategy: str, seed: int, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Choose, label and train; yields the lines that are missing in the results file."""
    everything, _ = read_lists(options.data_root / data)
    random.Random(seed).shuffle(everything)
    number = max(1, round(SHARE * len(everything)))
    labelled, pool = everything[:number], everything[number:]
    for i in range(ROUNDS + 1):
        known = key(data, strategy, seed, i, options)
        row = find(options.results, known)
        if row is None:
            run, root, iterations = trained(data, labelled, seed, options)
            dice = {
                one.name: float(one.dice.mean()) for one in look(configure("evaluate", data, root, seed, SCORED), run)
            }
            row = {
                **known,
                "labelled": len(labelled),
                "iterations": iterations,
                "dice": round(statistics.mean(dice.values()), 5),
                "dice_of_cases": {name: round(value, 4) for name, value in dice.items()},
                "next": choose(data, strategy, pool, number, run, root, seed) if i < ROUNDS else [],
                "torch": torch.__version__,
                "monai": monai.__version__,
                "date": datetime.date.today().isoformat(),
            }
            yield row
        chosen = set(row["next"])
        labelled = labelled + [item for item in pool if name_of(item) in chosen]
        pool = [item for item in pool if name_of(item) not in chosen]


SCORED = {"eval_split": "test"}
TEXT = """# Which cases to label next

Written by `python -m benchmarks.active_learning --data_root DIR` from `benchmarks/active_learning.jsonl`.

{share:.0%} of the training cases, drawn at random, are labelled first, and as many more in each round: those of which
the network of the round before is the least sure, or others at random. Networks are trained anew in each round, for the
same CPU time of one thread; all strategies of a seed begin with the same cases. Dice is the mean over classes and
cases, ± standard deviation over seeds. The gain is the mean difference from random choice over all rounds after the
first network and over seeds, with a 95 % interval by bootstrap over cases: with one seed, that leaves out the luck of
the draw.
"""


def gain(rows: list[dict[str, Any]], others: list[dict[str, Any]]) -> tuple[float, float, float]:
    """How much higher the Dice is than that of others, over cases: the mean, and a 95 % interval."""
    of = {(row["seed"], row["round"]): row["dice_of_cases"] for row in others}
    pairs = [
        (row["dice_of_cases"], of[at]) for row in rows if row["round"] and (at := (row["seed"], row["round"])) in of
    ]
    differences = np.array([[one[case] - other[case] for case in one] for one, other in pairs]).mean(0)
    interval = bootstrap((differences,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
    return float(differences.mean()), float(interval.low), float(interval.high)


def verdict(gains: dict[str, tuple[float, float, float]]) -> str:
    """Which strategy is better than chance, in a sentence."""
    better = {name: values for name, values in gains.items() if values[1] > 0}
    if not better:
        return "No strategy is better than random choice by more than chance."
    best = max(better, key=lambda name: better[name][0])
    return f"Better than random choice by more than chance: {', '.join(better)}; the best is {best}."


def section(rows: list[dict[str, Any]]) -> list[str]:
    """A table of one data set at one time of training."""
    by = {name: [row for row in rows if row["strategy"] == name] for name in STRATEGIES}
    by = {name: some for name, some in by.items() if some}
    sizes = {row["round"]: row["labelled"] for row in rows}
    made = {name: " and ".join(versions(name, rows)) for name in ("torch", "monai", "version", "date")}
    first = rows[0]
    lines = [
        f"## {first['data']}, {first['seconds']:g} s of training, {len(first['dice_of_cases'])} cases to score",
        "",
        f"Version {made['version']}, torch {made['torch']}, MONAI {made['monai']}; {made['date']}.",
        "",
        f"| strategy | {' | '.join(f'{sizes[i]} labelled' for i in sorted(sizes))} | gain | seeds |",
        "|" + " --- |" * (3 + len(sizes)),
    ]
    gains = {name: gain(some, by[RANDOM]) for name, some in by.items() if name != RANDOM and RANDOM in by}
    for name, some in by.items():
        cells = [spread(row["dice"] for row in some if row["round"] == i) for i in sorted(sizes)]
        told = "{:+.3f} ({:+.3f} to {:+.3f})".format(*gains[name]) if name in gains else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {told} | {len({row['seed'] for row in some})} |")
    return [*lines, "", *([verdict(gains), ""] if gains else [])]


def write(results: Path, page: Path) -> None:
    """Write the page; of rounds that there are several lines of, the last one counts."""
    lines = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    last = {tuple(row[k] for k in ("data", "seconds", "strategy", "seed", "round")): row for row in lines}
    text = TEXT.format(share=SHARE).splitlines()
    for data, seconds in dict.fromkeys((row["data"], row["seconds"]) for row in last.values()):
        some = [row for row in last.values() if (row["data"], row["seconds"]) == (data, seconds)]
        text += ["", *section(some)]
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text("\n".join(text).rstrip() + "\n", encoding="utf-8")


def main() -> None:
    """Run what is missing, append it to the results, and write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_root", type=Path, required=True, help="folder of the data sets")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(NAMES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--seconds", type=float, default=120, help="CPU time of each training")
    parser.add_argument("--work_dir", type=Path, default=WORK)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for seed in options.seeds:
        for data in options.sets:
            for strategy in STRATEGIES:
                for row in rounds(data, strategy, seed, options):
                    append(options.results, row)
    write(options.results, options.page)


if __name__ == "__main__":
    main()
