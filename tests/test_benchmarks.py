"""The benchmarks run, keep what they have done, and write it down; figures of so short a training mean nothing."""

from __future__ import annotations

import csv
import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from monai.data import MetaTensor

from benchmarks import accuracy, convergence, figures, peers, profile, results, sampling, training, windows
from medsegdiff_monai import __version__

from .conftest import make_nifti_dataset, make_png_dataset, write_json


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
        method, shares = accuracy.TRAINED_AS.get(row["method"], row["method"]), row["method"] in accuracy.TRAINED_AS
        passes = {"MONAI UNet": 1 + shares, "MONAI SegResNet": 1 + shares}
        assert row["iterations"] >= 1 and row["passes"] == passes.get(method, 5)
        assert row.get("flip_axes") == (None if method in passes else [0])
        objectives = {"MONAI UNet": None, "MONAI SegResNet": None, "mask objective": "mask"}
        assert row.get("objective") == objectives.get(method, "ensemble")
        own = {"MONAI UNet": 0.02 if row["data"] == "LGG_MRI" else 0.01, "MONAI SegResNet": 0.002}
        assert row["learning_rate"] == own.get(method, rates[row["data"]])
        (trained,) = [r for r in rows if (r["data"], r["method"]) == (row["data"], method)]
        assert row["iterations"] == trained["iterations"]
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
    assert len(list(tmp_path.glob("*.pt"))) == 2 * (len(accuracy.METHODS) - len(accuracy.TRAINED_AS)) + 1
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


@torch.no_grad()
def test_a_peer_that_flips_gives_the_mean_of_both_views():
    parser = accuracy.configure("train", "LGG_MRI", Path("nowhere"), 0, {"roi_size": [16, 16], "channels": [8, 16]})
    plain, flipping, image = peers.unet(parser), peers.flipping(peers.unet)(parser), torch.rand(1, 3, 16, 16)
    found = flipping.segment(plain.module.eval(), image)
    mirrored = plain.segment(plain.module, image.flip(2)).flip(2)
    torch.testing.assert_close(found, (plain.segment(plain.module, image) + mirrored) / 2)
    assert not torch.allclose(found, mirrored, atol=1e-4)


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
