"""Averaged weights, checkpoints and the demo's data."""

from __future__ import annotations

import copy
import json

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.engines import IterationEvents

from medsegdiff_monai.engines import cosine_decay
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.handlers import BestModelSaver, GradientClipping, ModelEMA, StopOnBadLoss, TrainingCheckpoint
from medsegdiff_monai.settings import as_bool


def test_average_starts_from_weights_loaded_after_it_was_built():
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    engine = Engine(lambda e, b: network.weight.data.add_(1.0))
    ModelEMA(network, average, momentum=0.1).attach(engine)
    network.weight.data.fill_(100.0)  # a checkpoint, loaded at last
    engine.run([0] * 300)
    # the average of a ramp lags behind by (1 - momentum) / momentum steps
    assert average.weight.item() == pytest.approx(400 - 9, abs=0.5)
    assert not average.weight.requires_grad


def test_average_follows_as_fast_in_a_further_round_as_in_the_first():
    """A federation's client runs one trainer again and again, each time from weights that it was sent."""
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    engine = Engine(lambda e, b: network.weight.data.add_(1.0))
    ModelEMA(network, average).attach(engine)
    ends = []
    for epochs in (1, 2):
        network.weight.data.fill_(0.0)
        engine.run([0] * 50, max_epochs=epochs)
        ends.append(average.weight.item())
    assert ends[1] == pytest.approx(ends[0]) and ends[0] > 25


def test_best_weights_are_kept_as_a_plain_state_dict(tmp_path):
    network = torch.nn.Linear(2, 1)
    trainer, validator = Engine(lambda e, b: None), Engine(lambda e, b: None)
    BestModelSaver(network, str(tmp_path / "models" / "model.pt"), validator).attach(trainer)

    def finish_epoch(epoch, best):
        trainer.state.epoch, validator.state.best_metric_epoch = epoch, best
        trainer.fire_event(Events.EPOCH_COMPLETED)

    network.weight.data.fill_(1.0)
    finish_epoch(1, best=1)
    network.weight.data.fill_(2.0)
    finish_epoch(2, best=1)
    loaded = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert loaded["weight"].tolist() == [[1.0, 1.0]]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model.pt"]


def test_gradients_are_clipped_before_the_step_and_small_ones_left_alone():
    network = torch.nn.Linear(4, 2, bias=False)
    seen = []

    def step(engine, scale):
        network.weight.grad = torch.full((2, 4), scale)
        engine.fire_event(IterationEvents.BACKWARD_COMPLETED)
        seen.append(network.weight.grad.norm().item())

    engine = Engine(step)
    engine.register_events(*IterationEvents)
    GradientClipping(network, max_norm=1.5).attach(engine)
    engine.run([100.0, 0.01])
    assert seen == pytest.approx([1.5, 0.01 * 8**0.5], rel=1e-4)


def make_trainer(network, folder, max_epochs=4, **kwargs):
    """A trainer with all that a resumed run must go on with: averaged weights, schedule, best score."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)
    schedule = cosine_decay(optimizer, max_epochs)
    average = copy.deepcopy(network)
    validator = Engine(lambda e, b: None)
    validator.state.best_metric, validator.state.best_metric_epoch = -1, -1

    def step(engine, batch):
        optimizer.zero_grad()
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.max_epochs = max_epochs
    engine.average, engine.validator, engine.rates = average, validator, []
    ModelEMA(network, average).attach(engine)
    engine.add_event_handler(Events.EPOCH_STARTED, lambda: engine.rates.append(optimizer.param_groups[0]["lr"]))
    engine.add_event_handler(Events.EPOCH_COMPLETED, lambda: schedule.step())
    objects = {"network": network, "ema": average, "optimizer": optimizer, "lr_scheduler": schedule}
    TrainingCheckpoint(objects, validator, str(folder), **kwargs).attach(engine)
    return engine


def test_resumed_run_ends_as_the_uninterrupted_one(tmp_path):
    through = torch.nn.Linear(2, 1)
    start = {k: v.clone() for k, v in through.state_dict().items()}
    whole = make_trainer(through, tmp_path / "a")
    whole.run([0] * 3, max_epochs=4)
    kept = ["checkpoint_epoch=3.pt", "checkpoint_epoch=4.pt"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == kept

    halves = torch.nn.Linear(2, 1)
    halves.load_state_dict(start)
    first = make_trainer(halves, tmp_path / "b")
    first.validator.state.best_metric, first.validator.state.best_metric_epoch = 0.7, 1
    first.run([0] * 3, max_epochs=2)
    torch.nn.init.zeros_(halves.weight)
    second = make_trainer(halves, tmp_path / "b", resume="true")
    second.run([0] * 3, max_epochs=4)
    assert second.state.epoch == 4
    assert first.rates + second.rates == pytest.approx(whole.rates)
    torch.testing.assert_close(halves.weight, through.weight, rtol=0, atol=0)
    torch.testing.assert_close(second.average.weight, whole.average.weight, rtol=0, atol=0)
    assert (second.validator.state.best_metric, second.validator.state.best_metric_epoch) == (0.7, 1)
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == kept


@pytest.mark.parametrize("length", [1, 6])
def test_resume_counts_epochs_whatever_their_length(tmp_path, length):
    """Another batch size makes another number of iterations; what was trained stays trained."""
    make_trainer(torch.nn.Linear(2, 1), tmp_path, max_epochs=2).run([0, 0, 0], max_epochs=2)
    seen = []
    trainer = make_trainer(torch.nn.Linear(2, 1), tmp_path, resume=True)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(engine.state.epoch))
    trainer.run([0] * length, max_epochs=4)
    assert seen == [3, 4]
    assert sorted(p.name for p in tmp_path.glob("*.pt")) == ["checkpoint_epoch=3.pt", "checkpoint_epoch=4.pt"]


def test_new_run_removes_the_checkpoints_of_an_older_longer_one(tmp_path):
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=5)
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=1)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint_epoch=1.pt"]


def test_resuming_another_architecture_or_a_finished_run_is_refused(tmp_path):
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=2)
    other = torch.nn.Sequential(torch.nn.Linear(2, 1))
    with pytest.raises(InputError, match=r"checkpoint_epoch=2.pt: weights of another architecture"):
        make_trainer(other, tmp_path, resume=True).run([0], max_epochs=4)
    with pytest.raises(InputError, match="max_epochs=2 are done"):
        make_trainer(torch.nn.Linear(2, 1), tmp_path, max_epochs=2, resume=True).run([0], max_epochs=2)


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    engine = Engine(lambda e, b: None)
    engine.register_events(*IterationEvents)
    StopOnBadLoss().attach(engine)
    engine.state.output, engine.state.batch = {"loss": torch.tensor(float("nan"))}, {"case": ["a", "b"]}
    with pytest.raises(InputError, match="nan at iteration 0, on the cases a, b"):
        engine.fire_event(IterationEvents.LOSS_COMPLETED)


@pytest.mark.parametrize(
    "text, value", [("true", True), ("True", True), ("FALSE", False), (True, True), (False, False)]
)
def test_booleans_from_the_command_line(text, value):
    assert as_bool(text) is value


def test_other_words_are_no_booleans():
    with pytest.raises(InputError, match="'yes' is no boolean"):
        as_bool("yes")


def test_demo_slices_are_real_apart_and_of_one_hemisphere(tmp_path):
    pytest.importorskip("nilearn")
    from medsegdiff_monai.data.mni152 import write_mni152_slices

    folder = write_mni152_slices(tmp_path)
    content = json.loads((folder / "dataset.json").read_text())
    heights = {}
    for split in ("training", "validation"):
        heights[split] = []
        for item in content[split]:
            image, label = (nib.load(folder / item[key]) for key in ("image", "label"))
            assert image.shape == label.shape and set(np.unique(label.get_fdata())) == {0, 1, 2}
            np.testing.assert_array_equal(image.affine, label.affine)
            corners = nib.affines.apply_affine(image.affine, [[0, 0, 0], [image.shape[0] - 1, 0, 0]])
            assert (corners[:, 0] < 0).all()
            heights[split].append(image.affine[2, 3])
    gaps = np.abs(np.subtract.outer(heights["training"], heights["validation"]))
    assert gaps.min() >= 6 and len(heights["validation"]) >= 10
