"""The benchmark of uncertainty: what is fitted on which cases, and what its page says."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import accuracy, peers, uncertainty, uncertainty_page
from medsegdiff_monai.fusion import binary_entropy

from .conftest import make_nifti_dataset, make_png_dataset, write_json
from .test_benchmarks import call, one_thread  # noqa: F401


def test_uncertainty_scores_each_method_and_writes_it_down(tmp_path, monkeypatch):
    (tmp_path / "LGG_MRI").mkdir()
    make_png_dataset(tmp_path / "LGG_MRI", cases=12)
    lists = json.loads((tmp_path / "LGG_MRI" / "dataset.json").read_text())
    write_json(tmp_path / "LGG_MRI", training=lists["training"][:8], test=lists["training"][8:] + lists["test"])
    sets = {"LGG_MRI": ("lgg_mri", {"roi_size": [16, 16], "channels": [8, 8]})}
    for module in (accuracy, uncertainty):
        monkeypatch.setattr(module, "SETS", sets)
    monkeypatch.setattr(uncertainty, "MEMBERS", 3)
    monkeypatch.setattr(uncertainty_page, "RESAMPLED", 20)
    file, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    arguments = ["--data_root", tmp_path, "--sets", "LGG_MRI", "--seeds", 0, 1, "--seconds", 0.2]
    arguments += ["--work_dir", tmp_path / "work", "--results", file, "--page", page]
    call(monkeypatch, uncertainty, *arguments)
    rows = {(row["method"], row["seed"]): row for row in map(json.loads, file.read_text().splitlines())}
    masks = {
        "this bundle": 3,
        "UNet": 1,
        "UNet, flips": 2,
        "UNet, all flips": 4,
        "UNet, MC dropout": 3,
        "five UNets": 5,
    }
    assert {key: row["masks"] for key, row in rows.items()} == {(m, s): n for m, n in masks.items() for s in (0, 1)}
    for row in rows.values():
        assert (row["cases"], row["held_out"]) == (4, 2) and row["iterations"] >= 1
        assert len(row["of_cases"]["case"]) == len(row["of_cases"]["dice"]) == 4
        single = {"soft Dice", "soft Dice, calibrated", "entropy", "entropy by size"}
        assert row["scores"].keys() == single | ({"expected Dice"} if row["masks"] > 1 else set())
        assert all(0 <= of["e_aurc"] <= of["aurc"] <= 1 for of in row["scores"].values())
        assert ("temperatures" in row) == (row["method"] != "this bundle")
    rates = {name: row["learning_rate"] for (name, _), row in rows.items() if name.startswith("UNet")}
    assert set(rates.values()) == {accuracy.CHOSEN["LGG_MRI", "MONAI UNet"]}
    unet, flips, five = (rows[name, 0] for name in ("UNet", "UNet, flips", "five UNets"))
    assert unet["iterations"] == flips["iterations"] and unet["parameters_m"] == flips["parameters_m"]
    assert five["parameters_m"] == pytest.approx(5 * unet["parameters_m"], abs=1e-3)

    text = page.read_text("utf-8")
    assert "## LGG_MRI, 0.2 s: 4 cases, 2 held out to fit on" in text and "| LGG_MRI, 0.2 s | " in text
    mean = sum(rows["this bundle", seed]["dice"] for seed in (0, 1)) / 2
    assert f"| this bundle | 3 | {mean:.3f} ± " in text

    # what is taken out is scored again from the weights, as it was; the rest is not repeated
    kept = [row for key, row in rows.items() if key != ("five UNets", 1)]
    file.write_text("".join(json.dumps(row) + "\n" for row in kept))
    monkeypatch.setattr(peers.Training, "until", lambda *_: pytest.fail("trained again"))
    call(monkeypatch, uncertainty, *arguments)
    last = json.loads(file.read_text().splitlines()[-1])
    assert len(file.read_text().splitlines()) == len(rows)
    assert {**last, "seconds_per_image": 0} == {**rows["five UNets", 1], "seconds_per_image": 0}


def test_nothing_is_fitted_on_cases_that_are_scored(tmp_path):
    """Whether the scored list is for testing or for validation; no patient is on both sides."""
    (tmp_path / "LGG_MRI").mkdir()
    (tmp_path / "Hippocampus3D").mkdir()
    make_png_dataset(tmp_path / "LGG_MRI", cases=12)
    make_nifti_dataset(tmp_path / "Hippocampus3D", (19, 22, 9), cases=8)
    lists = json.loads((tmp_path / "Hippocampus3D" / "dataset.json").read_text())["training"]
    write_json(tmp_path / "Hippocampus3D", training=lists[:5], validation=lists[5:])
    options = argparse.Namespace(data_root=tmp_path, work_dir=tmp_path / "work")
    for data, number in {"LGG_MRI": 1, "Hippocampus3D": 2}.items():
        before = json.loads((tmp_path / data / "dataset.json").read_text())["training"]
        root = uncertainty.write_lists(data, 0, options)
        lists = json.loads((root / data / "dataset.json").read_text())
        files = {split: {Path(item["image"]).name for item in lists[split]} for split in lists}
        assert len(files["test"]) == number and files["training"] and files["validation"]
        assert files["training"] | files["validation"] == {Path(item["image"]).name for item in before}
        assert sum(map(len, files.values())) == len(set.union(*files.values()))
        if data == "LGG_MRI":
            patients = [{item["patient"] for item in lists[split]} for split in ("training", "validation")]
            assert not patients[0] & patients[1]


def test_temperature_undoes_what_it_is_made_of():
    """Probabilities that are right, with their logits doubled, tell so."""
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(200, 200, generator=generator)
    truth = torch.rand(200, 200, generator=generator) < right
    sure = (2 * torch.logit(right)).sigmoid()
    assert uncertainty.fit_temperature([sure[:100], sure[100:]], [truth[:100], truth[100:]]) == pytest.approx(
        2, abs=0.05
    )
    assert uncertainty.fit_temperature([right], [truth]) == pytest.approx(1, abs=0.05)


def seen(name: str, probability: torch.Tensor, truth: torch.Tensor, agreement: float | None) -> uncertainty.Seen:
    both = None if agreement is None else torch.tensor([agreement], dtype=torch.float64)
    return uncertainty.Seen(name, probability[None], probability[None] > 0.5, truth[None], both, 1, 0.1)


def test_confidence_is_fitted_on_the_held_out_cases():
    """Members agree more than they are right; the held-out cases tell by how much."""
    random = np.random.default_rng(0)
    truth = torch.zeros(20, 20, dtype=torch.bool)
    truth[5:15, 5:15] = True

    def cases(prefix: str, number: int) -> list[uncertainty.Seen]:
        found = []
        for i in range(number):
            wrong = int(random.integers(0, 60))
            probability = truth.float() * 0.8 + 0.1
            probability.view(-1)[random.choice(400, wrong, replace=False)] = 0.45
            found.append(seen(f"{prefix}{i}", probability, truth, 1.0 - wrong / 400))
        return found

    held, scored = cases("h", 30), cases("s", 30)
    row = uncertainty.score(held, scored, is_ours=True)
    of = row["scores"]["expected Dice"]
    raw = np.mean([abs(float(one.agreement) - float(one.dice)) for one in scored])
    assert of["error"] < raw and of["spearman"] > 0.9
    assert "error" not in row["scores"]["entropy"] and row["ece_band_calibrated"] < row["ece_band"]
    entropy = [-float(binary_entropy(one.mean).mean()) for one in scored]
    np.testing.assert_allclose(row["of_cases"]["entropy"], entropy, rtol=1e-3)


def run_of(method: str, seed: int, dice: list[float], **scores: list[float]) -> dict:
    return {
        "method": method,
        "seed": seed,
        "of_cases": {"case": [f"patient{i // 3}_slice{i}" for i in range(len(dice))], "dice": dice, **scores},
        "scores": {
            name: {"aurc": uncertainty_page.aurc(sure, [1 - d for d in dice]), "e_aurc": 0, "spearman": 0, "error": 0}
            for name, sure in scores.items()
        },
    }


def test_others_have_their_best_score_and_intervals_are_over_patients_and_trainings(monkeypatch):
    monkeypatch.setattr(uncertainty_page, "RESAMPLED", 200)
    dice = np.linspace(0.2, 0.9, 15).tolist()
    noise = np.random.default_rng(0).normal(size=15).tolist()
    ours = [run_of(uncertainty_page.OURS, seed, dice, **{"expected Dice": dice, "entropy": noise}) for seed in (0, 1)]
    good, bad = ([run_of("UNet", seed, dice, a=noise, b=of) for seed in (0, 1)] for of in (dice, noise[::-1]))
    assert uncertainty_page.best_score(good, "aurc") == "b"
    assert uncertainty_page.best_score(ours, "aurc") == "expected Dice"
    assert uncertainty_page.difference(ours, good) == (0, 0, 0)
    mean, low, high = uncertainty_page.difference(ours, bad)
    assert low < mean < high < 0

    # cases that are all alike leave the luck of the trainings
    even = [run_of(uncertainty_page.OURS, 0, [0.5] * 15, **{"expected Dice": dice})]
    far = [run_of("UNet", seed, [value] * 15, a=dice) for seed, value in enumerate((0.1, 0.3))]
    assert uncertainty_page.difference(even, far) == pytest.approx((-0.3, -0.4, -0.2))

    # and a single patient cannot differ from another
    of_one = [run_of("UNet", 0, noise, a=noise[::-1])]
    of_one[0]["of_cases"]["case"] = even[0]["of_cases"]["case"] = [f"patient1_slice{i}" for i in range(15)]
    mean, low, high = uncertainty_page.difference(even, of_one)
    assert low == high == pytest.approx(mean)


def test_a_training_without_any_order_does_not_decide():
    """All masks of the second one are empty: no correlation, and no merit of a perfect order."""
    dice, sure = [0.2, 0.9, 0.5], [0.1, 0.9, 0.4]
    runs = [run_of("UNet", 0, dice, a=sure, b=[0.1, 0.2, 0.3]), run_of("UNet", 1, [0.0] * 3, a=sure, b=sure)]
    runs[0]["scores"]["a"] |= {"spearman": 1.0, "e_aurc": 0.1, "error": 0.1}
    runs[0]["scores"]["b"] |= {"spearman": 0.5, "e_aurc": 0.2, "error": 0.2}
    runs[1]["scores"]["b"]["spearman"] = runs[1]["scores"]["a"]["spearman"] = float("nan")
    assert all(uncertainty_page.best_score(runs, figure) == "a" for figure in ("spearman", "e_aurc", "error"))
    assert uncertainty_page._mean(runs, "a", "spearman") == 1 and uncertainty_page._mean(runs, "a", "e_aurc") == 0.1


def test_differences_of_other_cases_are_refused():
    runs = [run_of(uncertainty_page.OURS, 0, [0.2, 0.9], **{"expected Dice": [0.3, 0.8]})]
    others = [run_of("UNet", 0, [0.2, 0.9, 0.4], a=[0.3, 0.8, 0.1])]
    with pytest.raises(ValueError, match="different cases"):
        uncertainty_page.difference(runs, others)


def test_only_sets_of_many_patients_have_an_interval():
    runs = [run_of(uncertainty_page.OURS, 0, [0.2, 0.9], **{"expected Dice": [0.3, 0.8]})]
    assert "to" in uncertainty_page._told("LGG_MRI", runs, runs)
    assert uncertainty_page._told("TG3K_thyroid", runs, runs) == "+0.0000"


def test_unets_have_the_learning_rate_that_was_chosen_for_a_set(tmp_path):
    options = argparse.Namespace(data_root=tmp_path)
    make_png_dataset(tmp_path, cases=2)
    config = uncertainty.to_train("TG3K_thyroid", 0, options)
    assert uncertainty.learning_rate("TG3K_thyroid", "UNet, dropout", config) == 0.002
    assert uncertainty.learning_rate("TG3K_thyroid", "five UNets", config) == peers.UNET_LEARNING_RATE
    assert uncertainty.learning_rate("Hippocampus3D", "UNet", config) == peers.UNET_LEARNING_RATE
    assert uncertainty.learning_rate("LGG_MRI", uncertainty.OURS, config) == config["learning_rate"]
