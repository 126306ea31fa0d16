"""What all samplers share: timesteps, tables, predictions, precision, error messages, MONAI's inferer."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.data import MetaTensor
from monai.inferers import DiffusionInferer
from monai.networks.schedulers import NoiseSchedules
from monai.networks.schedulers import Scheduler as MonaiScheduler

from medsegdiff_monai.schedulers import DDIMScheduler, DDPMScheduler, DPMSolverPlusPlusScheduler

SAMPLERS = [
    (DDIMScheduler, {}),
    (DDIMScheduler, {"eta": 1.0}),
    (DDPMScheduler, {"variance_type": "fixed_small"}),
    (DDPMScheduler, {"variance_type": "fixed_large"}),
    (DDPMScheduler, {"variance_type": "learned_range"}),
    (DPMSolverPlusPlusScheduler, {}),
]
PREDICTIONS = ["epsilon", "sample", "v_prediction"]
SCHEDULES = ["linear_beta", "scaled_linear_beta", "cosine", "sigmoid_beta"]
SPACINGS = ["linspace", "leading", "trailing", "quadratic"]

each_sampler = pytest.mark.parametrize(("cls", "kwargs"), SAMPLERS)


def network_output(scheduler, x: torch.Tensor) -> torch.Tensor:
    """Something of the shape the scheduler wants."""
    learned = getattr(scheduler, "variance_type", "") == "learned_range"
    return torch.cat([x.tanh(), x.cos()], dim=1) if learned else x.tanh()


def run(scheduler, x: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    for t in scheduler.timesteps:
        x, _ = scheduler.step(network_output(scheduler, x), t, x, generator=generator)
    return x


# timesteps


@pytest.mark.parametrize(
    ("spacing", "expected"),
    [
        ("linspace", [999, 749, 500, 250, 0]),
        ("leading", [800, 600, 400, 200, 0]),
        ("trailing", [999, 799, 599, 399, 199]),
        ("quadratic", [999, 562, 250, 62, 0]),
    ],
)
def test_timesteps(spacing, expected):
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(5)
    assert scheduler.timesteps.tolist() == expected
    assert scheduler.num_inference_steps == 5


@given(total=st.integers(1, 1500), data=st.data(), spacing=st.sampled_from(SPACINGS))
@settings(deadline=None, max_examples=200)
def test_timesteps_strictly_decrease_within_range(total, data, spacing):
    steps = data.draw(st.integers(1, total))
    scheduler = DDIMScheduler(num_train_timesteps=total, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.tolist()
    assert len(timesteps) == steps
    assert timesteps == sorted(set(timesteps), reverse=True)
    assert 0 <= timesteps[-1] and timesteps[0] < total
    if spacing != "leading":
        assert timesteps[0] == total - 1


@each_sampler
def test_samples_without_set_timesteps_at_full_length(cls, kwargs):
    scheduler = cls(num_train_timesteps=20, **kwargs)
    assert scheduler.timesteps.tolist() == list(range(19, -1, -1))
    assert run(scheduler, torch.randn(1, 2, 4, 4)).isfinite().all()


# tables


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_tables_are_those_of_monai_in_double_precision(schedule):
    scheduler, reference = DDIMScheduler(schedule=schedule), MonaiScheduler(schedule=schedule)
    for name in ("betas", "alphas", "alphas_cumprod"):
        ours = getattr(scheduler, name)
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, getattr(reference, name).double(), rtol=1e-4, atol=1e-6)


def test_own_noise_schedule_and_its_arguments_are_used():
    if "constant_for_test" not in NoiseSchedules.names:
        NoiseSchedules.add("constant_for_test", "Constant", lambda num_train_timesteps, b: torch.full((10,), b))
    scheduler = DDIMScheduler(num_train_timesteps=10, schedule="constant_for_test", b=0.25)
    torch.testing.assert_close(scheduler.alphas_cumprod, 0.75 ** torch.arange(1, 11).double())


@pytest.mark.parametrize("scale", [0.2, 0.7, 3.0])
def test_signal_scale_is_x0_scaled_and_x_t_brought_back_to_its_variance(scale):
    plain, scheduler = DDIMScheduler(schedule="cosine"), DDIMScheduler(schedule="cosine", signal_scale=scale)
    x0, noise = torch.randn(5, 1, 4, 4).double(), torch.randn(5, 1, 4, 4).double()
    t = torch.tensor([0, 100, 500, 900, 999])
    alpha_bar = plain.alphas_cumprod[t].view(-1, 1, 1, 1)
    scaled = alpha_bar.sqrt() * scale * x0 + (1 - alpha_bar).sqrt() * noise
    expected = scaled / (scale**2 * alpha_bar + 1 - alpha_bar).sqrt()
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), expected)
    with pytest.raises(ValueError, match="signal_scale is 0"):
        DDIMScheduler(signal_scale=0)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_zero_terminal_snr(schedule):
    plain = DDIMScheduler(schedule=schedule)
    scheduler = DDIMScheduler(schedule=schedule, rescale_betas_zero_snr=True)
    assert scheduler.alphas_cumprod[-1] == 0
    assert scheduler.alphas_cumprod[0] == pytest.approx(plain.alphas_cumprod[0].item())
    assert (scheduler.alphas_cumprod.diff() < 0).all()
    torch.testing.assert_close(scheduler.alphas.cumprod(0), scheduler.alphas_cumprod)


@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@each_sampler
def test_zero_terminal_snr_samples(cls, kwargs, prediction_type, steps):
    scheduler = cls(prediction_type=prediction_type, rescale_betas_zero_snr=True, **kwargs)
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 4, 4)
    result = run(scheduler, x)
    assert result.isfinite().all() and result.dtype == x.dtype
    if steps == 1:
        torch.testing.assert_close(result, x.tanh() if prediction_type == "sample" else -x.tanh())


# predictions


@given(
    prediction_type=st.sampled_from(PREDICTIONS),
    schedule=st.sampled_from(SCHEDULES),
    timesteps=st.lists(st.integers(0, 999), min_size=3, max_size=3),
    spatial=st.sampled_from([(5,), (4, 3), (2, 3, 2)]),
    seed=st.integers(0, 2**31),
)
@settings(deadline=None, max_examples=100)
def test_add_noise_then_predict_gives_back_x0_and_epsilon(prediction_type, schedule, timesteps, spatial, seed):
    scheduler = DDIMScheduler(prediction_type=prediction_type, schedule=schedule)
    generator = torch.Generator().manual_seed(seed)
    x0, noise = torch.randn(2, 3, 2, *spatial, generator=generator, dtype=torch.float64)
    t = torch.tensor(timesteps)
    x_t = scheduler.add_noise(x0, noise, t)
    output = {"epsilon": noise, "sample": x0, "v_prediction": scheduler.get_velocity(x0, noise, t)}[prediction_type]
    predicted = scheduler.predict(output, t, x_t)
    torch.testing.assert_close(predicted[0], x0, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(predicted[1], noise, rtol=1e-5, atol=1e-6)
    alone = scheduler.predict(output[:1], timesteps[0], x_t[:1])  # one integer for the whole batch
    torch.testing.assert_close(alone[0], predicted[0][:1])


def test_add_noise_and_velocity_equal_monai():
    scheduler, reference = DDIMScheduler(), MonaiScheduler()
    x0, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0, 500, 999])
    torch.testing.assert_close(scheduler.add_noise(x0, noise, t), reference.add_noise(x0, noise, t))
    torch.testing.assert_close(scheduler.get_velocity(x0, noise, t), reference.get_velocity(x0, noise, t))
    one = torch.tensor([500])
    torch.testing.assert_close(scheduler.add_noise(x0, noise, one), reference.add_noise(x0, noise, one))


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_clipping_bounds_x0_and_moves_epsilon_with_it(prediction_type):
    scheduler = DDIMScheduler(
        prediction_type=prediction_type, clip_sample=True, clip_sample_min=-0.2, clip_sample_max=0.3
    )
    x_t = 3 * torch.randn(2, 1, 8, 8)
    x0, epsilon = scheduler.predict(3 * torch.randn(2, 1, 8, 8), 500, x_t)
    assert x0.min() == pytest.approx(-0.2) and x0.max() == pytest.approx(0.3)
    torch.testing.assert_close(scheduler.add_noise(x0, epsilon, torch.tensor([500])), x_t)


def test_clipping_is_off_by_default():
    x0, _ = DDIMScheduler(prediction_type="sample").predict(torch.full((1, 1, 2), 7.0), 500, torch.zeros(1, 1, 2))
    assert (x0 == 7).all()


# steps


@each_sampler
def test_last_step_returns_x0(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(3)
    x = torch.randn(2, 1, 4, 4)
    for t in scheduler.timesteps:
        x, x0 = scheduler.step(network_output(scheduler, x), t, x)
    torch.testing.assert_close(x, x0)


@each_sampler
def test_timestep_may_be_an_integer_or_a_tensor(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 1, 4, 4)
    results = [
        scheduler.step(network_output(scheduler, x), t, x, generator=torch.Generator().manual_seed(0))[0]
        for t in (999, torch.tensor(999), torch.tensor([999]), torch.tensor(999.0))
    ]
    for result in results[1:]:
        assert torch.equal(result, results[0])


@each_sampler
def test_noise_is_drawn_if_and_only_if_stochastic(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(4)
    generator = torch.Generator().manual_seed(0)
    before = generator.get_state()
    run(scheduler, torch.randn(1, 1, 4, 4), generator)
    assert scheduler.is_stochastic != torch.equal(before, generator.get_state())


@each_sampler
def test_noise_of_the_caller_replaces_what_the_generator_draws(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(4)
    x = torch.randn(2, 1, 4, 4)
    t, output = scheduler.timesteps[0], network_output(scheduler, x)
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    drawn, _ = scheduler.step(output, t, x, generator=torch.Generator().manual_seed(5))
    given_noise, _ = scheduler.step(output, t, x, noise=noise)
    assert torch.equal(drawn, given_noise)


@each_sampler
def test_works_in_monai_inferer(cls, kwargs):
    scheduler = cls(prediction_type="sample", **kwargs)
    inferer = DiffusionInferer(scheduler)
    condition = torch.rand(2, 1, 4, 4, 4).round() * 2 - 1

    def network(x, timesteps, context):
        assert timesteps.shape == (1,)
        return torch.cat([context, x], dim=1) if kwargs.get("variance_type") == "learned_range" else context

    scheduler.set_timesteps(5)
    noise = torch.randn(2, 1, 4, 4, 4)
    result = inferer.sample(noise, network, scheduler, conditioning=condition, mode="crossattn", verbose=False)
    torch.testing.assert_close(result, condition)


@each_sampler
def test_copy_samples_alike(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(6)
    x = torch.randn(1, 1, 4, 4)
    results = [run(s, x, torch.Generator().manual_seed(0)) for s in (scheduler, copy.deepcopy(scheduler), scheduler)]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


# precision and devices


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@each_sampler
def test_half_precision_leaves_the_tables_alone(cls, kwargs, dtype):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(5)
    tables = {name: getattr(scheduler, name).clone() for name in ("betas", "alphas", "alphas_cumprod", "timesteps")}
    x, noise, t = torch.randn(2, 1, 4, 4, dtype=dtype), torch.randn(2, 1, 4, 4, dtype=dtype), torch.tensor([3, 700])
    assert scheduler.add_noise(x, noise, t).dtype == dtype
    assert scheduler.get_velocity(x, noise, t).dtype == dtype
    assert run(scheduler, x).dtype == dtype
    scheduler.to(dtype)  # as a module: nothing of it is a parameter
    for name, table in tables.items():
        now = getattr(scheduler, name)
        assert now.dtype == table.dtype and now.device == table.device and torch.equal(now, table)


@each_sampler
def test_half_precision_step_is_the_float32_step_rounded(cls, kwargs):
    scheduler = cls(prediction_type="v_prediction", **kwargs)
    scheduler.set_timesteps(50)
    x = torch.randn(2, 1, 8, 8).bfloat16()
    output = network_output(scheduler, x)
    noise = torch.randn(x.shape)
    t = scheduler.timesteps[0]
    low = scheduler.step(output, t, x, noise=noise)
    high = scheduler.step(output.float(), t, x.float(), noise=noise)
    for a, b in zip(low, high, strict=True):
        assert torch.equal(a, b.bfloat16())


@each_sampler
def test_works_under_autocast(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(5)
    x = torch.randn(2, 1, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for t in scheduler.timesteps:
            x, x0 = scheduler.step(network_output(scheduler, x).bfloat16(), t, x)
    assert x.dtype == x0.dtype == torch.float32 and x.isfinite().all()


@each_sampler
def test_only_single_precision_reaches_the_device(cls, kwargs):
    """The meta device stands in for one that has no float64, such as Apple's."""
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(3)
    x = torch.randn(2, 1, 4, 4, device="meta")
    for result in (run(scheduler, x), scheduler.add_noise(x, x, torch.tensor([3, 700]))):
        assert result.device.type == "meta" and result.dtype == torch.float32


@each_sampler
def test_meta_tensors_keep_their_affine(cls, kwargs):
    scheduler = cls(**kwargs)
    scheduler.set_timesteps(3)
    affine = torch.diag(torch.tensor([2.0, 3.0, 4.0, 1.0], dtype=torch.float64))
    result = run(scheduler, MetaTensor(torch.randn(1, 1, 4, 4, 4), affine=affine))
    assert isinstance(result, MetaTensor) and torch.equal(result.affine, affine)


# errors


def stepped(**kwargs):
    scheduler = DDPMScheduler(**kwargs)
    scheduler.set_timesteps(10)
    return scheduler


X = torch.zeros(2, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: DDIMScheduler(prediction_type="noise"),
            "prediction_type is 'noise'; choose one of epsilon, sample, v",
        ),
        (lambda: DDIMScheduler(timestep_spacing="log"), "timestep_spacing is 'log'; choose one of linspace, leading"),
        (lambda: DDIMScheduler(schedule="linear"), "schedule is 'linear'; choose one of .*linear_beta"),
        (lambda: DDPMScheduler(variance_type="learned"), "variance_type is 'learned'; choose one of fixed_small"),
        (lambda: DDIMScheduler(eta=1.5), r"eta is 1.5; it must be between 0 \(deterministic\) and 1"),
        (lambda: DDIMScheduler(eta=-0.1), "eta is -0.1"),
        (
            lambda: DDIMScheduler(prediction_type="epsilon", rescale_betas_zero_snr=True),
            "'epsilon' cannot be used with rescale_betas_zero_snr.*Choose 'sample' or 'v_prediction'",
        ),
        (lambda: DDIMScheduler(clip_sample_min=2.0), "clip_sample_min is 2.0, which must be below .* 1.0"),
        (lambda: DDIMScheduler().set_timesteps(0), "num_inference_steps is 0; it must be between 1 and .* 1000"),
        (lambda: DDIMScheduler().set_timesteps(1001), "num_inference_steps is 1001; .*Ask for a whole number of steps"),
        (lambda: DDIMScheduler(timestep_spacing="leading").set_timesteps(2.5), "num_inference_steps is 2.5; .*whole"),
        (lambda: DDIMScheduler(beta_start=0.0), r"'linear_beta' .*'beta_start': 0.0.* betas from 0 to 0.02"),
        (
            lambda: DDIMScheduler(1, rescale_betas_zero_snr=True),
            "num_train_timesteps is 1; rescale_betas_zero_snr needs at least 2",
        ),
        (
            lambda: stepped().step(X, 998, X),
            r"timestep 998 is not one of the 10 timesteps 999 ... 0.*set_timesteps\(\)",
        ),
        (lambda: stepped().step(X, torch.tensor(-1), X), "timestep -1 is not one of the 10"),
        (lambda: stepped().step(X[:, :, :3], 999, X), r"output has shape \(2, 1, 3, 4\), the sample \(2, 1, 4, 4\)"),
        (lambda: stepped().step(X, 999, X, noise=X[:1]), r"noise has shape \(1, 1, 4, 4\), the sample \(2, 1, 4, 4\)"),
        (
            lambda: stepped(variance_type="learned_range").step(X, 999, X),
            "'learned_range' needs a model output of 2 channels .* not 1. Take a network that returns them",
        ),
        (lambda: stepped().step(X.repeat(1, 2, 1, 1), 999, X), "Set the network's out_channels"),
    ],
)
def test_error_messages(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert re.search(message, str(error.value)), str(error.value)
