"""Averaged weights, checkpoints and the demo's data."""

from __future__ import annotations

import ast
import copy
import json
import random
import re
import signal

import nibabel as nib
import numpy as np
import pytest
import torch
from ignite.engine import Engine, Events
from monai.bundle import ConfigParser
from monai.data import Dataset
from monai.handlers import StatsHandler
from monai.transforms import RandGaussianNoise
from torch.utils._python_dispatch import TorchDispatchMode

from medsegdiff_monai.engines import cosine_decay
from medsegdiff_monai.errors import InputError, Interrupted
from medsegdiff_monai.files import replacing
from medsegdiff_monai.handlers import (
    BestModelSaver,
    EarlyStopping,
    EpochSeeding,
    ModelEMA,
    PlainErrors,
    TrainingCheckpoint,
    WeightsLoader,
)
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.settings import as_bool

from .conftest import CONFIGS


def test_average_starts_from_weights_loaded_after_it_was_built():
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    engine = Engine(lambda e, b: network.weight.data.add_(1.0))
    ModelEMA(network, average, momentum=0.1).attach(engine)
    network.weight.data.fill_(100.0)  # a checkpoint, loaded at last
    engine.run([0] * 300)
    # the average of a ramp lags behind by (1 - momentum) / momentum steps
    assert average.weight.item() == pytest.approx(400 - 9, abs=0.5)
    assert not average.weight.requires_grad


def test_average_of_all_weights_is_its_formula_and_buffers_are_copied():
    network = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    average = copy.deepcopy(network)
    engine = Engine(lambda e, b: [p.data.normal_() for p in [*network.parameters(), *network.buffers()][:-1]])
    ModelEMA(network, average, momentum=0.2).attach(engine)
    expected = [p.detach().clone() for p in network.parameters()]

    @engine.on(Events.ITERATION_COMPLETED)
    def follow(engine):
        share = max(0.2, 9 / (10 + engine.state.iteration))
        for e, p in zip(expected, network.parameters()):
            e.copy_((1 - share) * e + share * p.detach())

    engine.run([0] * 40)
    torch.testing.assert_close([p.detach() for p in average.parameters()], expected)
    for own, theirs in zip(average.buffers(), network.buffers()):
        assert torch.equal(own, theirs) and own.data_ptr() != theirs.data_ptr()


def test_average_takes_no_more_kernels_for_more_weights():
    """On a GPU, what holds up the steps of a small network is starting them."""

    class Count(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.calls += 1
            return function(*args, **(kwargs or {}))

    def of_a_step(layers: int) -> int:
        network, count = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(layers))), Count()
        engine = Engine(lambda e, b: None)
        ModelEMA(network, copy.deepcopy(network)).attach(engine)
        calls = []
        for steps in (3, 4):
            with count:
                engine.run([0] * steps)
            calls.append(count.calls)
        return calls[1] - 2 * calls[0]  # both have started from the network's weights

    assert of_a_step(2) == of_a_step(20) > 0


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


@pytest.mark.parametrize("damage", [lambda raw: raw[: len(raw) // 2], lambda raw: b""])
def test_truncated_checkpoint_is_named_and_the_one_before_taken(damage, tmp_path, caplog):
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=3)
    newest = tmp_path / "checkpoint_epoch=3.pt"
    newest.write_bytes(damage(newest.read_bytes()))
    seen = []
    trainer = make_trainer(torch.nn.Linear(2, 1), tmp_path, resume=True)
    trainer.add_event_handler(Events.EPOCH_STARTED, lambda engine: seen.append(engine.state.epoch))
    trainer.run([0], max_epochs=4)
    assert seen == [3, 4]
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "checkpoint_epoch=3.pt: is truncated" in warning and "Using the previous checkpoint" in warning

    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match=r"checkpoint_epoch=3.pt: is truncated"):
        make_trainer(torch.nn.Linear(2, 1), tmp_path, resume=True).run([0], max_epochs=5)


def test_checkpoints_that_others_remove_are_not_missed_and_a_lost_model_is_named(tmp_path):
    network = torch.nn.Linear(2, 1)
    trainer = make_trainer(network, tmp_path)
    BestModelSaver(network, str(tmp_path / "model.pt"), trainer.validator).attach(trainer)

    def sweep(engine):
        trainer.validator.state.best_metric_epoch = engine.state.epoch if engine.state.epoch < 3 else 2
        for path in tmp_path.glob("*.pt") if engine.state.epoch == 3 else tmp_path.glob("checkpoint*.pt"):
            path.unlink()

    trainer.add_event_handler(Events.EPOCH_STARTED, sweep)
    with pytest.raises(InputError, match=r"model.pt: was removed during training: its last checkpoint"):
        trainer.run([0], max_epochs=4)
    assert (tmp_path / "checkpoint_epoch=4.pt").is_file()


def test_a_checkpoint_that_is_being_removed_is_not_missed(tmp_path, monkeypatch):
    """It was there when the folder was listed."""
    monkeypatch.setattr(TrainingCheckpoint, "_files", lambda self: {1: tmp_path / "checkpoint_epoch=1.pt"})
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=4)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize(
    "resume, stop, advice",
    [
        (False, 1, r"No epoch was finished and nothing is saved: run the same command"),
        (False, 4, r"up to epoch 3 is saved in .*: the same command with --resume true"),
        (True, 3, r"up to epoch 2 is saved"),
    ],
)
def test_a_training_that_is_stopped_says_what_is_saved(resume, stop, advice, tmp_path):
    """Also beside the checkpoints of an earlier training, which a new one replaces."""
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=2)
    trainer = make_trainer(torch.nn.Linear(2, 1), tmp_path, resume=resume)

    def interrupt(engine):
        if engine.state.epoch == stop:
            signal.raise_signal(signal.SIGINT)

    trainer.add_event_handler(Events.EPOCH_STARTED, interrupt)
    with pytest.raises(Interrupted) as stopped:
        trainer.run([0], max_epochs=5)
    assert re.search(advice, stopped.value.message)


def test_errors_of_a_validation_are_passed_on_without_their_frames(caplog):
    engine = Engine(lambda e, b: as_bool("yes"))
    PlainErrors().attach(engine)
    StatsHandler(name="stats").attach(engine)
    with pytest.raises(InputError):
        engine.run([0])
    assert "Traceback" not in caplog.text


def test_what_a_killed_run_was_writing_is_removed(tmp_path):
    for name in (".checkpoint_epoch=7.pt.99.tmp", ".model.pt.99.tmp", "notes.tmp"):
        (tmp_path / name).touch()
    make_trainer(torch.nn.Linear(2, 1), tmp_path).run([0], max_epochs=1)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint_epoch=1.pt", "notes.tmp"]


def test_a_file_is_replaced_as_a_whole_or_not_at_all(tmp_path):
    file = tmp_path / "weights.pt"
    file.write_bytes(b"old")
    with pytest.raises(InputError, match=r"weights.pt: cannot be written \(disk full\)"), replacing(file) as temporary:
        temporary.write_bytes(b"ne")
        raise OSError("disk full")
    assert file.read_bytes() == b"old" and list(tmp_path.iterdir()) == [file]


def test_only_the_first_rank_writes(tmp_path, monkeypatch):
    monkeypatch.setattr("ignite.distributed.utils.get_rank", lambda: 1)
    trainer = make_trainer(torch.nn.Linear(2, 1), tmp_path)
    trainer.validator.state.best_metric_epoch = trainer.validator.state.epoch = 0
    BestModelSaver(torch.nn.Linear(2, 1), str(tmp_path / "model.pt"), trainer.validator)(trainer)
    trainer.run([0], max_epochs=1)
    assert list(tmp_path.iterdir()) == []


def test_ranks_and_epochs_draw_differently_and_the_same_again(monkeypatch):
    transform = RandGaussianNoise(prob=1.0)
    dataset = Dataset([torch.zeros(1, 4)], transform)
    seeding = EpochSeeding(dataset, seed=3)

    def draw(epoch, rank):
        monkeypatch.setattr("ignite.distributed.get_rank", lambda: rank)
        engine = Engine(lambda e, b: None)
        engine.state.epoch = epoch
        seeding(engine)
        return [torch.rand(2).tolist(), np.random.rand(2).tolist(), random.random(), dataset[0].tolist()]

    first, other_epoch, other_rank, again = draw(1, 0), draw(2, 0), draw(1, 1), draw(1, 0)
    assert first == again
    assert all(a != b and a != c and b != c for a, b, c in zip(first, other_epoch, other_rank))


def stopping_trainer(scores, patience, interval, folder, resume=False):
    """A trainer whose validation gives scores in turn; returns the epochs it ran."""
    trainer = make_trainer(torch.nn.Linear(2, 1), folder, max_epochs=20, resume=resume)
    state, epochs = trainer.validator.state, []

    def validate(engine):
        epochs.append(engine.state.epoch)
        if engine.state.epoch % interval == 0:
            score = scores[engine.state.epoch // interval - 1]
            if score > state.best_metric:
                state.best_metric, state.best_metric_epoch = score, engine.state.epoch

    # as in the config: validation, checkpoint, stopping
    trainer._event_handlers[Events.EPOCH_COMPLETED].insert(0, (validate, (trainer,), {}))
    EarlyStopping(trainer.validator, patience, interval).attach(trainer)
    return trainer, epochs


@pytest.mark.parametrize("interval", [1, 2])
def test_training_stops_after_validations_without_a_better_one(interval, tmp_path):
    scores = [0.1, 0.5, 0.4, 0.6, 0.6, 0.5, 0.7, 0.8, 0.9, 1.0]
    trainer, epochs = stopping_trainer(scores, 2, interval, tmp_path)
    trainer.run([0], max_epochs=20)
    assert epochs[-1] == 6 * interval  # two after the fourth, the equal one among them


def test_stopping_survives_resuming_and_a_stopped_training_is_not_resumed(tmp_path):
    scores = [0.5, 0.4, 0.3, 0.2, 0.1, 0.1, 0.1, 0.1]
    stopping_trainer(scores, 3, 1, tmp_path)[0].run([0], max_epochs=3)
    trainer, epochs = stopping_trainer(scores, 3, 1, tmp_path, resume=True)
    trainer.run([0], max_epochs=8)
    assert epochs == [4]
    with pytest.raises(InputError, match=r"stopped early at epoch 4 \(patience=3\)"):
        stopping_trainer(scores, 3, 1, tmp_path, resume=True)[0].run([0], max_epochs=8)
    trainer, epochs = stopping_trainer(scores, 5, 1, tmp_path, resume=True)
    trainer.run([0], max_epochs=8)
    assert epochs == [5, 6]


def test_patience_is_at_least_one_validation():
    with pytest.raises(InputError, match="patience=0"):
        EarlyStopping(Engine(lambda e, b: None), 0, 1)


def small_network(**kwargs) -> MedSegDiffUNet:
    arguments = {"in_channels": 1, "out_channels": 2, "channels": [8, 8], "num_res_blocks": 1, "ff_size": 8}
    return MedSegDiffUNet(2, **{**arguments, **kwargs})


ADAPTED = ConfigParser.load_config_file(CONFIGS / "train.json")["train"]["handlers"][0]["adapt"]


@pytest.mark.parametrize(
    "change, anew",
    [
        ({"in_channels": 3}, {"image_stem"}),
        ({"out_channels": 1}, {"mask_stem", "out_conv"}),
        ({"in_channels": 3, "out_channels": 1}, {"image_stem", "mask_stem", "out_conv"}),
        ({}, set()),
    ],
)
def test_pretrained_weights_of_other_channels_keep_all_layers_but_those(change, anew, tmp_path, caplog):
    source, network = small_network(), small_network(**change)
    fresh = {name: value.clone() for name, value in network.named_parameters()}
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with caplog.at_level("INFO"):
        WeightsLoader(str(tmp_path / "model.pt"), network, ADAPTED)(Engine(lambda e, b: None))
    for name, value in network.named_parameters():
        expected = fresh[name] if name.split(".")[0] in anew else source.state_dict()[name]
        torch.testing.assert_close(value, expected, rtol=0, atol=0)
    lines = [record.getMessage() for record in caplog.records if "is initialised anew" in record.getMessage()]
    assert {line.split("the layer ")[1].split()[0] for line in lines} == anew and len(lines) == len(anew)
    assert all("model.pt" in line and "in the network" in line for line in lines)


def test_pretrained_weights_of_another_architecture_are_refused_and_inference_adapts_nothing(tmp_path):
    torch.save(small_network(channels=[16, 8]).state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="another architecture"):
        WeightsLoader(str(tmp_path / "other.pt"), small_network(), ADAPTED)(Engine(lambda e, b: None))
    torch.save(small_network(in_channels=3).state_dict(), tmp_path / "other.pt")
    with pytest.raises(InputError, match="another architecture"):
        WeightsLoader(str(tmp_path / "other.pt"), small_network())(Engine(lambda e, b: None))


WRAPPERS = {
    "DataParallel": lambda net: torch.nn.DataParallel(net).state_dict(),
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(net).state_dict(),
    "compiled": lambda net: torch.compile(net).state_dict(),
    "MONAI": lambda net: {"model": net.state_dict()},
    "Lightning": lambda net: {"state_dict": {f"network.{k}": v for k, v in net.state_dict().items()}, "epoch": 3},
    "of a training": lambda net: {
        "network": small_network().state_dict(), "ema": net.state_dict(), "optimizer": {"state": {}}
    },
    "from before buffers": lambda net: dict(net.named_parameters()),
}  # fmt: skip


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=list(WRAPPERS))
def test_weights_are_recognised_however_they_were_saved(wrap, tmp_path):
    source, network = small_network(), small_network()
    torch.save(wrap(source), tmp_path / "model.pt")
    WeightsLoader(str(tmp_path / "model.pt"), network)(Engine(lambda e, b: None))
    for (name, value), (_, expected) in zip(network.named_parameters(), source.named_parameters(), strict=True):
        torch.testing.assert_close(value, expected.cpu(), rtol=0, atol=0, msg=name)  # DataParallel moves to a GPU


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value, tmp_path):
    source = small_network()
    source.state_dict()["out_conv.weight"][0, 0, 0, 1] = value
    torch.save(source.state_dict(), tmp_path / "model.pt")
    for adapt in ((), ADAPTED):
        with pytest.raises(InputError, match=r"model.pt: 1 of the 144 values of out_conv.weight are NaN or infinite"):
            WeightsLoader(str(tmp_path / "model.pt"), small_network(), adapt)(Engine(lambda e, b: None))


def test_calibration_that_is_no_number_is_refused(tmp_path):
    source = small_network()
    source.state_dict()["record.reliability"][0, 3] = float("nan")
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: 1 of the \d+ values of record.reliability are NaN"):
        WeightsLoader(str(tmp_path / "model.pt"), small_network())(Engine(lambda e, b: None))


@pytest.mark.parametrize(
    "change, remedy",
    [
        ({"channels": [16, 8, 8]}, "--channels [16,8,8]"),
        ({"channels": [16, 16]}, "--channels [16,16]"),
        ({"in_channels": 3, "out_channels": 1}, "--in_channels 3 --num_classes 1"),
        ({"num_res_blocks": [1, 2]}, "--num_res_blocks [1,2]"),
        ({"stem_stride": 2}, "--stem_stride 2"),
        ({"attention_levels": [False, True], "num_head_channels": 4}, "--attention_levels [False,True]"),
        ({"conditioning_levels": []}, "--conditioning_levels []"),
        ({"use_ff_parser": False}, "--use_ff_parser False"),
        ({"ff_size": [16, 24]}, "--roi_size [16,24]"),
        ({"light_decoder": False}, "--network_def#light_decoder False"),
        ({"channels": [16, 8, 8], "mask_level": 0}, "--network_def#mask_level 0"),
    ],
    ids=str,
)
def test_weights_of_another_architecture_name_the_variables_to_set(change, remedy, tmp_path):
    torch.save(small_network(**change).state_dict(), tmp_path / "model.pt")
    with pytest.raises(InputError, match=r"model.pt: weights of another architecture") as error:
        WeightsLoader(str(tmp_path / "model.pt"), small_network())(Engine(lambda e, b: None))
    assert remedy in str(error.value) and "\n" not in str(error.value)
    settings = re.search(r"set (.*), or give", str(error.value))[1]
    arguments = {"num_classes": "out_channels", "roi_size": "ff_size"}
    values = dict(pair.split(" ") for pair in settings.removeprefix("--").split(" --"))
    values = {
        arguments.get(name, name).removeprefix("network_def#"): ast.literal_eval(value)
        for name, value in values.items()
    }
    fitting = small_network(**{**change, **values})  # heads have no shape
    WeightsLoader(str(tmp_path / "model.pt"), fitting)(Engine(lambda e, b: None))


def test_pretrained_weights_of_another_field_filter_as_they_did(tmp_path, caplog):
    """The frequencies of a signal of 8 are among those of one of 16."""
    source, network = small_network(ff_size=8), small_network(ff_size=[16, 8])
    torch.nn.init.normal_(source.fusions[0].ff_parser.weight)
    torch.save(source.state_dict(), tmp_path / "model.pt")
    with caplog.at_level("INFO"):
        WeightsLoader(str(tmp_path / "model.pt"), network, ADAPTED)(Engine(lambda e, b: None))
    (line,) = [r.getMessage() for r in caplog.records if "roi_size" in r.getMessage()]
    assert "model.pt" in line and "from [8, 8] to [16, 8]" in line
    found, expected = (net.fusions[0].ff_parser.frequency_map([8, 8]) for net in (network, source))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "text, value", [("true", True), ("True", True), ("FALSE", False), (True, True), (False, False)]
)
def test_booleans_from_the_command_line(text, value):
    assert as_bool(text) is value


def test_other_words_are_no_booleans():
    with pytest.raises(InputError, match="'yes' is neither true nor false"):
        as_bool("yes")


def test_demo_slices_are_real_apart_and_of_one_hemisphere(tmp_path):
    pytest.importorskip("nilearn")
    from medsegdiff_monai.data.raw.mni152 import write_mni152_slices

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
