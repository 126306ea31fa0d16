"""What the samplers share: noise tables, timesteps, and reading a network's prediction.

Symbols, here and in the samplers: ``x_t`` the noised sample, ``x0`` the clean one, ``epsilon`` the noise,
``alpha_bar`` the paper's cumulative product of ``1 - beta`` (DDIM's plain alpha), so that
``x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) epsilon``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection

import torch
from monai.networks.schedulers import NoiseSchedules, Scheduler
from monai.utils import unsqueeze_right
from torch import Tensor

__all__ = ["DiffusionScheduler"]

Rate = float | Tensor

# How each kind of prediction becomes x0, given x_t, a = sqrt(alpha_bar_t) and s = sqrt(1 - alpha_bar_t).
_TO_X0: dict[str, Callable[[Tensor, Tensor, Rate, Rate], Tensor]] = {
    "epsilon": lambda output, x_t, a, s: (x_t - s * output) / a,
    "sample": lambda output, x_t, a, s: output,
    "v_prediction": lambda output, x_t, a, s: a * x_t - s * output,
}


def _linspace(total: int, steps: int) -> Tensor:
    return torch.linspace(total - 1, 0, steps, dtype=torch.float64).round()


def _leading(total: int, steps: int) -> Tensor:
    return torch.arange(steps - 1, -1, -1) * (total // steps)


def _trailing(total: int, steps: int) -> Tensor:
    return (total - torch.arange(steps, dtype=torch.float64) * total / steps).round() - 1


def _quadratic(total: int, steps: int) -> Tensor:
    squares = torch.linspace(0, (total - 1) ** 0.5, steps, dtype=torch.float64).square().round()
    # Squares crowd near zero, where they would repeat; their rank is the smallest value that keeps them apart.
    rising = squares.maximum(torch.arange(steps)) if steps > 1 else squares + total - 1
    return rising.flip(0)


_SPACINGS: dict[str, Callable[[int, int], Tensor]] = {
    "linspace": _linspace,
    "leading": _leading,
    "trailing": _trailing,
    "quadratic": _quadratic,
}


def _rescale_zero_terminal_snr(alphas_cumprod: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it ends at 0 and keeps its start (arXiv 2305.08891, Algorithm 1)."""
    root = alphas_cumprod.sqrt()
    first, last = root[0], root[-1]
    return ((root - last) * first / (first - last)).square()


def require_member(name: str, value: str, allowed: Collection[str]) -> None:
    """Raise a ValueError that names the choices unless ``value`` is one of them."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(allowed)}.")


def at_least_float32(x: Tensor) -> Tensor:
    """``x`` with half precision widened: a sampler's small differences do not survive 8 bits of mantissa."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class DiffusionScheduler(Scheduler):
    """Base of this package's samplers: any of them serves :class:`monai.inferers.DiffusionInferer` unchanged.

    A step looks its predecessor up in the list ``timesteps``, whatever their spacing, and the last one goes to
    ``alpha_bar = 1``, that is to x0. The tables ``betas``, ``alphas`` and ``alphas_cumprod`` stay in float64 on the
    CPU; only coefficients take a sample's device. Half-precision samples are computed in float32 and cast back.

    Args:
        num_train_timesteps: number T of diffusion steps the network is trained on.
        schedule: name of a noise schedule in ``monai.networks.schedulers.NoiseSchedules``.
        prediction_type: what the network predicts: ``"epsilon"`` (the noise), ``"sample"`` (x0) or ``"v_prediction"``
            (``sqrt(alpha_bar) epsilon - sqrt(1 - alpha_bar) x0``, arXiv 2202.00512).
        timestep_spacing: how N of T timesteps are chosen (arXiv 2305.08891, Table 2): ``"linspace"`` holds both ends,
            ``"leading"`` starts from 0 in whole strides of ``T // N``, ``"trailing"`` counts down from T - 1 in strides
            of T / N, ``"quadratic"`` is dense near 0 (arXiv 2010.02502, appendix D.2).
        clip_sample: whether to clip the predicted x0, and epsilon with it.
        clip_sample_min: lower bound of the clipped x0.
        clip_sample_max: upper bound of the clipped x0.
        rescale_betas_zero_snr: whether to rescale the schedule so that no signal is left at T - 1 (arXiv 2305.08891,
            Algorithm 1). Noise then says nothing of x0, so ``"epsilon"`` is refused.
        signal_scale: factor b of x0 before noise is added, with x_t brought back to its variance afterwards (arXiv
            2301.10972, section 2.3); the same as the schedule ``b^2 alpha_bar / (b^2 alpha_bar + 1 - alpha_bar)``.
            Below 1 there is more noise at every step: a mask is so redundant that it shows through little noise.
        schedule_args: passed on to the noise schedule, such as ``beta_start`` and ``beta_end``.

    Raises:
        ValueError: if an argument is none of the values it may take.
    """

    init_noise_sigma: float = 1.0  # standard deviation of the noise that sampling starts from

    def __init__(
        self,
        num_train_timesteps: int = 1000,
        schedule: str = "linear_beta",
        prediction_type: str = "sample",
        timestep_spacing: str = "linspace",
        clip_sample: bool = False,
        clip_sample_min: float = -1.0,
        clip_sample_max: float = 1.0,
        rescale_betas_zero_snr: bool = False,
        signal_scale: float = 1.0,
        **schedule_args: float,
    ) -> None:
        require_member("schedule", schedule, NoiseSchedules.names)
        require_member("prediction_type", prediction_type, _TO_X0)
        require_member("timestep_spacing", timestep_spacing, _SPACINGS)
        if rescale_betas_zero_snr and prediction_type == "epsilon":
            raise ValueError(
                "prediction_type 'epsilon' cannot be used with rescale_betas_zero_snr: at the first step x_t is all "
                "noise, and x0 cannot be had from it. Choose 'sample' or 'v_prediction'."
            )
        if clip_sample_min >= clip_sample_max:
            raise ValueError(
                f"clip_sample_min is {clip_sample_min}, which must be below clip_sample_max = {clip_sample_max}."
            )
        if signal_scale <= 0:
            raise ValueError(f"signal_scale is {signal_scale}; it multiplies x0, and must be above 0.")
        super().__init__(num_train_timesteps, schedule, **schedule_args)
        if not ((self.betas > 0) & (self.betas < 1)).all():
            raise ValueError(
                f"schedule {schedule!r} with {schedule_args} has betas from {self.betas.min():g} to "
                f"{self.betas.max():g}; they must be above 0 and below 1. Choose other beta_start and beta_end."
            )
        if rescale_betas_zero_snr and num_train_timesteps < 2:
            raise ValueError(f"num_train_timesteps is {num_train_timesteps}; rescale_betas_zero_snr needs at least 2.")
        self.prediction_type = prediction_type
        self.timestep_spacing = timestep_spacing
        self.clip_sample = clip_sample
        self.clip_sample_values = (clip_sample_min, clip_sample_max)

        self.alphas_cumprod = torch.cumprod(1 - self.betas.double(), dim=0)
        if rescale_betas_zero_snr:
            self.alphas_cumprod = _rescale_zero_terminal_snr(self.alphas_cumprod)
        signal = signal_scale**2 * self.alphas_cumprod
        self.alphas_cumprod = signal / (signal + 1 - self.alphas_cumprod)
        self.alphas = self.alphas_cumprod / torch.cat([torch.ones(1), self.alphas_cumprod[:-1]])
        self.betas = 1 - self.alphas

    @property
    def is_stochastic(self) -> bool:
        """Whether :meth:`step` draws noise."""
        return False

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of sampling, strictly decreasing.

        Args:
            num_inference_steps: whole number N of steps, 1 to ``num_train_timesteps``.
            device: where to keep ``timesteps``; the CPU by default, where a step reads them without waiting.

        Raises:
            ValueError: if there cannot be so many steps.
        """
        if not 1 <= num_inference_steps <= self.num_train_timesteps or num_inference_steps != int(num_inference_steps):
            raise ValueError(
                f"num_inference_steps is {num_inference_steps}; it must be between 1 and num_train_timesteps = "
                f"{self.num_train_timesteps}. Ask for a whole number of steps in that range."
            )
        num_inference_steps = self.num_inference_steps = int(num_inference_steps)
        spaced = _SPACINGS[self.timestep_spacing](self.num_train_timesteps, num_inference_steps)
        self.timesteps = spaced.long().to(device)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Noise clean samples: ``sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) epsilon`` (arXiv 2006.11239, eq. 4).

        Args:
            original_samples: x0, shape (B, C, *spatial).
            noise: epsilon, of the same shape.
            timesteps: integer t of each sample, shape (B,) or (1,).

        Returns:
            x_t, of the same shape and dtype as ``original_samples``.
        """
        a, s = self._rates(timesteps, original_samples)
        return (a * original_samples + s * noise).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The target of ``v_prediction``: ``sqrt(alpha_bar_t) epsilon - sqrt(1 - alpha_bar_t) x0``.

        Args:
            sample: x0, shape (B, C, *spatial).
            noise: epsilon, of the same shape.
            timesteps: integer t of each sample, shape (B,) or (1,).

        Returns:
            v, of the same shape and dtype as ``sample``.
        """
        a, s = self._rates(timesteps, sample)
        return (a * noise - s * sample).to(sample.dtype)

    def predict(self, model_output: Tensor, timesteps: int | Tensor, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Read x0 and epsilon from the network's output, whatever it predicts.

        Args:
            model_output: prediction of the network, shape (B, C, *spatial).
            timesteps: t, one integer or a tensor of shape (B,) or (1,).
            sample: x_t, shape (B, C, *spatial).

        Returns:
            x0 (clipped with ``clip_sample``) and the epsilon that joins it to x_t, both at least float32.

        Raises:
            ValueError: if the shapes differ, which would broadcast into a wrong sample.
        """
        if model_output.shape != sample.shape:
            raise ValueError(
                f"The model's output has shape {tuple(model_output.shape)}, the sample {tuple(sample.shape)}; they "
                "must be equal. Set the network's out_channels to the channels of the sample."
            )
        a, s = self._rates(timesteps, sample)
        x_t = at_least_float32(sample)
        x0 = _TO_X0[self.prediction_type](at_least_float32(model_output), x_t, a, s)
        if self.clip_sample:
            x0 = x0.clamp(*self.clip_sample_values)
        return x0, (x_t - a * x0) / s

    @abstractmethod
    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        generator: torch.Generator | None = None,
        noise: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Go from one timestep to the next lower one.

        Args:
            model_output: prediction of the network at ``timestep``, shape (B, C, *spatial).
            timestep: t, a member of ``timesteps``, as an integer or a tensor of one element.
            sample: x_t, shape (B, C, *spatial).
            generator: source of the noise that a stochastic sampler draws.
            noise: that noise itself, shape (B, C, *spatial), in place of drawing it.

        Returns:
            The sample at the next lower timestep and the predicted x0, both like ``sample`` in shape and dtype.

        Raises:
            ValueError: if ``timestep`` is not in ``timesteps`` or shapes do not agree.
        """

    def _rates(self, timesteps: int | Tensor, like: Tensor) -> tuple[Rate, Rate]:
        """``sqrt(alpha_bar_t)`` and ``sqrt(1 - alpha_bar_t)``, as numbers or as tensors that broadcast to ``like``."""
        if isinstance(timesteps, int):
            alpha_bar = self._alpha_bar(timesteps)
            return alpha_bar**0.5, (1 - alpha_bar) ** 0.5

        def gather(table: Tensor) -> Tensor:
            # Cast before the move: Apple's MPS has no float64. Indexing on the device spares training a wait for t.
            cast = table.to(torch.promote_types(like.dtype, torch.float32)).to(like.device)
            return unsqueeze_right(cast[timesteps.to(like.device)], like.ndim)

        return gather(self.alphas_cumprod.sqrt()), gather((1 - self.alphas_cumprod).sqrt())

    def _neighbours(self, timestep: int | Tensor) -> tuple[int | None, int, int | None]:
        """The timestep that sampling visits before ``timestep``, itself, and the one after; None past either end."""
        value = timestep.item() if isinstance(timestep, Tensor) else timestep
        steps = self.timesteps.tolist()
        if value not in steps:
            raise ValueError(
                f"timestep {value} is not one of the {len(steps)} timesteps {steps[0]} ... {steps[-1]} of this "
                "sampler. Call set_timesteps() first and pass members of `timesteps` to step()."
            )
        index = steps.index(value)
        return ([None, *steps][index], steps[index], [*steps, None][index + 1])

    def _alpha_bar(self, timestep: int | None) -> float:
        """``alpha_bar`` at a timestep, or at the end of sampling (None), where nothing but x0 is left."""
        return 1.0 if timestep is None else self.alphas_cumprod[timestep].item()

    @staticmethod
    def _noise(x_t: Tensor, generator: torch.Generator | None, noise: Tensor | None) -> Tensor:
        """The caller's ``noise`` if given, else standard normal noise from ``generator``, in the form of ``x_t``."""
        if noise is None:
            # Drawn where the generator lives, so that a CPU generator gives the same noise on every device.
            device = x_t.device if generator is None else generator.device
            noise = torch.randn(x_t.shape, generator=generator, device=device, dtype=x_t.dtype)
        elif noise.shape != x_t.shape:
            raise ValueError(
                f"noise has shape {tuple(noise.shape)}, the sample {tuple(x_t.shape)}; pass noise of that shape."
            )
        return noise.to(x_t)
