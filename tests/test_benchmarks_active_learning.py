"""The benchmark of active learning: who chooses what, and what is repeated."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy, active_learning, peers
from benchmarks.uncertainty import Seen

from .conftest import make_png_dataset, write_json
from .test_benchmarks import call, one_thread  # noqa: F401


def test_rounds_label_more_and_more_and_are_not_repeated(tmp_path, monkeypatch):
    (tmp_path / "LGG_MRI").mkdir()
    make_png_dataset(tmp_path / "LGG_MRI", cases=14)
    lists = json.loads((tmp_path / "LGG_MRI" / "dataset.json").read_text())
    write_json(tmp_path / "LGG_MRI", training=lists["training"][:12], test=lists["training"][12:] + lists["test"])
    sets = {"LGG_MRI": ("lgg_mri", {"roi_size": [16, 16], "channels": [8, 8]})}
    for module in (accuracy, active_learning):
        monkeypatch.setattr(module, "SETS", sets)
    monkeypatch.setattr(active_learning, "ROUNDS", 1)
    monkeypatch.setattr(active_learning, "SHARE", 0.3)
    file, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    arguments = ["--data_root", tmp_path, "--sets", "LGG_MRI", "--seeds", 0, "--seconds", 0.3]
    arguments += ["--work_dir", tmp_path / "work", "--results", file, "--page", page]
    trainings = []
    train = peers.Training.until
    monkeypatch.setattr(peers.Training, "until", lambda self, mark: (trainings.append(self), train(self, mark)))
    call(monkeypatch, active_learning, *arguments)
    rows = {(row["strategy"], row["round"]): row for row in map(json.loads, file.read_text().splitlines())}
    assert rows.keys() == {(name, number) for name in active_learning.STRATEGIES for number in (0, 1)}
    assert {row["labelled"] for (_, number), row in rows.items() if number} == {
        8
    }  # of 12, which a test case is none of
    first = [row for (_, number), row in rows.items() if not number]
    assert {(row["labelled"], row["dice"], row["iterations"]) for row in first} == {
        (4, first[0]["dice"], first[0]["iterations"])
    }  # which all begin with
    together = {tuple(sorted(row["next"])) for row in first}
    assert len(set(trainings)) == 1 + len(together) and all(len(row["next"]) == 4 for row in first)
    test = json.loads((tmp_path / "LGG_MRI" / "dataset.json").read_text())["test"]
    assert not {Path(item["image"]).name for item in test} & {name for row in first for name in row["next"]}

    text = page.read_text("utf-8")
    assert "| strategy | 4 labelled | 8 labelled | gain | seeds |" in text and "| random | " in text

    kept = [row for at, row in rows.items() if at != ("entropy", 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    trainings.clear()
    call(monkeypatch, active_learning, *arguments)
    last = json.loads(file.read_text().splitlines()[-1])
    assert last == rows["entropy", 1] and not trainings and len(file.read_text().splitlines()) == len(rows)


def test_the_least_sure_cases_are_chosen():
    """One is small, and members disagree on it; another is large, and everywhere a little unsure."""

    def seen(probability: float, side: int, agreement: float) -> Seen:
        mean = torch.full((1, 32, 32), 0.001)
        mean[:, :side, :side] = probability
        return Seen("", mean, mean > 0.5, mean > 0.5, torch.tensor([agreement]), 5, 0.0)

    torn, vague, sure = seen(0.6, 4, 0.4), seen(0.7, 24, 0.9), seen(0.99, 12, 0.99)
    fits = torch.tensor([[1.0, -1.0, 0.0]])
    least = {
        name: min((torn, vague, sure), key=lambda one: sureness(one, fits))
        for name, sureness in active_learning.STRATEGIES.items()
        if sureness
    }
    assert least["expected Dice"] is torn and least["pairwise Dice"] is torn and least["entropy"] is vague


@pytest.mark.parametrize(("more", "told"), [(0.1, "the best is entropy"), (0.0, "No strategy is better")])
def test_a_strategy_wins_only_by_more_than_chance(more, told):
    random = np.random.default_rng(0)
    cases = {f"case {i}": float(random.uniform(0.3, 0.8)) for i in range(20)}

    def rows(by: float) -> list[dict]:
        return [
            {
                "seed": seed,
                "round": number,
                "dice_of_cases": {c: d + by + random.normal(0, 0.02) for c, d in cases.items()},
            }
            for seed in (0, 1)
            for number in (0, 1, 2)
        ]

    gain = active_learning.gain(rows(more), rows(0.0))
    assert gain[1] < gain[0] < gain[2] and gain[0] == pytest.approx(more, abs=0.02)
    assert told in active_learning.verdict(
        {"entropy": (more - 0.001, more - 0.01, more + 0.01), "pairwise Dice": (0, -1, 1)}
    )
