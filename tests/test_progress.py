"""What a training says of its duration."""

from __future__ import annotations

import logging
import re
from datetime import datetime
from types import SimpleNamespace

import pytest
import torch
from ignite.engine import Engine
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedEvaluator
from monai.inferers import SimpleInferer
from torch import nn

from medsegdiff_monai.handlers import ExpectedDuration, progress

from .conftest import PICTURE_SETTINGS


def said(caplog) -> list[str]:
    return [record.message for record in caplog.records if record.name == progress.__name__]


class Clock:
    """A clock that stands still but for what is added to it."""

    def __init__(self) -> None:
        self.now = 100.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def run(clock: Clock, epochs: int, iterations: int, val_interval: int = 1) -> SupervisedEvaluator:
    """A training of 2 s an iteration, and 9 s for each of its first two, with three validation cases of 4 s each."""

    class Inferer(SimpleInferer):
        def __call__(self, inputs, network, *args, **kwargs):
            clock.now += 4
            return network(inputs + torch.rand(1))

    def step(engine, batch):
        clock.now += 2 if engine.state.iteration > 2 else 9
        drawn.append(float(torch.rand(1)))

    drawn = []
    data = DataLoader(Dataset([{"image": torch.zeros(1, 4), "label": torch.zeros(1, 4)}] * 3))
    validator = SupervisedEvaluator(torch.device("cpu"), data, nn.Linear(4, 4).train(), inferer=Inferer())
    trainer = Engine(step)
    ExpectedDuration(validator, val_interval).attach(trainer)
    torch.manual_seed(0)
    trainer.run([0] * iterations, max_epochs=epochs)
    torch.manual_seed(0)
    assert drawn == [float(torch.rand(1)) for _ in drawn]  # nothing else has drawn
    return validator


def test_the_duration_has_iterations_and_validations(clock, caplog):
    caplog.set_level(logging.INFO)
    validator = run(clock, epochs=10, iterations=4, val_interval=3)
    # after 12 of 40 iterations: 28 are left, and the epochs 3, 6, 9 and 10 are validated
    (line,) = said(caplog)
    assert line.endswith(", in 0:01:44, of which validation takes 0:00:48.")
    assert line.startswith(f"Expected to end on {datetime.now():%d %B}") or datetime.now().hour == 0
    assert validator.network.training and validator.state.output is None and validator.state.batch is None


def test_slow_iterations_are_not_waited_for(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "SECONDS", 5.0)
    run(clock, epochs=1, iterations=8)  # five are enough, so that three are left
    assert said(caplog)[0].endswith(", in 0:00:18, of which validation takes 0:00:12.")


def test_the_duration_is_said_again_when_images_get_more_masks(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "_masks_per_image", lambda engine: 1 if engine.state.epoch <= 5 else 2)
    run(clock, epochs=10, iterations=4, val_interval=3)
    early, late = said(caplog)
    assert early.endswith(", in 0:01:44, of which validation takes 0:00:48.")
    assert late.endswith(", in 0:00:40, of which validation takes 0:00:24.")  # 8 iterations, and the epochs 9 and 10


def test_a_training_of_a_few_iterations_says_nothing(clock, caplog):
    caplog.set_level(logging.INFO)
    run(clock, epochs=1, iterations=11)
    assert not said(caplog)


def test_another_process_than_the_first_says_nothing(clock, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(progress, "idist", SimpleNamespace(get_rank=lambda: 1))
    run(clock, epochs=2, iterations=10)
    assert not said(caplog)


def test_the_bundle_says_how_long_its_training_takes(bundle, pictures, capsys, monkeypatch):
    monkeypatch.setattr(progress, "WARM_UP", 0)
    monkeypatch.setattr(progress, "ITERATIONS", 1)
    bundle("train", **PICTURE_SETTINGS, dataset_dir=pictures)
    assert re.search(r"Expected to end on .*, of which validation takes 0:0", capsys.readouterr().out)
