"""Runs that are killed, early and late, or told to stop, and what the next ones make of it."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from medsegdiff_monai.handlers.history import read_history

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, make_png_dataset
from .test_resume import assert_equal, start

EPOCHS = 12
# a process that is killed when it has written half of a file whose name holds a word; then a command as typed
KILL_IN_WRITING = """
import os, runpy, signal, sys
from pathlib import Path

word, original = sys.argv[1], Path.write_bytes

def write(path, content):
    if word in path.name:
        original(path, bytes(content)[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, content)

Path.write_bytes = write
sys.argv = sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def wait_for(found: Callable[[], bool], process: subprocess.Popen) -> None:
    while not found() and process.poll() is None:
        time.sleep(0.01)


def ended(process: subprocess.Popen) -> int:
    """The exit code of a process that is about to end."""
    try:
        return process.wait(120)
    finally:
        process.kill()


def leftovers(folder: Path) -> list[Path]:
    return [path for path in folder.rglob(".*") if path.suffix == ".tmp" or path.name == ".lock"]


@pytest.fixture
def data(tmp_path) -> Path:
    (tmp_path / "data").mkdir()
    return make_png_dataset(tmp_path / "data", cases=10)


@pytest.mark.slow
def test_training_killed_all_along_ends_as_the_uninterrupted_one(data, tmp_path):
    """Once in each of ten epochs, at different places in them, and once while it writes a checkpoint."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert start(whole, data, EPOCHS).wait() == 0
    for epoch in range(1, 11):
        if epoch == 6:
            process = start(killed, data, EPOCHS, "--resume", "true", through=[KILL_IN_WRITING, "checkpoint_epoch=6"])
        else:
            process = start(killed, data, EPOCHS, "--resume", "true")
            wait_for(lambda e=epoch: (killed / "models" / f"checkpoint_epoch={e}.pt").is_file(), process)
            time.sleep(0.03 * (epoch % 4))
            process.kill()
        assert process.wait() == -signal.SIGKILL
        if epoch == 6:
            assert list((killed / "models").glob(".checkpoint_epoch=6.pt.*.tmp"))
    assert start(killed, data, EPOCHS, "--resume", "true").wait() == 0
    assert "Traceback" not in (killed / "log.txt").read_text()
    for name in ("model.pt", f"checkpoint_epoch={EPOCHS}.pt", f"checkpoint_epoch={EPOCHS - 1}.pt"):
        assert_equal(whole / "models" / name, killed / "models" / name)
    histories = [read_history(folder / "train") for folder in (whole, killed)]
    for one, other in zip(*histories, strict=True):
        assert all(one[key] == other[key] for key in one if not key.startswith("seconds"))
    assert not leftovers(killed)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_stopped_training_says_in_a_line_how_to_go_on(number, code, data, tmp_path):
    process = start(tmp_path / "run", data, 500)
    wait_for(lambda: (tmp_path / "run" / "models" / "checkpoint_epoch=2.pt").is_file(), process)
    process.send_signal(number)
    assert ended(process) == code
    log = (tmp_path / "run" / "log.txt").read_text()
    assert "Traceback" not in log
    last = log.strip().splitlines()[-1]
    assert last.startswith("stopped. The training up to epoch ") and "--resume true continues" in last
    assert not leftovers(tmp_path / "run")


@pytest.fixture
def trained(data, tmp_path) -> Path:
    assert start(tmp_path / "trained", data, 1).wait() == 0
    return tmp_path / "trained" / "models"


def segment(config: str, run_id: str, data: Path, models: Path, out: Path, *through: str) -> subprocess.Popen:
    """Start an evaluation or inference on the training cases, of which there are several."""
    variables = {k: v for k, v in {**TINY, **PICTURE_SETTINGS}.items() if v is not None}
    variables = {k: v for k, v in variables.items() if k not in ("max_epochs", "val_interval", "batch_size")}
    variables |= {"bundle_root": ROOT / "bundle", "dataset_dir": data, "output_dir": out, "ckpt_dir": models}
    variables |= {"spacing": "$None", "device": "cpu", f"{config[:4]}_split".replace("infe_", "infer_"): "training"}
    command = ["monai.bundle", "run", run_id, "--config_file", str(CONFIGS / f"{config}.json")]
    for name, value in variables.items():
        command += [f"--{name}", str(value)]
    out.mkdir(exist_ok=True)
    python = [sys.executable, "-c", *through] if through else [sys.executable, "-m"]
    with (out.parent / f"{out.name}.txt").open("a") as log:
        return subprocess.Popen([*python, *command], cwd=ROOT, stdout=log, stderr=log)


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "cases.csv").open(newline="") as file:
        return [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]


@pytest.mark.slow
@pytest.mark.parametrize("config, run_id", [("evaluate", "evaluating"), ("inference", "inference")])
def test_killed_evaluation_and_inference_end_as_uninterrupted_ones(config, run_id, data, trained, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert segment(config, run_id, data, trained, whole).wait() == 0
    process = segment(config, run_id, data, trained, killed, KILL_IN_WRITING, "image_3_prob.nii.gz")
    assert process.wait() == -signal.SIGKILL
    assert leftovers(killed) and not (killed / "image_3" / "image_3_seg.nii.gz").exists()
    first = killed / "image_0" / "image_0_seg.nii.gz"
    finished = first.stat().st_mtime_ns
    assert segment(config, run_id, data, trained, killed).wait() == 0
    assert (first.stat().st_mtime_ns == finished) == (config == "inference")
    assert rows(whole) == rows(killed) and not leftovers(killed)
    files = sorted(str(path.relative_to(whole)) for path in whole.rglob("*.nii.gz"))
    assert files == sorted(str(path.relative_to(killed)) for path in killed.rglob("*.nii.gz"))
    assert all((whole / name).read_bytes() == (killed / name).read_bytes() for name in files)


@pytest.mark.slow
@pytest.mark.usefixtures("interruptible")
def test_stopped_inference_says_in_a_line_how_to_go_on(data, trained, tmp_path):
    process = segment("inference", "inference", data, trained, tmp_path / "out")
    wait_for(lambda: (tmp_path / "out" / "cases.csv").is_file(), process)
    process.send_signal(signal.SIGINT)
    assert ended(process) == 130
    log = (tmp_path / "out.txt").read_text()
    assert "Traceback" not in log
    assert "cases of this run are finished, in " in log.strip().splitlines()[-1]
    assert log.strip().endswith("the same command continues with the others.")


@pytest.mark.slow
def test_killed_export_leaves_what_was_there_and_the_next_one_nothing_else(trained, tmp_path):
    output = tmp_path / "exported" / "segmenter.ts"
    output.parent.mkdir()
    output.write_bytes(b"what was there")
    variables = {**TINY, **PICTURE_SETTINGS, "bundle_root": ROOT / "bundle", "checkpoint": trained / "model.pt"}
    variables = {k: v for k, v in variables.items() if k not in ("max_epochs", "val_interval", "batch_size")}
    command = ["medsegdiff_monai", "export", "--output", str(output)]
    for name, value in variables.items():
        command += [f"--{name}", "None" if value is None else str(value)]
    killed = subprocess.run([sys.executable, "-c", KILL_IN_WRITING, "segmenter.ts", *command], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert output.read_bytes() == b"what was there" and len(os.listdir(output.parent)) == 2
    subprocess.run([sys.executable, "-m", *command], cwd=ROOT, check=True)
    assert os.listdir(output.parent) == [output.name] and output.stat().st_size > 10**4
