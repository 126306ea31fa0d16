"""Averaged weights, checkpoints and the demo's data."""

from __future__ import annotations

import json

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.handlers import BestModelSaver, ModelEMA, TrainingCheckpoint
from medsegdiff_monai.settings import as_bool


def test_average_starts_from_weights_loaded_after_it_was_built():
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    engine = Engine(lambda e, b: network.weight.data.add_(1.0))
    ModelEMA(network, average, momentum=0.1, warmup_iters=1).attach(engine)
    network.weight.data.fill_(100.0)  # a checkpoint, loaded at last
    engine.run([0] * 50)
    # the average of a ramp lags behind by (1 - momentum) / momentum steps
    assert average.weight.item() == pytest.approx(150 - 9, abs=0.5)
    assert not average.weight.requires_grad


def test_best_weights_are_kept_as_a_plain_state_dict(tmp_path):
    network = torch.nn.Linear(2, 1)
    validator = Engine(lambda e, b: None)
    BestModelSaver(network, str(tmp_path / "models" / "model.pt")).attach(validator)

    @validator.on(Events.EPOCH_COMPLETED)
    def _(engine):
        pass

    def validate(epoch, best):
        validator.state.epoch, validator.state.best_metric_epoch = epoch, best
        validator.fire_event(Events.EPOCH_COMPLETED)

    network.weight.data.fill_(1.0)
    validate(1, best=1)
    network.weight.data.fill_(2.0)
    validate(2, best=1)
    loaded = torch.load(tmp_path / "models" / "model.pt", weights_only=True)
    assert loaded["weight"].tolist() == [[1.0, 1.0]]
    assert [p.name for p in (tmp_path / "models").iterdir()] == ["model.pt"]


def make_trainer(network, folder, **kwargs):
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1)

    def step(engine, batch):
        optimizer.zero_grad()
        network(torch.ones(1, 2)).sum().backward()
        optimizer.step()

    engine = Engine(step)
    engine.state.max_epochs = 0
    TrainingCheckpoint({"network": network, "optimizer": optimizer}, str(folder), **kwargs).attach(engine)
    return engine


def test_last_checkpoints_are_kept_and_resumed(tmp_path):
    through = torch.nn.Linear(2, 1)
    start = {k: v.clone() for k, v in through.state_dict().items()}
    make_trainer(through, tmp_path / "a").run([0] * 3, max_epochs=4)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["checkpoint_epoch=3.pt", "checkpoint_epoch=4.pt"]

    halves = torch.nn.Linear(2, 1)
    halves.load_state_dict(start)
    make_trainer(halves, tmp_path / "b").run([0] * 3, max_epochs=2)
    torch.nn.init.zeros_(halves.weight)
    engine = make_trainer(halves, tmp_path / "b", resume="true")
    engine.state.max_epochs = 4
    engine.run([0] * 3, max_epochs=4)
    assert engine.state.epoch == 4
    torch.testing.assert_close(halves.weight, through.weight, rtol=0, atol=0)


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
