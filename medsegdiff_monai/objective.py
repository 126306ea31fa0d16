"""What training optimises: one short function for each objective, and how MONAI's trainer calls it.

Symbols: ``y`` the mask of a rater, ``s_k`` the k-th of K masks that the network makes of one image, ``x_t`` a noised
mask, ``T`` the number of timesteps. Masks are {0, 1} in a loss and [-1, 1] where they are noised. A rater's mask is NaN
where nobody has labelled: it is noised as background there, and :func:`of_known_voxels` keeps that out of a loss.

MONAI's ``SupervisedTrainer`` is given all three: :class:`SegmentationDiffusionPrepareBatch` draws timesteps and noise,
:class:`DiffusionTrainingInferer` noises and calls the network, and a function above scores the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from monai.engines.utils import DiffusionPrepareBatch
from monai.inferers import DiffusionInferer
from monai.losses import DiceLoss
from monai.networks.schedulers import Scheduler
from monai.utils import convert_to_tensor
from torch import Tensor

from .errors import InputError
from .networks.medsegdiff_unet import signed_mask
from .settings import amp_dtype

__all__ = [
    "OBJECTIVES",
    "DiffusionTrainingInferer",
    "SegmentationDiffusionPrepareBatch",
    "ensemble_score",
    "loss_function",
    "mask_loss",
    "noise_loss",
    "of_known_voxels",
    "soft_jaccard_distance",
]

NO_LOGIT = -100.0  # its sigmoid is 0, and so is its cross-entropy with 0
DICE_WEIGHT, BCE_WEIGHT = 0.5, 0.3  # of the members' mean, beside the score of the members


def soft_jaccard_distance(a: Tensor, b: Tensor) -> Tensor:
    """Distance of each mask in ``a`` from each in ``b``: 1 - IoU where they are binary and not both empty.

    ``d(a, b) = 1 - (sum ab + 1) / (sum a^2 + sum b^2 - sum ab + 1)``. Two empty masks have distance 0. The Jaccard
    (Tanimoto) kernel 1 - d is positive definite, so that its energy score is proper.

    Args:
        a: probabilities (batch, n, classes, *spatial).
        b: probabilities (batch, m, classes, *spatial).

    Returns:
        (batch, classes, n, m).
    """
    a, b = (x.flatten(3).transpose(1, 2) for x in (a, b))  # batch, classes, masks, voxels
    common = a @ b.mT
    either = a.square().sum(-1)[..., :, None] + b.square().sum(-1)[..., None, :] - common
    return 1 - (common + 1) / (either + 1)


def ensemble_score(logits: Tensor, raters: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """Score a set of masks s_1 ... s_K of an image against the masks y of its raters; the least is best.

    ``L = mean_k d(s_k, y) - 1/2 mean_{k != l} d(s_k, s_l) + 0.5 Dice(mean_k s_k, y) + 0.3 BCE(mean_k s_k, y)``,
    averaged over raters, classes and images, ``d`` being :func:`soft_jaccard_distance`.

    The first two terms are the energy form of a kernel score (Gneiting and Raftery, JASA 102, 2007, section 5): its
    expectation is least where masks are drawn from the distribution of the raters, and up to a constant it is half the
    generalised energy distance. The last two are segmentation losses of the ensemble's mean.

    A single mask (K = 1) has no spread, so only the last two terms apply. The distance alone favours one confident
    opinion, such as "no lesion" wherever most raters see none, and members do not spread from there.

    Args:
        logits: masks (batch * K, classes, *spatial), those of an image in a row.
        raters: masks (batch, raters, classes, *spatial) in {0, 1}.
        share: of the voxels that count, see :func:`of_known_voxels`.

    Returns:
        A scalar, float32.
    """
    logits, y = logits.float().unflatten(0, (len(raters), -1)), raters.float()
    s, members = logits.sigmoid(), logits.shape[1]
    score: Tensor | float = 0.0
    if members > 1:
        among = soft_jaccard_distance(s, s).sum((-2, -1)) / (members * (members - 1))
        score = soft_jaccard_distance(s, y).mean() - among.mean() / 2
    dice = DiceLoss()(s.mean(1, keepdim=True).expand_as(y).flatten(0, 1), y.flatten(0, 1))
    # logarithms of the mean and of its complement, without the rounding of a sigmoid near 0 and 1
    log_mean, log_rest = (F.logsigmoid(x).logsumexp(1) - math.log(members) for x in (logits, -logits))
    agreement = y.mean(1)
    bce = -(agreement * log_mean + (1 - agreement) * log_rest).mean()
    return score + DICE_WEIGHT * dice + BCE_WEIGHT * (bce / share)


def mask_loss(logits: Tensor, mask: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """``Dice(s, y) + BCE(s, y)`` of the x0 that the network predicts, which is one and the same mask for any noise.

    Args:
        logits: of x0, (batch, classes, *spatial).
        mask: in {0, 1}, same shape.
        share: of the voxels that count, see :func:`of_known_voxels`.

    Returns:
        A scalar, float32.
    """
    logits, mask = logits.float(), mask.float()
    return DiceLoss(sigmoid=True)(logits, mask) + F.binary_cross_entropy_with_logits(logits, mask) / share


def noise_loss(prediction: Tensor, target: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """``||epsilon - epsilon_theta(x_t, t)||^2`` (paper, equation 7), or the same of the velocity.

    Args:
        prediction: of noise or velocity, (batch, classes, *spatial).
        target: noise or velocity, same shape.
        share: of the voxels that count, see :func:`of_known_voxels`.

    Returns:
        A scalar, float32.
    """
    return F.mse_loss(prediction.float(), target.float()) / share


@dataclass(frozen=True)
class Objective:
    """What an objective scores, and which noised masks the network meets for it.

    Attributes:
        loss: of the network's output and the target.
        prediction_type: what the network predicts.
        of_sets: whether several masks of an image are scored together, each from noise of its own.
        last_share: share of the images at t = T - 1, where all is noise, as sampling begins; the other timesteps are
            uniform.
        own_guess: share of the other images that are noised from what the network makes of the same noise at T - 1, as
            in sampling, and not from a rater's mask. Without it the network trusts what shows through little noise.
    """

    loss: Callable[..., Tensor]
    prediction_type: str
    of_sets: bool = False
    last_share: float = 0.0
    own_guess: float = 0.0


OBJECTIVES = {
    "ensemble": Objective(ensemble_score, "sample", of_sets=True, last_share=0.75, own_guess=1.0),
    "mask": Objective(mask_loss, "sample", last_share=0.5, own_guess=0.5),
    "epsilon": Objective(noise_loss, "epsilon"),
    "v_prediction": Objective(noise_loss, "v_prediction"),
}


def _objective(name: str) -> Objective:
    if name not in OBJECTIVES:
        raise InputError(f"objective={name!r} must be one of {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[name]


def of_known_voxels(loss: Callable[..., Tensor], nothing: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a loss that does not count voxels where the target is NaN, for any rater of the image.

    Prediction and target become such there that they add nothing to a sum, and have no gradient; a mean over voxels is
    divided by the share of them that counts.

    Args:
        loss: :func:`ensemble_score`, :func:`mask_loss` or :func:`noise_loss`.
        nothing: prediction of nothing.
    """

    def known_loss(prediction: Tensor, target: Tensor) -> Tensor:
        known = ~target.isnan()
        if target.ndim > prediction.ndim:  # several raters: (batch, raters, classes, *spatial)
            known = known.all(1, keepdim=True)
        target = torch.where(known, target, 0.0)
        share = known.float().mean().clamp(min=1 / known.numel())
        known = known.flatten(0, target.ndim - prediction.ndim)
        known = known.repeat_interleave(len(prediction) // len(known), 0)
        return loss(torch.where(known, prediction, nothing), target, share)

    return known_loss


def loss_function(objective: str, ignore_label: int | None = None) -> Callable[..., Tensor]:
    """Return the loss of an objective.

    Args:
        objective: ``ensemble``, ``mask``, ``epsilon`` or ``v_prediction``.
        ignore_label: see :class:`medsegdiff_monai.transforms.Regions`.

    Raises:
        InputError: for another objective.
    """
    chosen = _objective(objective)
    if ignore_label is None:
        return chosen.loss
    return of_known_voxels(chosen.loss, NO_LOGIT if chosen.prediction_type == "sample" else 0.0)


class SegmentationDiffusionPrepareBatch(DiffusionPrepareBatch):
    """Draw timesteps and noise for the masks of a batch, for ``SupervisedTrainer`` with a ``DiffusionTrainingInferer``.

    MONAI's class noises the image; in segmentation the mask is noised, and the image is the condition.

    Args:
        scheduler: noise schedule.
        objective: see :func:`loss_function`.
        num_members: masks K of each image that an objective of sets scores together.

    Raises:
        InputError: for an objective that the scheduler's ``prediction_type`` does not fit, or too few members.
    """

    def __init__(self, scheduler: Scheduler, objective: str = "ensemble", num_members: int = 2) -> None:
        super().__init__(num_train_timesteps=scheduler.num_train_timesteps, condition_name="image")
        self.objective = _objective(objective)
        if scheduler.prediction_type != self.objective.prediction_type:
            raise InputError(
                f"objective={objective!r} needs prediction_type={self.objective.prediction_type!r}, "
                f"not {scheduler.prediction_type!r}."
            )
        self.num_members = int(num_members) if self.objective.of_sets else 1
        if self.objective.of_sets and self.num_members < 2:
            raise InputError(f"train_num_members={num_members} must be at least 2: one mask has no spread.")
        self.scheduler = scheduler

    def get_timesteps(self, images: Tensor) -> Tensor:
        """Return the timestep of each image, (batch,), int64."""
        last = torch.rand(len(images)) < self.objective.last_share
        uniform = torch.randint(self.num_train_timesteps, (len(images),))
        return torch.where(last, self.num_train_timesteps - 1, uniform).to(images.device)

    def get_guessed(self, timesteps: Tensor) -> Tensor:
        """Return which images are noised from the network's own guess, (batch,); pure noise needs none."""
        chosen = torch.rand(len(timesteps)) < self.objective.own_guess
        return chosen.to(timesteps.device) & (timesteps < self.num_train_timesteps - 1)

    def get_target(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Return the target of an objective of single masks: mask in {0, 1}, noise or velocity.

        Args:
            images: mask in [-1, 1], (batch, classes, *spatial).
            noise: noise of the same shape.
            timesteps: (batch,).
        """
        if self.objective.prediction_type == "sample":
            return (images + 1) / 2
        if self.objective.prediction_type == "epsilon":
            return noise
        return self.scheduler.get_velocity(images, noise, timesteps)

    def __call__(
        self,
        batchdata: Mapping[str, Tensor],
        device: str | torch.device | None = None,
        non_blocking: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor, tuple, dict]:
        """Return masks in [-1, 1], target, and what :class:`DiffusionTrainingInferer` takes besides.

        Args:
            batchdata: ``image`` (batch, channels, *spatial) and ``label`` (batch, raters, classes, *spatial) in {0, 1},
                NaN where nobody has labelled.
            device: where to compute.
            non_blocking: whether the copy to ``device`` may be asynchronous.
            **kwargs: further arguments of ``Tensor.to``.
        """
        image, raters = (
            convert_to_tensor(batchdata[key], track_meta=False).to(device, non_blocking=non_blocking, **kwargs)
            for key in ("image", "label")
        )
        timesteps = self.get_timesteps(image)
        guessed = self.get_guessed(timesteps)
        one_each = raters[torch.arange(len(raters)), torch.randint(raters.shape[1], (len(raters),))]
        mask = (2 * one_each.nan_to_num(0) - 1).repeat_interleave(self.num_members, 0)
        timesteps, guessed = (x.repeat_interleave(self.num_members) for x in (timesteps, guessed))
        noise = self.get_noise(mask)
        target = raters
        if not self.objective.of_sets:
            target = self.get_target(mask, noise, timesteps).masked_fill(one_each.isnan(), torch.nan)
        return mask, target, (), {"noise": noise, "timesteps": timesteps, "condition": image, "guessed": guessed}


class DiffusionTrainingInferer(DiffusionInferer):
    """MONAI's ``DiffusionInferer`` with own guesses, under autocast on any device (the trainer's is for CUDA alone).

    Args:
        scheduler: adds the noise.
        amp: see :func:`medsegdiff_monai.settings.amp_dtype`.
    """

    def __init__(self, scheduler: Scheduler, amp: bool | str = False) -> None:
        super().__init__(scheduler)
        self.amp = amp_dtype(amp)

    def __call__(  # type: ignore[override]
        self, inputs: Tensor, diffusion_model: Any, *, timesteps: Tensor, condition: Tensor, **kwargs: Any
    ) -> Tensor:
        """Noise masks and return what the network makes of them; the image is encoded once for all of its masks.

        Args:
            inputs: masks in [-1, 1], (batch * K, classes, *spatial), those of an image in a row.
            diffusion_model: the network, in training mode.
            timesteps: (batch * K,).
            condition: images (batch, channels, *spatial).
            **kwargs: ``noise``, of the shape of ``inputs``, and ``guessed`` (batch * K,), true for masks that are
                replaced by the network's own guess before noise is added.
        """
        noise, guessed = kwargs["noise"], kwargs["guessed"]
        if guessed.any():
            images = guessed.unflatten(0, (len(condition), -1))[:, 0]
            inputs = inputs.clone()
            inputs[guessed] = self._guess(noise[guessed], diffusion_model, condition[images])
        with self._autocast(inputs):
            return super().__call__(inputs, diffusion_model, noise=noise, timesteps=timesteps, condition=condition)

    def _autocast(self, like: Tensor, **kwargs: Any) -> torch.autocast:
        return torch.autocast(like.device.type, dtype=self.amp, enabled=self.amp is not None, **kwargs)

    @torch.no_grad()
    def _guess(self, noise: Tensor, network: Callable, image: Tensor) -> Tensor:
        """The masks in [-1, 1] that the network, in training mode, makes of pure noise."""
        last = torch.full((1,), self.scheduler.num_train_timesteps - 1, device=noise.device)
        # weights cast here have no gradient, and must not be used again
        with self._autocast(noise, cache_enabled=False):
            logits = network(noise, last, image)
        return signed_mask(logits.to(noise.dtype))
