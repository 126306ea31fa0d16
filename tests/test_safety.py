"""Numbers that go wrong, mixed precision, and what is done about both."""

from __future__ import annotations

import pytest
import torch
from ignite.engine import Engine
from monai.bundle import ConfigParser
from monai.engines import IterationEvents, SupervisedTrainer
from torch.amp import GradScaler

from medsegdiff_monai.errors import InputError
from medsegdiff_monai.handlers import GradientClipping, GradientScaling, StopOnBadLoss
from medsegdiff_monai.inferers import DiffusionEnsembleInferer
from medsegdiff_monai.networks import MedSegDiffUNet
from medsegdiff_monai.objective import DiffusionTrainingInferer, mask_loss
from medsegdiff_monai.schedulers import DDIMScheduler
from medsegdiff_monai.settings import amp_dtype

from .conftest import CONFIGS, PICTURE_SETTINGS
from .test_bad_input import message


def test_gradients_are_clipped_before_the_step_and_small_ones_left_alone():
    network = torch.nn.Linear(4, 2, bias=False)
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    seen = []

    def step(engine, scale):
        before = network.weight.detach().clone()
        network.weight.grad = torch.full((2, 4), scale)
        optimizer.step()
        seen.append((network.weight - before).norm().item())

    engine = Engine(step)
    GradientClipping(optimizer, max_norm=1.5).attach(engine)
    engine.run([100.0, 0.01])
    assert seen == pytest.approx([1.5, 0.01 * 8**0.5], rel=1e-4)


@pytest.mark.parametrize("amp", [False, "float16"])
@pytest.mark.parametrize("max_norm", [0.25, 1000.0])
def test_what_is_clipped_is_the_accumulated_gradient_whatever_its_scale(amp, max_norm):
    """Against the mean gradient of all batches, by hand."""
    batches = [torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]), torch.tensor([[-4.0, 1.0]])]
    network = torch.nn.Linear(2, 1, bias=False)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
    SupervisedTrainer(
        device="cpu", max_epochs=1, train_data_loader=batches, network=network, optimizer=optimizer,
        loss_function=lambda prediction, _: prediction.sum(), prepare_batch=lambda batch, *_: (batch, batch),
        accumulation_steps=3, decollate=False,
        train_handlers=[GradientScaling(amp), GradientClipping(optimizer, max_norm)],
    ).run()  # fmt: skip
    gradient = torch.stack(batches).sum(0) / 3
    expected = gradient * min(1.0, max_norm / gradient.norm().item())
    torch.testing.assert_close(before - network.weight.detach(), expected, rtol=1e-4, atol=1e-5)


def engine_at(batch: dict) -> Engine:
    engine = Engine(lambda e, b: None)
    engine.register_events(*IterationEvents)
    engine.state.batch = batch
    return engine


def test_loss_that_is_not_finite_stops_before_the_weights_are_touched():
    engine = engine_at({"case": ["a", "b"]})
    StopOnBadLoss().attach(engine)
    engine.state.output = {"loss": torch.tensor(float("nan"))}
    with pytest.raises(InputError, match="nan at iteration 0, on the cases a, b"):
        engine.fire_event(IterationEvents.LOSS_COMPLETED)


def test_gradients_that_are_not_finite_stop_before_the_weights_are_touched():
    """A loss may be finite and its gradient not; the checkpoint of the epoch would hold the ruined weights."""
    weight = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientClipping(optimizer).attach(engine_at({"case": ["c"]}))
    weight.grad = torch.tensor([1.0, float("inf")])
    with pytest.raises(InputError, match="gradients are not finite at iteration 0, on the cases c"):
        optimizer.step()
    assert weight.tolist() == [1.0, 1.0]


def test_float16_leaves_out_a_step_that_overflows_and_halves_the_scale():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    GradientClipping(optimizer).attach(engine_at({}))
    scaler = GradScaler("cpu", init_scale=1024.0)
    scaler.scale(weight.sum() * float("inf")).backward()
    scaler.step(optimizer)
    scaler.update()
    assert weight.item() == 1.0 and scaler.get_scale() == 512.0


@pytest.mark.parametrize("accumulated", [1, 2])
def test_bad_numbers_stop_a_training_and_name_the_cases(accumulated, bundle, pictures, tmp_path):
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures, "optimizer#lr": 1e30, "max_epochs": 4, "val_interval": 9}
    settings["train#trainer#accumulation_steps"] = accumulated
    with pytest.raises((RuntimeError, InputError)) as error:
        bundle("train", **settings)
    assert "not finite" in message(error.value) or "the loss is" in message(error.value)
    assert "on the cases image_" in message(error.value) and "--learning_rate lower" in message(error.value)
    for file in (tmp_path / "models").glob("*.pt"):
        weights = torch.load(file, weights_only=True)["network"]
        assert all(value.isfinite().all() for value in weights.values()), file


@pytest.mark.parametrize(
    "amp, dtype",
    [
        (False, None),
        ("False", None),
        (True, torch.bfloat16),
        ("true", torch.bfloat16),
        ("bfloat16", torch.bfloat16),
        ("float16", torch.float16),
    ],
)
def test_values_of_amp(amp, dtype):
    assert amp_dtype(amp) == dtype


def test_other_values_of_amp_are_refused():
    with pytest.raises(InputError, match="amp='half' must be one of"):
        amp_dtype("half")


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_under_autocast_loss_and_ff_parser_are_float32(amp, monkeypatch):
    transformed, rfftn = [], torch.fft.rfftn

    def record(x, *args, **kwargs):
        transformed.append(x.dtype)
        return rfftn(x, *args, **kwargs)

    monkeypatch.setattr(torch.fft, "rfftn", record)
    torch.manual_seed(0)
    net = MedSegDiffUNet(2, 1, 1, channels=[8, 8], num_res_blocks=1, ff_size=8)
    scheduler = DDIMScheduler()
    mask = torch.rand(2, 1, 8, 8).round() * 2 - 1
    infer = DiffusionTrainingInferer(scheduler, amp=amp)
    drawn = {"noise": torch.randn_like(mask), "timesteps": torch.tensor([3, 900]), "guessed": torch.tensor([True] * 2)}
    out = infer(mask, net, condition=mask, **drawn)
    assert out.dtype == amp_dtype(amp)  # the network did run in it
    assert set(transformed) == {torch.float32}
    loss = mask_loss(out, (mask + 1) / 2)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad is None or p.grad.dtype == torch.float32 for p in net.parameters())
    members = DiffusionEnsembleInferer(scheduler, 1, (8, 8), num_members=1, num_steps=1, amp=amp)
    assert members(mask, net.eval()).isfinite().all()


def test_float16_trains_with_a_scaler_that_a_checkpoint_keeps(bundle, pictures, tmp_path):
    """On a CPU, where only the way is shown, not the speed; a resumed run goes on with the scale."""
    settings = {**PICTURE_SETTINGS, "dataset_dir": pictures, "amp": "float16", "val_interval": 9, "max_epochs": 2}
    bundle("train", **settings, **{"train#trainer#max_epochs": 1})
    bundle("train", **settings, resume="true")
    first, second = (
        torch.load(tmp_path / "models" / f"checkpoint_epoch={n}.pt", weights_only=True)["scaler"] for n in (1, 2)
    )
    assert first["_growth_tracker"] + 1 == second["_growth_tracker"] and first["scale"] == second["scale"]
    bundle("train", **{**settings, "amp": "bfloat16", "max_epochs": 3}, resume="true")
    assert "scaler" not in torch.load(tmp_path / "models" / "checkpoint_epoch=3.pt", weights_only=True)


@pytest.mark.parametrize(
    ("found", "native"),
    [({"avx512_bf16": True}, True), ({"avx512_f": True, "avx512_bf16": False}, False), (None, False)],
)
def test_training_is_in_bfloat16_where_the_cpu_computes_in_it(found, native, monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)  # as in PyTorch 2.8
    if found is not None:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "train.json"))
    for device, dims, expected in (("cpu", 2, native), ("cpu", 3, False), ("cuda", 2, False)):
        parser.update({"bundle_root": "", "device": device, "spatial_dims": dims})
        parser.parse(True)
        assert parser.get_parsed_content("amp") is expected


@pytest.mark.parametrize("amp", [False, True, "float16"])
def test_the_log_says_in_which_precision_a_training_is(amp, caplog):
    engine = Engine(lambda *_: None)
    GradientScaling(amp).attach(engine)
    engine.state.device = torch.device("cpu")
    with caplog.at_level("INFO"):
        engine.run([0])
    told = [message for message in caplog.messages if message.startswith("amp:")]
    assert len(told) == bool(amp) and all(str(amp_dtype(amp))[6:] in message for message in told)


def test_weight_gradients_in_bfloat16_are_those_of_single_precision():
    """In memory that holds large values, of fields as small as those of the coarsest levels."""
    for size in ((2, 2), (2, 3), (2, 4), (4, 2), (4, 4)):
        convolution = torch.nn.Conv2d(16, 16, 3, padding=1)
        x = torch.randn(2, 16, *size)
        gradients = []
        for amp in (False, *[True] * 8):
            junk = [torch.full((n,), 1e31) for n in (500, 2000, 8000, 20000, 60000)]
            del junk
            convolution.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = convolution(x)
            y.float().square().mean().backward()
            gradients.append(convolution.weight.grad.clone())
        assert all(torch.allclose(one, gradients[0], atol=0.02, rtol=0.1) for one in gradients[1:])
