"""The benchmarks run, keep what they have done, and write it down; figures of so short a training mean nothing."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.data import MetaTensor
from PIL import Image

from benchmarks import (
    accuracy,
    ambiguity,
    ambiguity_page,
    convergence,
    figures,
    lidc,
    peers,
    profile,
    results,
    sampling,
    ssn,
    training,
    windows,
)
from medsegdiff_monai import __version__
from medsegdiff_monai.objective import mask_loss

from .conftest import CONFIGS, make_nifti_dataset, make_png_dataset, write_json


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def call(monkeypatch, program, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
    program.main()


def test_accuracy_trains_each_method_once_and_scores_it(tmp_path, monkeypatch):
    for folder in ("LGG_MRI", "Hippocampus3D"):
        (tmp_path / folder).mkdir()
    make_png_dataset(tmp_path / "LGG_MRI")
    make_nifti_dataset(tmp_path / "Hippocampus3D", (19, 22, 9))
    small = {"roi_size": [16, 16], "channels": [8, 8]}
    flat = {"roi_size": [16, 16, 16], "channels": [8, 8]}
    monkeypatch.setattr(accuracy, "SETS", {"LGG_MRI": ("lgg_mri", small), "Hippocampus3D": ("hippocampus", flat)})
    monkeypatch.setattr(accuracy, "CHOSEN", {("LGG_MRI", "MONAI UNet"): 0.02})
    file = tmp_path / "results.jsonl"
    arguments = ["--data_root", tmp_path, "--seeds", 0, "--seconds", 0.2, "--results", file, "--work_dir", tmp_path]
    call(monkeypatch, accuracy, *arguments, "--data", "LGG_MRI", "Hippocampus3D")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["data"], r["method"]) for r in rows} == {(d, m) for d in accuracy.SETS for m in accuracy.METHODS}
    rates = {data: accuracy.configure("train", data, tmp_path, 0)["learning_rate"] for data in accuracy.SETS}
    for row in rows:
        classes = 1 if row["data"] == "LGG_MRI" else 2
        assert all(len(row[k]) == classes and min(row[k]) >= 0 for k in ("dice", "iou", "ece"))
        assert all(len(row[k]) == classes for k in ("ece_band", "auroc", "brier", "nsd"))
        assert row["iterations"] >= 1 and row["passes"] == (1 if row["method"].startswith("MONAI") else 5)
        objectives = {"MONAI UNet": None, "MONAI SegResNet": None, "mask objective": "mask"}
        assert row.get("objective") == objectives.get(row["method"], "ensemble")
        own = {"MONAI UNet": 0.02 if row["data"] == "LGG_MRI" else 0.01, "MONAI SegResNet": 0.002}
        assert row["learning_rate"] == own.get(row["method"], rates[row["data"]])
        assert len(row["dice_of_cases"]) == row["cases"] and "dice_volume" not in row
        values = row["dice_of_cases"].values()
        assert sum(values) / len(values) == pytest.approx(sum(row["dice"]) / classes, abs=1e-3)
    chosen = tmp_path / "chosen.jsonl"
    more = ["--data", "LGG_MRI", "--methods", "MONAI UNet", "--learning_rate", 0.05, "--split", "validation"]
    call(monkeypatch, accuracy, *arguments, *more, "--results", chosen)
    (row,) = [json.loads(line) for line in chosen.read_text().splitlines()]
    training = json.loads((tmp_path / "LGG_MRI" / "dataset.json").read_text())["training"]
    assert row["learning_rate"] == 0.05 and row["split"] == "validation" and row["version"] == __version__
    assert row["dice_of_cases"].keys() < {Path(item["image"]).stem for item in training}
    assert all(
        known["dice_of_cases"].keys().isdisjoint(row["dice_of_cases"]) for known in rows if known["data"] == "LGG_MRI"
    )
    size = {row["method"]: row["parameters_m"] for row in rows if row["data"] == "LGG_MRI"}
    assert size["plain DPM"] < size["+ dynamic conditioning"] < size["+ FF-Parser"]
    monkeypatch.setattr(accuracy, "run", lambda *_: pytest.fail("a run that is in the results was repeated"))
    call(monkeypatch, accuracy, *arguments, "--data", "LGG_MRI")

    assert all(len(row["worst"]) == min(accuracy.WORST, row["cases"]) for row in rows)
    pages = tmp_path / "results.md"
    call(monkeypatch, results, "--results", file, "--output", pages)
    page = pages.read_text(encoding="utf-8")
    assert all(f"### {data}" in page for data in accuracy.SETS)
    measured = page.partition("## Compared with the paper")[0].splitlines()
    lines = [line for line in measured if line.startswith("| + FF-Parser")]
    means = [sum(row["dice"]) / len(row["dice"]) for row in rows if row["method"] == "+ FF-Parser"]
    assert [line.split(" | ")[6] for line in lines] == [f"{mean:.3f}" for mean in means]

    arguments = ["--data_root", tmp_path, "--seconds", 0.2, "--work_dir", tmp_path, "--output_dir", tmp_path]
    call(monkeypatch, figures, *arguments, "--data", "LGG_MRI")
    assert (tmp_path / "LGG_MRI.png").read_bytes().startswith(b"\x89PNG")


def test_sampling_writes_a_table_and_goes_on_from_finished_rows(tmp_path, monkeypatch):
    (data := tmp_path / "LGG_MRI").mkdir()
    make_png_dataset(data, cases=6)
    lists = json.loads((data / "dataset.json").read_text())
    write_json(data, training=lists["training"][:4], test=lists["training"][4:] + lists["test"])
    has_peer = importlib.util.find_spec("med_seg_diff_pytorch") is not None
    stand_in = {} if has_peer else {"med-seg-diff-pytorch": peers.unet}  # for the code around
    some = {**peers.PEERS, **stand_in}
    monkeypatch.setattr(peers, "MONAI_STEPS", 2)
    monkeypatch.setattr(peers, "PEER_STEPS", 2)
    monkeypatch.setattr(sampling, "PEERS", some)
    monkeypatch.setattr(sampling, "STEPS", (1, 2))
    monkeypatch.setattr(sampling, "MEMBERS", (1, 5))
    monkeypatch.setattr(sampling, "ROUNDS", 1)
    small = {"roi_size": [16, 16], "channels": [16, 32]}
    monkeypatch.setattr(accuracy, "SETS", {"LGG_MRI": ("lgg_mri", small)})
    arguments = ["--data_root", tmp_path, "--data", "LGG_MRI", "--cases", 2]
    arguments += ["--work_dir", tmp_path / "work", "--output_dir", tmp_path / "out", "--seconds"]
    call(monkeypatch, sampling, *arguments, 0.2)
    with (tmp_path / "out" / "sampling_LGG_MRI.csv").open() as file:
        rows = list(csv.DictReader(file))
    ours = {(r["sampler"], r["steps"], r["members"]) for r in rows if r["method"] == "ours" and r["amp"] == "False"}
    assert ours == {(s, str(n), str(m)) for s in sampling.SAMPLERS for n in (1, 2) for m in (1, 5)}
    assert {r["method"] for r in rows} == {"ours", *some}
    assert (tmp_path / "out" / "sampling_LGG_MRI.png").stat().st_size
    page = (tmp_path / "out" / "sampling_LGG_MRI.md").read_text(encoding="utf-8")
    dice = {(r["sampler"], r["steps"], r["members"]): float(r["dice"]) for r in rows if r["amp"] == "False"}
    default, best = dice["DPM-Solver++ 2M", "1", "5"], max(dice.values())
    assert f"(DPM-Solver++ 2M, 5 members × 1 steps): {default:.4f}" in page
    told = re.search(r"\(the best row\): (\S+), (\S+) ±", page)  # the difference is of rounded scores of the cases
    assert told[1] == f"{best:.4f}" and float(told[2]) == pytest.approx(best - default, abs=1.1e-4)
    iterations = torch.load(tmp_path / "work" / "LGG_MRI" / "ours.pt", weights_only=True)["iterations"]
    assert f"(iterations: ours {iterations}, MONAI UNet " in page

    monkeypatch.setattr(sampling, "score", lambda *_, **__: pytest.fail("a finished row was measured again"))
    call(monkeypatch, sampling, *arguments, 0.2)
    with pytest.raises(SystemExit, match="other settings"):
        call(monkeypatch, sampling, *arguments, 0.3)


def test_results_beside_the_papers_and_where_they_fail(monkeypatch):
    def run(data, method, seconds, *dice, **more):
        return {"data": data, "method": method, "seconds": seconds, "seed": 0, "dice": list(dice), **more}

    worst = [[0.1, "case_3", 0.02], [0.7, "case_1", 0.3]]
    runs = [
        run("LGG_MRI", "plain DPM", 120, 0.5), run("LGG_MRI", "plain DPM", 120, 0.7),
        run("LGG_MRI", "plain DPM", 9, 0.1), run("DRISHTI_roi", "+ FF-Parser", 60, 0.9, 0.8),
        run("LGG_MRI", "MONAI UNet", 9, 0.2),
        run("LGG_MRI", "paper's objective", 99, 0.4, worst=worst, below_half=1, cases=2),
    ]  # fmt: skip
    head, _, plain, _, full = results.beside_paper(runs).splitlines()
    assert "here: brain tumour, LGG_MRI, 120 s" in head and "here: optic cup, DRISHTI_roi, 60 s" in head
    assert plain == "| plain DPM | 0.846 |  | 0.882 | 0.600 ± 0.141 | 0.841 |  |"
    assert full == "| + FF-Parser | 0.875 | 0.800 | 0.905 |  | 0.866 |  |"
    *_, told = results.failures(runs).splitlines()
    assert told == "| LGG_MRI | paper's objective | 99 | 0 | 1 of 2 | case_3, 0.10 (2.0 %); case_1, 0.70 (30.0 %) |"
    assert len(results.failures(runs).splitlines()) == 3


def test_the_page_of_results_is_what_the_results_make(tmp_path, monkeypatch):
    call(monkeypatch, results, "--output", tmp_path / "results.md")
    assert (tmp_path / "results.md").read_text("utf-8") == (accuracy.ROOT / "docs" / "results.md").read_text("utf-8")


def test_convergence_goes_on_from_its_last_mark(tmp_path, monkeypatch):
    (tmp_path / "LGG_MRI").mkdir()
    make_png_dataset(tmp_path / "LGG_MRI", cases=6)
    monkeypatch.setattr(accuracy, "SETS", {"LGG_MRI": ("lgg_mri", {"roi_size": [16, 16], "channels": [8, 8]})})
    monkeypatch.setattr(convergence, "MARKS", (0.1, 0.2, 0.9))
    file, out = tmp_path / "results.jsonl", tmp_path / "out"
    arguments = ["--data_root", tmp_path, "--work_dir", tmp_path / "work", "--results", file, "--output_dir", out]
    seconds = ["--default_seconds", 0.3, "--paper_seconds", 0.3]
    evaluate, until, starts = convergence.evaluate, peers.Training.until, []

    def evaluate_once(*args, **kwargs):
        if starts[1:]:
            raise KeyboardInterrupt
        return evaluate(*args, **kwargs)

    monkeypatch.setattr(peers.Training, "until", lambda self, mark: (starts.append(self.elapsed), until(self, mark)))
    with monkeypatch.context() as interrupted:
        interrupted.setattr(convergence, "evaluate", evaluate_once)
        with pytest.raises(KeyboardInterrupt):
            call(monkeypatch, convergence, *arguments, *seconds)
    assert not file.exists() and len(starts) == 2
    call(monkeypatch, convergence, *arguments, *seconds)
    assert starts[2] == starts[1] >= 0.1  # from the mark that was scored
    scored = {row["method"]: (row["passes"], row["seconds"]) for row in map(json.loads, file.read_text().splitlines())}
    assert scored == {"+ FF-Parser": (5, 0.3), "paper's objective": (2500, 0.3)}
    with (out / "convergence.csv").open() as table:
        rows = [(r["objective"], r["seconds"]) for r in csv.DictReader(table)]
    assert rows == [(name, mark) for name in ("paper", "default") for mark in ("0.1", "0.2", "0.3")]
    assert (out / "convergence.png").read_bytes().startswith(b"\x89PNG")


def tiny(seconds: float, loader: list | None = None) -> tuple[peers.Training, torch.Tensor]:
    torch.manual_seed(0)
    net = torch.nn.Conv2d(1, 1, 1)
    peer = peers.Peer(net, lambda image, mask: (net(image) - mask).square().mean(), lambda m, x: m(x), 1)
    image = torch.ones(2, 1, 4, 4)

    class Batch(torch.Tensor):
        def as_tensor(self):
            return torch.Tensor(self)

    batch = {"image": image.as_subclass(Batch), "label": (3 * image).as_subclass(Batch)}
    return peers.Training(peer, [batch] if loader is None else loader, seconds, 0.1), image


def test_training_stops_at_its_cpu_time_and_reads_what_is_there(tmp_path):
    training, image = tiny(1.0)
    module, iterations = peers.finish(training, tmp_path / "w.pt")
    assert iterations > 10 and torch.allclose(module(image), 3 * image, atol=0.1)
    assert 1.0 <= training.elapsed < 1.5
    again, same = peers.finish(tiny(1.0, [])[0], tmp_path / "w.pt")
    assert same == iterations and torch.equal(again.weight, module.weight)


def test_training_in_turns_gives_each_its_time_and_goes_on_after_an_interruption(tmp_path, monkeypatch):
    monkeypatch.setattr(peers, "TURN", 0.1)
    order = []
    until = peers.Training.until
    monkeypatch.setattr(peers.Training, "until", lambda self, mark: (order.append(self), until(self, mark)))
    one, other = tiny(0.5)[0], tiny(0.5)[0]
    peers.train_in_turns({tmp_path / "one.pt": one, tmp_path / "other.pt": other})
    assert order[:4] == [one, other, one, other] and min(one.elapsed, other.elapsed) >= 0.5

    broken = tiny(0.5)[0]

    def fail_at_third_turn(self, mark):
        if len(order) == 2:
            raise KeyboardInterrupt
        order.append(self)
        until(self, mark)

    order.clear()
    monkeypatch.setattr(peers.Training, "until", fail_at_third_turn)
    with pytest.raises(KeyboardInterrupt):
        peers.train_in_turns({tmp_path / "broken.pt": broken})
    assert not (tmp_path / "broken.pt").exists()
    resumed = tiny(0.5)[0]
    weight, starts = broken.peer.module.weight, []
    monkeypatch.setattr(
        peers.Training,
        "until",
        lambda self, mark: (starts.append((self.elapsed, self.peer.module.weight.clone())), until(self, mark)),
    )
    peers.train_in_turns({tmp_path / "broken.pt": resumed})
    assert starts[0][0] == broken.elapsed > 0 and torch.equal(starts[0][1], weight)
    assert not (tmp_path / "broken.part").exists()


def test_others_that_train_in_between_do_not_change_the_random_numbers():
    def drawn(others: int) -> list[float]:
        training, numbers = tiny(0.2)[0], []
        loss = training.peer.loss
        training.peer.loss = lambda image, mask: (numbers.append(torch.rand(()).item()), loss(image, mask))[1]
        for mark in (0.1, 0.2):
            before = len(numbers)
            training.until(mark)
            assert len(numbers) > before
            torch.rand(others)
        return numbers

    assert all(a == b for a, b in zip(drawn(0), drawn(3)))


def test_training_compares_with_each_peer(tmp_path, monkeypatch):
    shipped = training.config

    def small():
        parser = shipped()
        parser.update({"roi_size": [16, 16], "channels": [16, 32], "batch_size": 2})
        return parser

    monkeypatch.setattr(training, "config", small)
    monkeypatch.setattr(training, "peak_memory", lambda name: 1.0)
    some = {training.OURS: peers.ours, training.ONE_ENCODER: peers.monai_diffusion}
    monkeypatch.setattr(training, "BUILD", some)
    call(monkeypatch, training, "--turns", 1, "--output", tmp_path / "training.md")
    rows = [line.split(" | ") for line in (tmp_path / "training.md").read_text().splitlines() if line.startswith("| ")]
    assert [row[0].strip("| ") for row in rows[2:]] == list(some)
    assert rows[2][3] == "1.00" and float(rows[3][3]) > 0


def make_lidc(folder, side=24):
    """Bright squares, which two of four raters outline, one of them larger; the first case has the outline of one."""
    (root := folder / "LIDC4").mkdir(parents=True)
    random, lists = np.random.default_rng(0), {}
    for split, cases in {"training": 20, "validation": 4, "test": 6}.items():
        lists[split] = []
        for i in range(cases):
            row, column = random.integers(8, 12, 2)
            masks = np.zeros((4, side, side), np.uint8)
            masks[0, row : row + 5, column : column + 5] = 1
            if i:
                masks[1, row - 1 : row + 6, column - 1 : column + 6] = 1
            image = (150 * masks[0] + random.integers(0, 50, (side, side))).astype(np.uint8)
            files = {f"{split}_{i}_{k}.png": array for k, array in enumerate([image, *masks])}
            for name, array in files.items():
                Image.fromarray(array).save(root / name)
            first, *others = files
            lists[split].append({"image": first, "labels": others, "patient": f"{split} {i // 2}"})
    write_json(root, **lists)
    return folder


def test_ambiguity_scores_each_method_and_writes_it_down(tmp_path, monkeypatch):
    make_lidc(tmp_path)
    monkeypatch.setattr(ambiguity, "SETTINGS", {**ambiguity.SETTINGS, "channels": [8, 8], "batch_size": 4})
    file, page, picture = (tmp_path / name for name in ("r.jsonl", "page.md", "f.png"))
    arguments = ["--data_root", tmp_path, "--size", 16, "--seconds", 0.3, "--seeds", 0, 1, "--steps", 1, 2]
    arguments += ["--work_dir", tmp_path / "work", "--results", file, "--page", page, "--figure", picture]
    call(monkeypatch, ambiguity, *arguments)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    runs = {(row["method"], row["seed"]): row for row in rows if row["seconds"]}
    assert runs.keys() == {(method, seed) for method in [*ambiguity.METHODS, "ours, 2 steps"] for seed in (0, 1)}
    assert len(runs) + len(ambiguity.BOUNDS) == len(rows)
    passes = {"ours": 16, "ours, 2 steps": 32, "MONAI UNet": 1, "five UNets": 5, "UNet, MC dropout": 16, "SSN": 1}
    members = {"ours": 16, "ours, 2 steps": 16, "MONAI UNet": 1, "five UNets": 5, "UNet, MC dropout": 16, "SSN": 16}
    for name in passes:
        row = runs[name, 0]
        assert (row["passes"], row["members"], row["cases"]) == (passes[name], members[name], 6)
        assert row["iterations"] >= 1 and 0 <= row["brier"] < 1 and 0 <= row["ece_band"] < 1 and row["ged"] > -0.1
    assert runs["five UNets", 0]["parameters_m"] == pytest.approx(5 * runs["MONAI UNet", 0]["parameters_m"], abs=1e-3)
    assert runs["MONAI UNet", 0]["pairwise"] == 0 < runs["SSN", 0]["pairwise"]
    assert runs["ours", 0]["ged"] != runs["ours", 1]["ged"]

    text = page.read_text("utf-8")
    scored = next(line for line in text.splitlines() if line.startswith("| SSN")).split(" | ")
    assert scored[1].split(" ± ")[0] == f"{sum(runs['SSN', seed]['ged'] for seed in (0, 1)) / 2:.3f}"
    assert "GED16 ↓" in text and "16×16, 0.3 s: 6 slices (test)" in text and "CC BY 3.0" in text and "(f.png)" in text
    difference = sum((runs["ours", seed]["ged"] - runs["SSN", seed]["ged"]) / 2 for seed in (0, 1))
    told = [line.split() for line in text.splitlines() if line.startswith("| SSN")]
    assert float(told[-1][3]) == pytest.approx(difference, abs=6e-4) and len(told) == 3
    assert text.count("| bound: perfect majority mask |") == 1 and picture.read_bytes().startswith(b"\x89PNG")

    # what is there is not repeated; what is taken out is scored again from the weights, as it was
    again = "\n".join(json.dumps(row) for row in rows if row["method"] != "ours, 2 steps" or row["seed"]) + "\n"
    file.write_text(again)
    monkeypatch.setattr(peers.Training, "until", lambda *_: pytest.fail("trained again"))
    call(monkeypatch, ambiguity, *arguments)
    assert file.read_text().startswith(again)
    last, before = json.loads(file.read_text().splitlines()[-1]), runs["ours, 2 steps", 0]
    assert {**last, "seconds_per_image": 0} == {**before, "seconds_per_image": 0}
    with pytest.raises(SystemExit, match="smaller than --size 32"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path, "--size", 32)
    with pytest.raises(SystemExit, match="has no tset"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path, "--size", 16, "--split", "tset")
    with pytest.raises(SystemExit, match=r"dataset\.json: is not there"):
        call(monkeypatch, ambiguity, "--data_root", tmp_path / "nowhere", "--size", 16)


def test_crops_are_augmented_with_their_raters(tmp_path):
    crops = lidc.load(make_lidc(tmp_path), "training", 16)
    assert crops.images.shape == (20, 1, 16, 16) and crops.raters.shape == (20, 4, 16, 16)
    torch.testing.assert_close(crops.images.mean((1, 2, 3)), torch.zeros(20), atol=1e-5, rtol=0)
    assert crops.raters.any((2, 3))[0].tolist() == [True, False, False, False]
    crops.images = crops.raters[:, :1].float() + torch.arange(20).view(20, 1, 1, 1) * 10  # tells its number
    batches = lidc.Batches(crops, 6, seed=0)
    seen, turned = [], 0
    for batch in [*batches, *batches]:
        assert batch["image"].shape == (6, 1, 16, 16) and batch["label"].shape == (6, 4, 1, 16, 16)
        for image, raters in zip(batch["image"], batch["label"]):
            inside, outside = image[raters[0] > 0], image[raters[0] == 0]
            assert inside.max() - inside.min() < 1e-3 > outside.max() - outside.min()  # the mask went the same way
            number = int((outside[0] / 10).round())
            seen.append(number)
            turned += not torch.equal(raters[1, 0] > 0, crops.raters[number, 1])
    assert turned > 0
    one = next(iter(lidc.Batches(crops, 6, seed=3)))
    assert torch.equal(one["image"], next(iter(lidc.Batches(crops, 6, seed=3)))["image"])
    assert not torch.equal(one["image"], next(iter(lidc.Batches(crops, 6, seed=4)))["image"])


def test_each_pass_over_the_crops_has_each_of_them_once():
    numbers = torch.arange(8.0)
    raters = torch.zeros(8, 4, 4, 4, dtype=torch.bool)
    crops = lidc.Crops(numbers.view(8, 1, 1, 1).expand(8, 1, 4, 4), raters, ["a"] * 8)
    batches = lidc.Batches(crops, 2, seed=0)
    batches.augment = lambda batch: batch
    orders = [torch.cat([batch["image"][:, 0, 0, 0] for batch in batches]) for _ in range(2)]
    assert all(torch.equal(order.sort()[0], numbers) for order in orders) and not torch.equal(*orders)


def test_scores_of_a_slice():
    raters = torch.zeros(4, 16, 16, dtype=torch.bool)
    raters[:2, 4:8, 4:8] = True
    perfect, band = ambiguity.score(raters.float(), raters, 1)
    assert perfect["ged"] == pytest.approx(2 / 4 * 2 - 8 / 12 - 2 / 4)  # half of all pairs are at distance 1
    assert perfect["matched_iou"] == perfect["best_iou"] == 1 and perfect["ncc"] == pytest.approx(1)
    assert perfect["pairwise"] == pytest.approx(8 / 12) and perfect["brier"] == pytest.approx(0.25 * 16 / 256)
    assert perfect["dice"] == 0  # a mean of one half is not above it, but two of four are enough for the consensus
    assert band.shape[0] == 2 and torch.equal(*band) and 16 < band.shape[1] < 256

    pairs, _ = ambiguity.score(raters.float(), raters, 2)  # those within a pair are equal here, and do not count
    assert pairs["pairwise"] == 1 and pairs["ged"] == pytest.approx(1 - 1 - 2 / 4)

    single, _ = ambiguity.score(raters[:1].float(), raters, 1)
    assert single["pairwise"] == 0 and single["dice"] == 1 and single["ged"] == pytest.approx(2 / 2 - 1 / 2)
    assert single["brier"] == pytest.approx(0.5 * 16 / 256)
    nothing, near = ambiguity.score(torch.zeros(1, 16, 16), raters[3:].expand(4, -1, -1), 1)
    assert nothing["dice"] == 1 and near.shape == (2, 0)


def test_slices_of_the_picture_are_torn_ones_at_even_distances():
    marked = torch.tensor([4, 2, 0, 3, 1, 2, 2, 3, 3, 2, 4])
    raters = (torch.arange(4) < marked[:, None])[:, :, None, None].expand(-1, -1, 2, 2)
    assert ambiguity_page.chosen(raters) == [1, 5, 7, 9]  # of 1, 3, 5, 6, 7, 8, 9
    assert ambiguity_page.chosen(raters[:4]) == [1, 3]


def test_loss_of_the_unet_is_the_mean_over_raters():
    logits, raters = torch.randn(3, 2, 8, 8), (torch.rand(3, 4, 2, 8, 8) > 0.5).float()
    expected = sum(mask_loss(logits, raters[:, i]) for i in range(4)) / 4
    torch.testing.assert_close(peers.each_rater(logits, raters), expected)
    assert all((one == raters[i]).flatten(1).all(1).any() for i, one in enumerate(peers.one_rater(raters)))


def test_stochastic_segmentation_network_draws_from_its_gaussian():
    torch.manual_seed(0)
    net = ssn.StochasticSegmentationNetwork(torch.nn.Conv2d(1, ssn.FEATURES, 1), 2, 2)
    image, seen = torch.randn(1, 1, 2, 2), {}
    for name in ("mean", "log_variance", "factor"):
        getattr(net, name).register_forward_hook(lambda _, __, out, name=name: seen.update({name: out}))
    with torch.no_grad():
        drawn = net(image, 40000)
    assert drawn.shape == (1, 40000, 2, 2, 2)
    factor, diagonal = seen["factor"].view(ssn.RANK, -1), seen["log_variance"].exp().flatten() + ssn.EPS
    torch.testing.assert_close(drawn[0].mean(0), seen["mean"][0], atol=0.05, rtol=0)
    torch.testing.assert_close(drawn[0].flatten(1).T.cov(), factor.T @ factor + diagonal.diag(), atol=0.06, rtol=0.06)


def test_likelihood_of_the_stochastic_segmentation_network_by_its_definition():
    logits, raters = torch.randn(3, 5, 1, 4, 2), (torch.rand(3, 4, 1, 4, 2) > 0.5).float()
    p = torch.distributions.Bernoulli(logits=logits[:, :, None]).log_prob(raters[:, None]).sum((3, 4, 5)).exp()
    torch.testing.assert_close(ssn.log_likelihood_loss(logits, raters), -p.mean(1).log().mean() / 8)
    far = ssn.log_likelihood_loss(1e4 * logits, raters)  # no overflow
    assert far.isfinite()


def test_likelihood_is_in_single_precision_under_autocast():
    """Whatever type the features have: sums over all pixels need more digits than those of bfloat16."""
    torch.manual_seed(0)
    net = ssn.StochasticSegmentationNetwork(torch.nn.Identity(), 2, 1)
    features = torch.randn(2, ssn.FEATURES, 64, 64).bfloat16()
    raters = (torch.rand(2, 4, 1, 64, 64) > 0.5).float()

    def loss(given: torch.Tensor, amp: bool) -> torch.Tensor:
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            return ssn.log_likelihood_loss(net(given, 5), raters)

    torch.testing.assert_close(loss(features, True), loss(features.float(), False))
    logits = torch.randn(2, 5, 1, 64, 64).bfloat16()
    torch.testing.assert_close(ssn.log_likelihood_loss(logits, raters), ssn.log_likelihood_loss(logits.float(), raters))


@pytest.mark.parametrize("name", ["UNet, MC dropout", "SSN", "Probabilistic U-Net"])
def test_members_of_opponents_differ_and_are_those_of_their_image(name):
    if name not in ambiguity.METHODS:
        pytest.skip("needs lightning-uq-box")
    method = ambiguity.METHODS[name]
    torch.manual_seed(0)
    peer = method.build(ambiguity.configured(method, 16, 0, channels=[8, 8], num_members=3))
    images, raters = torch.randn(2, 1, 16, 16), (torch.rand(2, 4, 1, 16, 16) > 0.5).float()
    peer.loss(images, raters).backward()
    assert all(p.grad is not None for p in peer.module.parameters())
    with torch.no_grad():
        members = peer.segment(peer.module.eval(), images)
        assert members.shape == (2, 3, 16, 16) and 0 <= members.min() <= members.max() <= 1
        assert not torch.allclose(members[:, 0], members[:, 1])
        torch.manual_seed(1)
        batch = torch.stack([peer.segment(peer.module, images)[1].mean(0) for _ in range(200)]).mean(0)
        alone = torch.stack([peer.segment(peer.module, images[1:])[0].mean(0) for _ in range(200)]).mean(0)
    assert (batch - alone).abs().mean() < 0.03


def test_calibration_near_the_contours():
    truth = torch.zeros(1, 12, 12, dtype=torch.bool)
    truth[:, :, :6] = True
    mask = truth.clone()
    mask[:, :, 6] = True  # wrong in one column, of which it is the least sure
    probability = torch.where(truth, 0.9, 0.0)
    probability[:, :, 6] = 0.6
    found = accuracy.calibration(probability, mask, truth)
    assert found["auroc"] == [1] and found["ece"] == pytest.approx([(6 * 0.1 + 0.6) / 12])
    assert found["ece_band"] == pytest.approx([(3 * 0.1 + 0.6) / 7])  # columns 3 to 9
    assert found["brier"] == pytest.approx([(3 * 0.1**2 + 0.6**2) / 7])


def test_weights_are_averaged_as_in_the_bundle():
    """A short memory first, a long one later; numbers that are counted are copied."""
    for count, share in ((0, 0.9), (90, 0.09), (10**6, 0.005)):
        average, counted = torch.tensor([1.0, 2.0]), torch.tensor(3)
        peers._ema([average], [torch.zeros(2)], torch.tensor(count))
        peers._ema([counted], [torch.tensor(7)], torch.tensor(count))
        torch.testing.assert_close(average, (1 - share) * torch.tensor([1.0, 2.0]))
        assert counted == 7


def test_surfaces_within_a_pixel_count_as_equal():
    """A square that is moved by one pixel, and by three; there is one row of cases, and all have one class."""
    truth = torch.zeros(1, 32, 32)
    truth[:, 8:20, 8:20] = 1

    def nsd(pixels: int) -> float:
        mask = truth.roll(pixels, 1)
        output = {"mask": MetaTensor(mask), "label": MetaTensor(truth), "prob": MetaTensor(mask)}
        case = accuracy.Case({"case": "one", "label": ""}, truth, truth[None], output, 0.0)
        return accuracy.summarise([case])["nsd"][0]

    assert nsd(0) == nsd(1) == 1 > nsd(3) > 0


def test_runs_are_told_apart_by_what_shaped_them(tmp_path):
    file = tmp_path / "results.jsonl"
    run = {"method": "ours", "seed": 0, "split": "test"}
    accuracy.append(file, {**run, "device": "cuda", "dice": 0.5})
    accuracy.append(file, {"method": "ours", "seed": 1, "split": "validation"})
    assert accuracy.is_known(file, {**run, "device": "cuda", "version": accuracy.FIRST_VERSION})
    assert not accuracy.is_known(file, run) and not accuracy.is_known(file, {"method": "ours", "seed": 1})
    assert not accuracy.is_known(file, {**run, "device": "cuda", "version": "9.9"})
    file.write_text(file.read_text() + '{"method": "ou')
    with pytest.raises(SystemExit, match="line 3 is not whole: take it out"):
        accuracy.is_known(file, run)


def test_intervals_are_of_patients_and_trainings():
    random = np.random.default_rng(1)

    def interval(ours, theirs, each=1):
        text = results.interval(each * ours, each * theirs, np.full(ours.shape[1], each))
        return [float(number) for number in re.findall(r"[-+][\d.]+", text)]

    values, nothing = random.normal(0.5, 1.0, (1, 400)), np.zeros((1, 400))
    centre, low, high = interval(values, nothing)
    assert low < centre < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.15)
    assert interval(values, nothing, each=2) == [centre, low, high]  # two equal slices of each patient tell no more

    trainings = np.repeat(random.normal(0.5, 1.0, (40, 1)), 400, 1)  # equal for all patients
    _, low, high = interval(trainings, nothing)
    assert high - low == pytest.approx(2 * 1.96 * trainings[:, 0].std() / 40**0.5, rel=0.15)
    paired = random.normal(0.0, 5.0, (1, 400))  # what makes patients differ is the same for both methods
    assert interval(paired + 1, paired)[1:] == [1.0, 1.0]


def test_runs_with_another_objective_take_the_place_of_older_ones():
    def run(method, dice, **more):
        same = {"data": "LGG_MRI", "seconds": 60, "seed": 0, "parameters_m": 1, "passes": 1, "seconds_per_image": 1}
        made = {"cases": 2, "field": [8, 8], "torch": "2", "monai": "1", "date": "2026"}
        return {**same, **made, "method": method, "dice": [dice], **more}

    old = run("plain DPM", 0.1, ged=[0.5])
    new = run("plain DPM", 0.2, objective="ensemble", ged_unbiased=[float("nan")])
    other = run("MONAI UNet", 0.3)
    assert results.current([old, other, new]) == [other, new] and results.current([old, other]) == [old, other]
    *_, head, _, first, second, _ = results.table("LGG_MRI", [other, new])
    assert head.endswith("| mean Dice | Dice | unbiased GED* | seeds |")
    assert first.endswith("| 0.300 | 0.300 |  | 1 |") and second.endswith("| 0.200 | 0.200 |  | 1 |")


def test_dice_of_a_volume_is_that_of_its_slices_together():
    """Two slices of one volume, one of which is empty in both; another volume is empty throughout."""
    volumes: dict[str, torch.Tensor] = {}
    mask, truth = torch.rand(3, 2, 6, 6) > 0.5, torch.rand(3, 2, 6, 6) > 0.5
    mask[1] = truth[1] = mask[2] = truth[2] = False
    for name, *pair in zip("aab", mask, truth):
        accuracy.add_slice(volumes, name, *pair)
    (common, size), (nothing, none) = volumes["a"], volumes["b"]
    torch.testing.assert_close(
        common / size, 2.0 * (mask & truth).sum((0, 2, 3)) / (mask.sum((0, 2, 3)) + truth.sum((0, 2, 3))).double()
    )
    assert not nothing.any() and not none.any()
    assert accuracy.SLICE.sub("", "patient015_frame01_slice07") == "patient015_frame01"


def test_differences_between_methods_are_paired_by_case():
    """Cases differ much, and methods by the same amount on each: the interval is what the seeds make of that amount."""
    cases = {f"case {i}": i / 10 for i in range(10)}

    def runs(more: float) -> list[dict]:
        return [{"dice_of_cases": {case: dice + more + seed for case, dice in cases.items()}} for seed in (-0.01, 0.01)]

    lines = results.differences({"+ FF-Parser": runs(0.05), "MONAI UNet": runs(0.0), "old": [{"dice": [0.5]}]})
    assert lines[2:] == ["| MONAI UNet | +0.050 (+0.030 to +0.070) | 10 | 10 |", ""]
    worse = {case: dice + 0.2 * (i % 2) for i, (case, dice) in enumerate(cases.items())}
    (line,) = results.differences({"+ FF-Parser": runs(0.0), "MONAI UNet": [{"dice_of_cases": worse}]})[2:-1]
    low, high = map(float, re.findall(r"[(]([-+.0-9]+) to ([-+.0-9]+)", line)[0])
    assert low < -0.1 < high < 0 and "| -0.100 (" in line
    assert results.differences({"MONAI UNet": runs(0.0)}) == []


@pytest.mark.parametrize("first", ["TCGA_CS_4943_20000902", "patient015_frame01"])
def test_images_of_a_patient_are_drawn_together(first):
    """Ten images of one patient and one of another: the interval reaches from the one's mean to the other's."""
    cases = {**{f"{first}_{i}": 0.5 for i in range(10)}, "other": 0.1}
    none = {case: 0.0 for case in cases}
    runs = {"+ FF-Parser": [{"dice_of_cases": cases}], "MONAI UNet": [{"dice_of_cases": none}]}
    assert results.differences(runs)[2] == "| MONAI UNet | +0.464 (+0.100 to +0.500) | 11 | 2 |"


def test_ambiguity_scores_the_weights_of_the_bundle_by_group(tmp_path, monkeypatch):
    """Slices that one radiologist marked, and slices that two did; together they are all."""
    make_lidc(tmp_path)
    configs = tmp_path / "bundle" / "configs"
    (configs / "datasets").mkdir(parents=True)
    shutil.copy(CONFIGS / "inference.json", configs)
    plain = json.loads((CONFIGS / "datasets" / "generic_2d.json").read_text())
    small = {"in_channels": 1, "num_classes": 1, "roi_size": [16, 16], "channels": [8, 8], "num_res_blocks": 1}
    overlay = {**plain, **small, "checkpoint": str(tmp_path / "lidc.pt")}
    (configs / "datasets" / "lidc.json").write_text(json.dumps(overlay))
    monkeypatch.setattr(ambiguity, "CONFIGS", configs)
    parser = ConfigParser()
    parser.read_config([str(configs / "inference.json"), str(configs / "datasets" / "lidc.json")])
    torch.save(parser.get_parsed_content("network_def").state_dict(), tmp_path / "lidc.pt")
    file, page = tmp_path / "r.jsonl", tmp_path / "page.md"
    arguments = ["--data_root", tmp_path, "--results", file, "--page", page, "--figure", tmp_path / "none.png"]
    file.write_text(json.dumps({"method": "bound", "members": 16, "seconds": 0, "size": 16, "split": "test"}) + "\n")
    call(monkeypatch, ambiguity, *arguments, "--shipped", 9)
    row = json.loads(file.read_text().splitlines()[-1])
    groups = row["groups"]
    assert (row["method"], row["size"], row["cases"], row["members"]) == ("shipped", 16, 6, 16)
    assert groups["marked by 1"]["cases"] == 1 and groups["marked by 2"]["cases"] == 5
    assert groups["nodule below 50 pixels"]["cases"] == 6 and "200 pixels and more" not in groups
    weighed = (groups["marked by 1"]["ged"] + 5 * groups["marked by 2"]["ged"]) / 6
    assert weighed == pytest.approx(row["ged"], abs=1e-4)
    assert f"| marked by 2 | 5 | {groups['marked by 2']['ged']:.3f} |" in page.read_text("utf-8")


REPORT = """import time: self [us] | cumulative | imported package
import time:      1500 |       2000 |   jinja2.lexer
import time:       500 |       9000 | jinja2
import time:      7000 |       7000 | torch
warning of something else
"""


def test_profile_counts_imports_by_package_and_compares_versions(tmp_path, monkeypatch):
    assert profile.import_times(REPORT, known=["torch"]) == {"jinja2": 2.0}
    seconds = {profile.FLOOR: 2.0, "--help": 0.5}

    def run(words, tree, **environment):
        slower = 2 if tree == tmp_path else 1
        return seconds[profile.FLOOR] if words[-1] == profile.FLOOR else seconds["--help"] * slower, REPORT

    monkeypatch.setattr(profile, "run", run)
    monkeypatch.setattr(profile, "functions", lambda shape: {"cases.picture": 0.25})
    monkeypatch.setattr(profile, "operators", lambda: {"aten::convolution": 0.5})
    call(monkeypatch, profile, "--before", tmp_path, "--rounds", 2, "--output", tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| medsegdiff --help | 0.50 | 0.25 |" in text and "| jinja2 | 2 |" in text
    assert "| cases.picture | 0.25 |" in text and "| aten::convolution | 50% |" in text


def test_members_across_windows_are_measured_matched_and_not(tmp_path, monkeypatch):
    """The mean is the same; what is recorded is a correlation of opinions, without their mean."""
    (tmp_path / "Hippocampus3D").mkdir()
    make_nifti_dataset(tmp_path / "Hippocampus3D", (19, 22, 9))
    monkeypatch.setattr(
        accuracy, "SETS", {"Hippocampus3D": ("hippocampus", {"roi_size": [16, 16, 8], "channels": [8, 8]})}
    )
    config = accuracy.configure("evaluate", "Hippocampus3D", tmp_path, 0)
    network = config.get_parsed_content("network_def").eval()
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    with torch.no_grad():
        plain, matched = windows.measure(config, network, 2)
    assert (plain[1], matched[1]) == ("no", "yes") and plain[-1] == matched[-1]
    assert -1 <= float(plain[2]) <= float(matched[2]) <= 1
    members = torch.rand(4, 2, 5, 5)
    assert windows.correlation(members, 2 * members + torch.rand(2, 5, 5)) == pytest.approx(1)
    assert windows.correlation(members, -members) == pytest.approx(-1)
