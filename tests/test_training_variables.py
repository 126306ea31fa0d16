"""Accumulated gradients, warm-up, compilation and workers, through the real training config."""

from __future__ import annotations

import math

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser

from medsegdiff_monai.engines import cosine_decay, optimizer_step
from medsegdiff_monai.errors import InputError

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY, UNCHANGED, make_png_dataset, write_json


def read(folder, name="checkpoint_epoch=2.pt"):
    return torch.load(folder / name, weights_only=True)


@pytest.fixture(scope="module")
def squares(tmp_path_factory):
    """Pictures as large as the network's field: ten to train on, one to validate on."""
    folder = make_png_dataset(tmp_path_factory.mktemp("squares"), (16, 16), cases=11)
    items = [{"image": f"image_{i}.png", "label": f"label_{i}.png"} for i in range(11)]
    return write_json(folder, training=items[:10], validation=items[10:])


def test_accumulated_gradients_are_those_of_the_larger_batch(bundle, squares, tmp_path):
    """Clipping and averaged weights follow the optimiser's steps: eight cases as four batches of two or two of four."""
    settings = {
        **PICTURE_SETTINGS, "dataset_dir": squares, "max_epochs": 2, "val_interval": 2, "amp": False,
        "max_grad_norm": 0.1, "splits": "$dict(training=[{'image': f'%s/image_{i}.png', 'label': f'%s/label_{i}.png',"
        " 'case': str(i)} for i in range(8)], validation=[{'image': '%s/image_8.png', 'label': '%s/label_8.png'}])"
        % ((squares,) * 4),
        "train#dataset#transform": UNCHANGED,
        "train#dataloader#sampler": {"_target_": "torch.utils.data.SequentialSampler", "data_source": "@train#dataset"},
        "train#trainer#prepare_batch#_target_": "tests.distributed_parts.PrepareBatchByCase",
    }  # fmt: skip
    bundle("train", **settings, batch_size=4, ckpt_dir=tmp_path / "whole")
    bundle("train", **settings, batch_size=2, accumulation_steps=2, ckpt_dir=tmp_path / "parts")
    bundle("train", **settings, batch_size=2, ckpt_dir=tmp_path / "small")
    whole, parts, small = (read(tmp_path / name) for name in ("whole", "parts", "small"))
    for key in ("network", "ema"):
        torch.testing.assert_close(parts[key], whole[key], rtol=0, atol=1e-5)
    assert not torch.allclose(small["network"]["out_conv.weight"], whole["network"]["out_conv.weight"], atol=1e-4)


@pytest.mark.parametrize(
    "each, steps", [(1, [1, 2, 3, 4, 5, 6]), (2, [None, 1, 2, None, 3, 4]), (5, [None, None, 1] * 2)]
)
def test_steps_of_the_optimiser_are_counted(each, steps):
    seen = []
    engine = Engine(lambda e, b: seen.append(optimizer_step(e)))
    engine.accumulation_steps = each
    engine.run([0, 0, 0], max_epochs=2)
    assert seen == (steps if each < 5 else [None, None, 1, None, None, 2])


def rates(max_epochs, start=0, **kwargs):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    schedule = cosine_decay(optimizer, max_epochs, **kwargs)
    schedule.load_state_dict({**schedule.state_dict(), "last_epoch": start})  # as a resumed run does
    seen = []
    for _ in range(start, max_epochs):
        seen.append(schedule.lr_lambdas[0](schedule.last_epoch) * 2.0)
        optimizer.step()
        schedule.step()
        assert optimizer.param_groups[0]["lr"] == schedule.lr_lambdas[0](schedule.last_epoch) * 2.0
    return seen


def test_learning_rate_warms_up_and_decays_by_the_epoch_alone():
    assert rates(4) == pytest.approx([2 * 0.5 * (1 + math.cos(math.pi * i / 4)) for i in range(4)])
    warm = rates(8, warmup_epochs=3)
    assert warm[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0])
    assert warm[3:] == pytest.approx(rates(5))
    assert rates(8, start=5, warmup_epochs=3) == warm[5:]
    for wrong in (-1, 8):
        with pytest.raises(InputError, match=f"warmup_epochs={wrong} must be at least 0 and below max_epochs=8"):
            rates(8, warmup_epochs=wrong)


def test_compiled_training_is_the_plain_one_under_the_same_names(bundle, squares, tmp_path):
    """Own guesses, averaged weights, validation and resuming included; by a compiler that leaves the arithmetic."""
    settings = {**PICTURE_SETTINGS, "dataset_dir": squares, "train#trainer#compile_kwargs": {"backend": "eager"}}
    settings |= {"max_epochs": 3, "val_interval": 3}  # single masks in the first epoch, sets in the others
    bundle("train", **settings, compile="false", ckpt_dir=tmp_path / "plain")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    half = {"train#trainer#max_epochs": 2, "lr_scheduler#max_epochs": 3}
    bundle("train", **{**settings, **half}, compile="true", ckpt_dir=tmp_path / "compiled")
    bundle("train", **settings, compile="true", resume=True, ckpt_dir=tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    plain, compiled = (read(tmp_path / name, "checkpoint_epoch=3.pt") for name in ("plain", "compiled"))
    for key in ("network", "ema"):
        assert plain[key].keys() == compiled[key].keys()
        torch.testing.assert_close(plain[key], compiled[key], rtol=0, atol=1e-5)
    assert read(tmp_path / "compiled", "model.pt").keys() == read(tmp_path / "plain", "model.pt").keys()


def epoch(parser, seed):
    torch.manual_seed(seed)
    return [torch.as_tensor(batch["image"]) for batch in parser.get_parsed_content("train#dataloader")]


def test_workers_read_from_the_cache_and_draw_on_their_own(squares):
    """The same epoch for the same seed, another for another; no two workers augment alike."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    parser.update({**TINY, **PICTURE_SETTINGS, "bundle_root": str(ROOT / "bundle"), "dataset_dir": str(squares)})
    same = [{"image": str(squares / "image_0.png"), "label": str(squares / "label_0.png")}] * 8
    parser.update({"num_workers": 2, "train#dataset#data": same, "batch_size": 1})
    first, again, other = (epoch(parser, seed) for seed in (1, 1, 2))
    assert len(first) == 8 and all(torch.equal(a, b) for a, b in zip(first, again))
    assert not all(torch.equal(a, b) for a, b in zip(first, other))
    assert len({image.sum().item() for image in first}) > 4
