"""The benchmarks run, keep what they have done, and write it down; figures of so short a training mean nothing."""

from __future__ import annotations

import csv
import importlib.util
import json
import sys

import pytest
import torch

from benchmarks import accuracy, convergence, figures, peers, results, sampling, training

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
    file = tmp_path / "results.jsonl"
    arguments = ["--data_root", tmp_path, "--seeds", 0, "--seconds", 0.2, "--results", file, "--work_dir", tmp_path]
    call(monkeypatch, accuracy, *arguments, "--data", "LGG_MRI", "Hippocampus3D")
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert {(r["data"], r["method"]) for r in rows} == {(d, m) for d in accuracy.SETS for m in accuracy.METHODS}
    rates = {data: accuracy.configure("train", data, tmp_path, 0)["learning_rate"] for data in accuracy.SETS}
    for row in rows:
        classes = 1 if row["data"] == "LGG_MRI" else 2
        assert all(len(row[k]) == classes and min(row[k]) >= 0 for k in ("dice", "iou", "ece"))
        assert row["iterations"] >= 1 and row["passes"] == (1 if row["method"] == "MONAI UNet" else 10)
        assert row["learning_rate"] == (0.01 if row["method"] == "MONAI UNet" else rates[row["data"]])
    size = {row["method"]: row["parameters_m"] for row in rows if row["data"] == "LGG_MRI"}
    assert size["plain DPM"] < size["+ dynamic conditioning"] < size["+ FF-Parser"]
    monkeypatch.setattr(accuracy, "run", lambda *_: pytest.fail("a run that is in the results was repeated"))
    call(monkeypatch, accuracy, *arguments, "--data", "LGG_MRI")

    assert all(len(row["worst"]) == min(accuracy.WORST, row["cases"]) for row in rows)
    pages = tmp_path / "results.md"
    call(monkeypatch, results, "--results", file, "--output", pages)
    page = pages.read_text(encoding="utf-8")
    assert all(f"### {data}" in page for data in accuracy.SETS)
    measured = page.partition("## Beside the paper")[0].splitlines()
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
    default, best = dice["DPM-Solver++ 2M", "2", "5"], max(dice.values())
    assert f"(DPM-Solver++ 2M, 5 members × 2 steps): {default:.4f}" in page
    assert f"(the best row): {best:.4f}, {best - default:+.4f} ±" in page
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
    assert scored == {"+ FF-Parser": (10, 0.3), "paper's objective": (2500, 0.3)}
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
