"""Several processes: the overlays multi_gpu_train.json, _evaluate.json and _inference.json, on CPUs."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import re
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo  # DistributedDataParallel imports it: once here, and not in each process after the fork
from monai.bundle import ConfigParser, run

from medsegdiff_monai import data, distributed
from medsegdiff_monai.data import DistributedEvaluationSampler, DistributedTrainingSampler, training_sampler
from medsegdiff_monai.errors import InputError

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, UNCHANGED, make_png_dataset, write_json

PROCESSES = 2


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


def one_process(rank: int, processes: int, port: str, log: Path, files: list[str], settings: dict) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
    )
    for logger in (logging.root, *logging.root.manager.loggerDict.values()):
        if isinstance(logger, logging.Logger):  # those of pytest, and of runs before this one
            logger.handlers.clear()
            logger.setLevel(logging.NOTSET)
            logger.propagate, logger.disabled = True, False
    with (log / f"rank{rank}.log").open("w", buffering=1) as out:
        sys.stdout = sys.stderr = out
        logging.basicConfig(stream=out, level=logging.INFO)  # logging.conf's stream is what pytest captures
        # torch renews its thread pool at the first use after a fork, not safe from several threads: before they start
        torch.set_num_threads(torch.get_num_threads())
        try:
            run(config_file=files, logging_file=False, **settings)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)


@pytest.fixture
def together(tmp_path):
    """Run a config with its overlay in several processes; returns their exit codes and what each wrote to its log."""

    def call(
        config: str, *overlays: Path, timeout: float = 120, number: int = PROCESSES, **variables
    ) -> tuple[list[int | None], list[str]]:
        files = [str(CONFIGS / f"{config}.json"), str(CONFIGS / f"multi_gpu_{config}.json"), *map(str, overlays)]
        settings = {**TINY, **PICTURE_SETTINGS, "bundle_root": str(ROOT / "bundle"), "device": "cpu", **variables}
        settings = {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()}
        port, fork = free_port(), multiprocessing.get_context("fork")  # forked, they need not import torch and MONAI
        arguments = (number, port, tmp_path, files, settings)
        processes = [fork.Process(target=one_process, args=(rank, *arguments)) for rank in range(number)]
        for process in processes:
            process.start()
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        codes = [process.exitcode for process in processes]
        for process in processes:
            process.kill()
        return codes, [(tmp_path / f"rank{rank}.log").read_text() for rank in range(number)]

    return call


def write_overlay(path: Path, **content) -> Path:
    path.write_text(json.dumps({key.replace("__", "#"): value for key, value in content.items()}))
    return path


def handlers(*more: dict) -> dict:
    return {"+train__handlers": list(more)}


def witness(folder: Path) -> dict:
    return {"_target_": "tests.distributed_parts.Witness", "model": "@network", "folder": str(folder)}


def read(folder: Path) -> list[dict]:
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Pictures as large as the network's field: ten to train on, three to validate on."""
    folder = make_png_dataset(tmp_path_factory.mktemp("squares"), (16, 16), cases=13)
    items = [{"image": f"image_{i}.png", "label": f"label_{i}.png"} for i in range(13)]
    return write_json(folder, training=items[:10], validation=items[10:])


def test_processes_keep_the_same_weights_and_see_different_noise(together, squares, tmp_path):
    """The shipped training, with augmentation and own guesses; files come from the first process alone."""
    overlay = write_overlay(tmp_path / "overlay.json", **handlers(witness(tmp_path / "witness")))
    out = {"output_dir": tmp_path / "train", "ckpt_dir": tmp_path / "models"}
    codes, logs = together("train", overlay, dataset_dir=squares, max_epochs=2, **out)
    assert codes == [0, 0], logs
    first, second = read(tmp_path / "witness")
    assert first["guesses"] != second["guesses"]  # passes without gradients do not get the processes out of step
    torch.testing.assert_close(first["weights"], second["weights"], rtol=0, atol=0)
    assert not any(name.startswith("module.") for name in first["weights"])
    for a, b in zip(first["noise"], second["noise"]):
        assert not torch.equal(a, b)
    assert [t.tolist() for t in first["timesteps"]] != [t.tolist() for t in second["timesteps"]]
    steps = len(first["cases"]) // 2
    for epoch in (slice(0, steps), slice(steps, None)):  # each case once per epoch
        seen = [case for part in (first, second) for batch in part["cases"][epoch] for case in batch]
        assert sorted(seen) == sorted(f"image_{i}" for i in range(10))
    assert first["cases"][:steps] != first["cases"][steps:]
    files = sorted(p.name for p in (tmp_path / "models").iterdir())
    assert files == ["checkpoint_epoch=1.pt", "checkpoint_epoch=2.pt", "model.pt"]
    assert "val_mean_dice" in logs[0] and "Train" in logs[0]
    assert not any(word in logs[1] for word in ("val_mean_dice", "train_loss", "Epoch", "it/s"))


@pytest.fixture
def by_case(tmp_path):
    """An overlay under which a training step depends on the cases in it alone."""

    def call(sampler: dict, *more: dict) -> Path:
        return write_overlay(
            tmp_path / "by_case.json",
            train__dataset__transform=UNCHANGED,
            train__dataloader__sampler=sampler,
            train__trainer__prepare_batch___target_="tests.distributed_parts.PrepareBatchByCase",
            **handlers(*more),
        )

    return call


def test_two_processes_train_as_one_with_the_joint_batch(together, by_case, bundle, squares, tmp_path):
    """Gradients are averaged, moments of the optimiser and averaged weights follow; ten cases in steps of 4, 4, 2."""
    settings = {"dataset_dir": squares, "max_epochs": 2, "amp": False}  # which sums have digits enough to compare
    dealt = {"_target_": "monai.data.DistributedSampler", "dataset": "@train#dataset", "shuffle": False}
    out = {"output_dir": tmp_path / "two", "ckpt_dir": tmp_path / "two"}
    codes, logs = together("train", by_case(dealt, witness(tmp_path / "two")), batch_size=2, **settings, **out)
    assert codes == [0, 0], logs

    in_turn = {"_target_": "torch.utils.data.SequentialSampler", "data_source": "@train#dataset"}
    files = [str(CONFIGS / "train.json"), str(by_case(in_turn, witness(tmp_path / "one")))]
    one = {
        **TINY,
        **PICTURE_SETTINGS,
        **settings,
        "batch_size": 4,
        "device": "cpu",
        "bundle_root": str(ROOT / "bundle"),
    }
    one |= {"output_dir": str(tmp_path / "one"), "ckpt_dir": str(tmp_path / "one"), "dataset_dir": str(squares)}
    run(config_file=files, **one)

    parts = read(tmp_path / "two")
    (whole,) = (torch.load(tmp_path / "one" / "rank0.pt", weights_only=True),)
    assert [sorted(a + b) for a, b in zip(parts[0]["cases"], parts[1]["cases"])] == [sorted(c) for c in whole["cases"]]
    for part in parts:
        torch.testing.assert_close(part["weights"], whole["weights"], rtol=0, atol=1e-5)
    two, one = (torch.load(tmp_path / n / "checkpoint_epoch=2.pt", weights_only=True) for n in ("two", "one"))
    torch.testing.assert_close(two["ema"], one["ema"], rtol=0, atol=1e-5)
    scores = [
        [(row["val_mean_dice"], row["val_mean_iou"]) for row in table(tmp_path / n / "history.csv")]
        for n in ("two", "one")
    ]
    np.testing.assert_allclose(np.array(scores[0], float), np.array(scores[1], float), atol=1e-4)


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as f:
        return list(csv.DictReader(f))


def test_two_processes_evaluate_as_one(together, bundle, squares, tmp_path):
    """Three cases: uneven shares, none twice; same table, same files, same metrics."""
    bundle("train", **PICTURE_SETTINGS, dataset_dir=squares)
    one = bundle("evaluate", **PICTURE_SETTINGS, dataset_dir=squares)
    two = tmp_path / "two"
    codes, logs = together("evaluate", dataset_dir=squares, output_dir=two, ckpt_dir=tmp_path / "models")
    assert codes == [0, 0], logs
    rows = [[{k: v for k, v in row.items() if k != "seconds"} for row in table(d / "cases.csv")] for d in (one, two)]
    assert rows[0] == rows[1] and len(rows[1]) == 3
    names = [sorted(str(p.relative_to(d)) for p in d.rglob("*.*")) for d in (one, two)]
    assert names[0] == names[1]
    for name in names[0]:
        if name.endswith("_prob.nii.gz"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
    mean = np.mean([float(row["dice_class_1"]) for row in rows[0]])
    assert re.search(rf"class_1 +{mean:.3f}", logs[0]) and "3 cases" in logs[0]
    assert "dice_class_1" not in logs[1]


def test_more_processes_than_cases_are_refused(together, pictures, tmp_path):
    codes, logs = together("evaluate", dataset_dir=pictures, output_dir=tmp_path / "out", ckpt_dir=tmp_path)
    assert 0 not in codes
    assert "1 cases to evaluate for 2 processes" in logs[0]


@pytest.fixture(scope="module")
def seven(tmp_path_factory):
    """Seven pictures, and random weights for them."""
    folder = make_png_dataset(tmp_path_factory.mktemp("seven"), (16, 16), cases=7)
    write_json(folder, test=[{"image": f"image_{i}.png"} for i in range(7)])
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({**TINY, **PICTURE_SETTINGS, "bundle_root": str(ROOT / "bundle")})
    torch.save(parser.get_parsed_content("network_def").state_dict(), folder / "model.pt")
    return folder


def results(folder: Path) -> tuple[list[dict[str, str]], dict[str, bytes]]:
    """The rows of the table without times, and the masks and probabilities."""
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in table(folder / "cases.csv")]
    return rows, {path.name: path.read_bytes() for path in folder.rglob("*.nii.gz")}


@pytest.mark.parametrize("number", [2, 4])
def test_processes_share_the_cases_of_inference(number, together, seven, tmp_path):
    """Each case once, as one process segments them; a second run has nothing left to do."""
    settings = {"dataset_dir": seven, "checkpoint": seven / "model.pt"}
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    alone = {**TINY, **PICTURE_SETTINGS, "bundle_root": str(ROOT / "bundle"), "device": "cpu"}
    alone = {k: v for k, v in alone.items() if k in parser}
    run("inference", config_file=str(CONFIGS / "inference.json"), logging_file=False, **alone,
        **{k: str(v) for k, v in settings.items()}, output_dir=str(tmp_path / "one"))  # fmt: skip
    several = {**settings, "output_dir": tmp_path / "several"}
    codes, logs = together("inference", number=number, **several)
    assert codes == [0] * number, logs
    expected, found = results(tmp_path / "one"), results(tmp_path / "several")
    assert found == expected and len(found[0]) == 7
    assert not list((tmp_path / "several").glob("cases.part*"))
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "several").rglob("*.nii.gz")}
    codes, logs = together("inference", number=number, **several)
    assert codes == [0] * number and "7 of 7 cases are finished" in logs[0]
    assert times == {path: path.stat().st_mtime_ns for path in times}


def test_cases_of_a_process_that_was_killed_are_kept(together, seven, tmp_path):
    """The same command goes on, also with another number of processes: nothing twice, nothing missing."""
    kill = {"_target_": "tests.distributed_parts.Accident", "name": "SIGKILL", "iteration": 3}
    overlay = write_overlay(tmp_path / "overlay.json", **{"+handlers": [kill]})
    settings = {"dataset_dir": seven, "checkpoint": seven / "model.pt", "output_dir": tmp_path / "out"}
    codes, _ = together("inference", overlay, timeout_minutes=0.1, **settings)
    assert codes[1] == -signal.SIGKILL and codes[0] != 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*_seg.nii.gz")}
    assert list((tmp_path / "out").glob("cases.part1.jsonl"))
    assert "image_1" in {path.parent.name for path in before}  # of the second process's share
    codes, logs = together("inference", number=3, **settings)
    assert codes == [0, 0, 0], logs
    rows, files = results(tmp_path / "out")
    assert sorted(row["case"] for row in rows) == [f"image_{i}" for i in range(7)]
    assert sum(name.endswith("_seg.nii.gz") for name in files) == 7
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert not list((tmp_path / "out").glob("cases.part*"))


def test_process_that_hangs_ends_the_run_after_the_timeout(together, squares, tmp_path):
    stop = {"_target_": "tests.distributed_parts.Accident", "name": "SIGSTOP", "iteration": 2}
    overlay = write_overlay(tmp_path / "overlay.json", **handlers(stop))
    out = {"output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "out", "timeout_minutes": 0.1}
    codes, logs = together("train", overlay, dataset_dir=squares, timeout=60, max_epochs=50, **out)
    assert codes[0] == 1 and "imed out" in logs[0]


def test_process_that_dies_ends_the_run_at_once(together, squares, tmp_path):
    kill = {"_target_": "tests.distributed_parts.Accident", "name": "SIGKILL", "iteration": 2}
    overlay = write_overlay(tmp_path / "overlay.json", **handlers(kill))
    out = {"output_dir": tmp_path / "out", "ckpt_dir": tmp_path / "out"}
    codes, _ = together("train", overlay, dataset_dir=squares, max_epochs=1000, **out)
    assert codes == [1, -signal.SIGKILL]


def torchrun(run_id: str, overlay: Path, timeout: float = 300, **variables) -> subprocess.CompletedProcess:
    """The command of the README; fails where a process is left behind."""
    name = {"training": "train", "evaluating": "evaluate"}[run_id]
    configs = [f"bundle/configs/{name}.json", f"bundle/configs/multi_gpu_{name}.json", str(overlay)]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["-m", "monai.bundle", "run", run_id, "--config_file", str(configs), "--device", "cpu"]
    command += [part for name, value in variables.items() for part in (f"--{name}", str(value))]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            _, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return subprocess.CompletedProcess(command, process.returncode, stderr=errors)


@pytest.mark.slow
def test_torchrun_trains_and_evaluates(squares, tmp_path):
    overlay = write_overlay(tmp_path / "overlay.json", **TINY, **PICTURE_SETTINGS)
    settings = {"dataset_dir": squares, "ckpt_dir": tmp_path / "models", "output_dir": tmp_path / "out"}
    for run_id in ("training", "evaluating"):
        done = torchrun(run_id, overlay, **settings)
        assert done.returncode == 0, done.stderr
    assert len(table(tmp_path / "out" / "cases.csv")) == 3


@pytest.mark.slow
def test_torchrun_ends_with_an_error_when_a_process_is_killed(squares, tmp_path):
    kill = {"_target_": "tests.distributed_parts.Accident", "name": "SIGKILL", "iteration": 2}
    overlay = write_overlay(tmp_path / "overlay.json", **TINY, **PICTURE_SETTINGS, **handlers(kill))
    settings = {"dataset_dir": squares, "ckpt_dir": tmp_path, "output_dir": tmp_path, "max_epochs": 1000}
    done = torchrun("training", overlay, **settings)
    assert done.returncode == 1 and "exitcode  : -9" in done.stderr


def test_overlays_need_torchrun(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(InputError, match="torchrun --nproc_per_node=N"):
        distributed.join("cpu")


def test_device_backend_and_ids_follow_the_machine(monkeypatch):
    calls = {}
    monkeypatch.setattr(distributed.dist, "init_process_group", lambda backend, timeout: calls.update(backend=backend))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: calls.update(device=device))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(distributed, "DistributedDataParallel", lambda network, **kwargs: kwargs)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.local_device() == torch.device("cpu")
    distributed.join("cpu")
    assert calls == {"backend": "gloo"}
    assert distributed.data_parallel(torch.nn.Linear(1, 1), "cpu")["device_ids"] is None

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert distributed.local_device() == torch.device("cuda", 1)
    for device in ("cuda", torch.device("cuda", 1)):
        distributed.join(device)
        assert calls == {"backend": "nccl", "device": torch.device("cuda", 1)}
        settings = distributed.data_parallel(torch.nn.Linear(1, 1), device)
        assert settings == {"device_ids": [1], "broadcast_buffers": False}

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(InputError, match="--nproc_per_node=1"):
        distributed.local_device()


def shares(items, seed, epoch):
    parts = [DistributedTrainingSampler(training_sampler(items), seed, num_replicas=2, rank=rank) for rank in range(2)]
    for part in parts:
        part.set_epoch(epoch)
    return [list(part) for part in parts]


def test_shares_of_a_training_are_those_of_one_draw_and_leave_the_global_generator_alone():
    items = [{"foreground": True}] * 7
    before = torch.random.get_rng_state()
    first, second = shares(items, seed=0, epoch=1)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert len(first) == len(second) == 4 and set(first) | set(second) == set(range(7))
    assert shares(items, 0, 1) == [first, second]
    assert shares(items, 0, 2) != [first, second] != shares(items, 1, 1)

    rare = [{"foreground": i == 0} for i in range(400)]  # half of what all see is the one case with foreground
    counts = [Counter(i == 0 for i in part) for part in shares(rare, 0, 1)]
    for count in counts:
        assert count[True] / count.total() == pytest.approx(0.5, abs=0.12)


def test_shares_of_an_evaluation_hold_each_case_once():
    parts = [list(DistributedEvaluationSampler(range(7), num_replicas=3, rank=rank)) for rank in range(3)]
    assert parts == [[0, 3, 6], [1, 4], [2, 5]]
    with pytest.raises(InputError, match="2 cases to evaluate for 3 processes"):
        DistributedEvaluationSampler(range(2), num_replicas=3, rank=0)


@pytest.mark.parametrize("name", ["EvaluationShare", "TrainingShare"])
def test_former_names_of_the_samplers_say_what_they_are_now(name):
    with pytest.warns(FutureWarning, match=rf"data\.{name} is now Distributed\w+Sampler\.$") as said:
        found = getattr(data, name)
    assert str(said[0].message).endswith(f"{found.__name__}.")
    assert not hasattr(data, "Shares")


@pytest.mark.parametrize("config", ["train", "evaluate"])
def test_overlays_are_json_and_name_what_is_there(config):
    """As MONAI Label merges them; they build on any list of handlers."""
    parser = ConfigParser()
    parser.read_config([str(CONFIGS / f"{config}.json"), str(CONFIGS / f"multi_gpu_{config}.json")])
    assert json.loads(json.dumps(parser.config)) == parser.config
    overlay = ConfigParser.load_config_file(CONFIGS / f"multi_gpu_{config}.json")
    assert not [key for key in overlay if "handlers" in key]
