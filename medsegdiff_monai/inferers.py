"""A seeded ensemble of samples."""

from __future__ import annotations

import copy
import logging
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from monai.data import MetaTensor
from monai.inferers import Inferer
from monai.metrics import compute_dice
from monai.networks import eval_mode
from monai.networks.schedulers import DDPMScheduler as MonaiDDPMScheduler
from monai.networks.schedulers import Scheduler
from torch import Tensor

from .errors import InputError
from .networks import TrainingRecord
from .settings import amp_dtype
from .windows import MemberWindows

__all__ = ["DRAWN_TOGETHER", "DiffusionEnsembleInferer"]

logger = logging.getLogger(__name__)

ANTITHETIC = 2  # members in a row whose noise is not independent
VIEWS = 2  # of an image: as it is, and flipped
# members in a row whose distances are not those of independent draws; where the last group is not whole, or several
# weights take turns, views or weights meet more or less often than chance would, which matters if their masks differ
DRAWN_TOGETHER = ANTITHETIC * VIEWS


def _count(name: str, value: int | str) -> int:
    """Read a number of at least 1, which servers send as text."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not (number >= 1 and number.is_integer()):
        raise InputError(f"{name}={value} must be a whole number of at least 1.")
    return int(number)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


class DiffusionEnsembleInferer(Inferer):
    """Draw several masks for an image and return their probabilities, members as channels.

    The noise of a member depends on the seed, its number, the step and ``roi_size`` alone: it is the same for every
    case, whatever the batch size or the order of cases and windows. Members come in pairs of opposite noise (antithetic
    variates): each by itself is drawn as ever, and the mean of a few is nearer to that of many. Images larger than
    ``roi_size`` are covered by :class:`medsegdiff_monai.windows.MemberWindows`: the noise repeats itself along the
    image, each window sees its piece of that field, and members are matched from window to window, of those that are
    drawn at a time. Smaller images are padded to ``roi_size``, and cropped back.

    Every second pair sees the image flipped as training flips it, and its masks are flipped back (test-time
    augmentation): where the masks of an image and of its mirror image disagree, they are often wrong. Noise is flipped
    with the image.

    The image is encoded once per window (``network.encode_context``, where the network has it), together with its
    mirror image, and shared by all members and steps. Memory does not grow with the number of steps. Running out of it
    halves ``member_batch_size`` once, for this case and the following ones, and says so.

    Args:
        scheduler: sampler.
        num_classes: number of foreground classes, the channels of the mask.
        roi_size: size of the field that the network sees.
        num_members: number of masks to draw.
        num_steps: number of denoising steps for each.
        seed: seed of the noise.
        overlap: share by which windows overlap.
        sw_batch_size: windows that are segmented at a time.
        member_batch_size: members that are drawn at a time; by default all. Fewer take less memory.
        agreement_threshold: Dice, such as 0.99. After each batch of members (by default of one) the mask of the mean of
            all members so far is compared with that of the batch before; once no class of no image in the batch
            changes by more than this, no further members are drawn. By default all are. Where windows are needed,
            each batch goes over all of them, and encodes them anew.
        flip_axes: spatial axes from 0, along all of which the image is flipped for every second pair of members; empty:
            for none. By default those along which the network's training flipped, as its ``record`` says; none where it
            has no record.
        progress: called after each pass of the network with the number of samples in it, such as the ``update`` of a
            tqdm bar; by default silent.
        amp: see :func:`medsegdiff_monai.settings.amp_dtype`.

    Raises:
        InputError: for numbers out of range, a seed that is no number, and MONAI's own ``DDPMScheduler``; at the call,
            for an image larger than ``roi_size`` and a sampler that draws noise at every step.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        num_classes: int,
        roi_size: Sequence[int],
        num_members: int = 5,
        num_steps: int = 1,
        seed: int = 0,
        overlap: float = 0.5,
        sw_batch_size: int = 1,
        member_batch_size: int | None = None,
        agreement_threshold: float | None = None,
        flip_axes: Sequence[int] | None = None,
        progress: Callable[[int], object] | None = None,
        amp: bool | str = False,
    ) -> None:
        super().__init__()
        self.num_members = _count("num_members", num_members)
        self.num_steps = _count("num_steps", num_steps)
        if self.num_steps > scheduler.num_train_timesteps:
            raise InputError(
                f"num_steps={num_steps} is more than the num_train_timesteps={scheduler.num_train_timesteps} that the "
                "network is trained on: take fewer steps."
            )
        if isinstance(scheduler, MonaiDDPMScheduler):
            raise InputError(
                "MONAI's DDPMScheduler draws noise that no seed of a member decides, and is right at full length only: "
                "take medsegdiff_monai.schedulers.DDPMScheduler."
            )
        if agreement_threshold is not None and not (_is_number(agreement_threshold) and 0 < agreement_threshold <= 1):
            raise InputError(f"agreement_threshold={agreement_threshold!r} is a Dice: above 0, at most 1.")
        if not (_is_number(overlap) and 0 <= overlap < 1):
            raise InputError(f"overlap={overlap!r} must be a number of at least 0 and below 1.")
        try:
            self.seed = operator.index(seed)  # NumPy's integers, too
        except TypeError:
            raise InputError(f"seed={seed!r} must be a whole number.") from None
        if isinstance(roi_size, str) or not isinstance(roi_size, Iterable):
            raise InputError(f"roi_size={roi_size!r} must be a list with the size of each axis, such as [64, 64].")
        self.roi_size = tuple(_count("roi_size", size) for size in roi_size)
        axes = range(len(self.roi_size))
        if flip_axes is not None and not (
            isinstance(flip_axes, Sequence)
            and all(type(axis) is int and axis in axes for axis in flip_axes)
            and len(set(flip_axes)) == len(flip_axes)
        ):
            raise InputError(f"flip_axes={flip_axes!r} must be a list of different axes from 0 to {len(axes) - 1}.")
        self.scheduler: Any = scheduler
        self.num_classes = _count("num_classes", num_classes)
        self.overlap = overlap
        if member_batch_size is None:
            member_batch_size = self.num_members if agreement_threshold is None else 1
        self.member_batch_size = _count("member_batch_size", member_batch_size)
        self.agreement_threshold = agreement_threshold
        self.flip_axes = flip_axes
        self.progress = progress
        self.amp = amp_dtype(amp)
        self.window = MemberWindows(self.roi_size, _count("sw_batch_size", sw_batch_size), overlap)
        self._halved = False

    def noise(self, members: range | None = None, step: int = 0) -> Tensor:
        """Return standard normal noise; members 1, 3, ... have the opposite of the one before.

        Args:
            members: numbers of the members; by default all.
            step: 0 for the noise that sampling starts from, i for what a stochastic sampler adds after its i-th step.

        Returns:
            (members, classes, *roi_size), float32, on the CPU.
        """
        members = range(self.num_members) if members is None else members
        noise = torch.empty(len(members), self.num_classes, *self.roi_size)
        for field, member in zip(noise, members):
            pair, opposite = divmod(member, ANTITHETIC)
            # one generator for each pair; large odd factors keep neighbouring seeds, pairs and steps apart
            seed = ((self.seed * 1_000_003 + pair) * 1_000_003 + step) % 2**63
            torch.randn(field.shape, generator=torch.Generator().manual_seed(seed), out=field)
            field *= 1 - 2 * opposite
        return noise

    def __call__(self, inputs: Tensor, network: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Segment images of any size.

        Args:
            inputs: (batch, channels, *spatial).
            network: the denoiser, called as ``network(x, timesteps, context)`` in evaluation mode.
            *args: not used.
            **kwargs: not used.

        Returns:
            Probabilities (batch, members * classes, *spatial), the classes of a member in a row; a ``MetaTensor``
            where ``inputs`` is one.
        """
        image = inputs.as_tensor() if isinstance(inputs, MetaTensor) else inputs
        size = image.shape[2:]
        pad = [(max(r - s, 0) // 2, (max(r - s, 0) + 1) // 2) for s, r in zip(size, self.roi_size)]
        image = F.pad(image, [n for sides in reversed(pad) for n in sides])  # by 0, as in training
        with eval_mode(network), torch.autocast(image.device.type, dtype=self.amp, enabled=self.amp is not None):
            out = self._ensemble(image, network).flatten(1, 2)
        out = out[(slice(None), slice(None), *(slice(before, before + s) for (before, _), s in zip(pad, size)))]
        return MetaTensor(out).copy_meta_from(inputs) if isinstance(inputs, MetaTensor) else out

    def _ensemble(self, image: Tensor, network: Callable) -> Tensor:
        """Draw the members of an image (batch, channels, *field): (batch, members, classes, *field)."""
        whole = tuple(image.shape[2:]) == self.roi_size
        if getattr(self.scheduler, "is_stochastic", False) and not whole:
            raise InputError(
                f"{type(self.scheduler).__name__} draws noise at every step, which windows cannot share: an image of "
                f"{list(image.shape[2:])} with roi_size={list(self.roi_size)} needs a sampler whose only noise is the "
                "first: DDIMScheduler with eta=0, or DPMSolverPlusPlusScheduler."
            )
        everyone = range(self.num_members)
        context = self._encode(image, everyone, network) if whole else None
        size = self.num_members if self.agreement_threshold is None else self.member_batch_size
        drawn: list[Tensor] = []
        stable = _Stability(self.agreement_threshold)
        for members in (everyone[i : i + size] for i in range(0, self.num_members, size)):
            noise = self.noise(members).to(image)
            if context is None:
                drawn.append(self._windows(image, noise, members, network))
            else:
                drawn.append(self._denoise(noise.expand(image.shape[0], *noise.shape), members, context, network))
            if stable(drawn[-1]):
                break
        return torch.cat(drawn, dim=1) if len(drawn) > 1 else drawn[0]

    def views(self, members: range, network: Any) -> Views:
        """Return how members see the image.

        Args:
            members: their numbers.
            network: the denoiser, whose record tells how its training flipped.
        """
        axes, record = self.flip_axes, getattr(network, "record", None)
        if axes is None:
            axes = record.flip_axes() if isinstance(record, TrainingRecord) else ()
        return Views([axis - len(self.roi_size) for axis in axes], members)

    def _encode(self, image: Tensor, members: range, network: Any) -> Tensor | list[Tensor]:
        """Encode an image, and its mirror image where members see that, both at once: (batch * views, ...)."""
        image = self.views(members, network).of(image)
        encode = getattr(network, "encode_context", None)
        return image if encode is None else encode(image)

    def _windows(self, image: Tensor, noise: Tensor, members: range, network: Callable) -> Tensor:
        """Cover a large field (batch, channels, *field) by windows, with noise (members, classes, *roi)."""

        def segment(window: Tensor, noise: Tensor) -> Tensor:
            return self._denoise(noise, members, self._encode(window, members, network), network)

        return self.window(image, noise, segment)

    def _denoise(self, noise: Tensor, members: range, context: Tensor | list[Tensor], network: Callable) -> Tensor:
        """Take noise (batch, members, classes, *roi) to probabilities, as many members at a time as memory allows."""
        parts: list[Tensor] = []
        done = 0
        while done < len(members):
            batch = slice(done, done + self.member_batch_size)
            try:
                parts.append(self._sample(noise[:, batch], members[batch], context, network))
            except RuntimeError as error:  # CUDA's and MPS's are its subclasses, the CPU allocator's has no name
                size = noise[:, batch].shape[1]
                if self._halved or size == 1 or not re.search("out of memory|can't allocate memory", str(error)):
                    raise
                self._halved = True
                self.member_batch_size = size // 2
                logger.warning(f"Out of memory: member_batch_size is now {self.member_batch_size}. {error}")
                continue
            done += parts[-1].shape[1]
        return torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]

    def _sample(self, noise: Tensor, members: range, context: Tensor | list[Tensor], network: Callable) -> Tensor:
        """Denoise members (batch, members, classes, *roi) all at once; returns probabilities of the same shape."""
        shape, views = noise.shape, self.views(members, network)
        x = views.turn(noise).flatten(0, 1)
        if isinstance(context, Tensor):  # a network that takes the image itself
            context = views.share(context, shape[0])
        elif views.dims:
            context = _share_all(views, context, shape[0])
        scheduler = copy.deepcopy(self.scheduler)  # it keeps what it saw last: calls in other threads must not meet it
        scheduler.set_timesteps(self.num_steps)
        stochastic = getattr(scheduler, "is_stochastic", False)
        for i, t in enumerate(scheduler.timesteps, start=1):
            out = network(x, torch.as_tensor(t, device=x.device).reshape(1), context)
            more = {}
            if stochastic:
                more["noise"] = views.turn(self.noise(members, i).to(x).expand(shape)).flatten(0, 1)
            x, _ = scheduler.step(out.to(x.dtype), t, x, **more)
            if self.progress is not None:
                self.progress(len(x))
        return views.turn(((x + 1) / 2).clamp(0, 1).reshape(shape))


class Views:
    """How members see an image: as it is, or flipped.

    Args:
        dims: dimensions to flip, from -1 for the last; empty: no member sees a flipped image.
        members: numbers of the members; every second pair sees the flipped image.
    """

    def __init__(self, dims: list[int], members: range) -> None:
        self.dims = dims
        self.members = members
        self.is_flipped = [bool(dims) and self._in_second_pair(member) for member in members]
        self.kinds = sorted(set(self.is_flipped))
        self._mask: Tensor | None = None

    @staticmethod
    def _in_second_pair(member: Any) -> Any:
        return member // ANTITHETIC % VIEWS == 1

    def _flipped(self, device: torch.device) -> Tensor:
        """The same as a tensor, made where it is needed."""
        if self._mask is None:
            m = self.members
            self._mask = self._in_second_pair(torch.arange(m.start, m.stop, m.step, device=device))
        return self._mask

    def of(self, image: Tensor) -> Tensor:
        """The views of images (batch, ...) that there are, (batch * views, ...)."""
        views = [image.flip(self.dims) if flipped else image for flipped in self.kinds]
        return torch.stack(views, 1).flatten(0, 1) if len(views) > 1 else views[0]

    def share(self, views: Tensor, batch: int) -> Tensor:
        """Give each member its view: (batch * views, ...) to (batch * members, ...)."""
        rows = len(views) // batch  # of an image
        seen = [row if rows > 1 else 0 for row in self.is_flipped]
        # slices, as an index would lose the memory format that convolutions want
        return torch.cat([views[(i := image * rows + row) : i + 1] for image in range(batch) for row in seen])

    def turn(self, x: Tensor) -> Tensor:
        """Flip those of (batch, members, ...) that see a flipped image, there or back."""
        if self.kinds == [False]:
            return x
        return torch.where(self._flipped(x.device).view(-1, *[1] * (x.ndim - 2)), x.flip(self.dims), x)


def _share_all(views: Views, encoded: Any, batch: int) -> Any:
    """Give each member its view of all that an encoder returned, in whatever containers; of one view, as it is."""
    if isinstance(encoded, Mapping):
        return {name: _share_all(views, part, batch) for name, part in encoded.items()}
    if isinstance(encoded, (list, tuple)):
        return type(encoded)(_share_all(views, part, batch) for part in encoded)
    doubled = isinstance(encoded, Tensor) and encoded.ndim and len(encoded) > batch
    return views.share(encoded, batch) if doubled else encoded


class _Stability:
    """Tells when the mask of the mean of all members so far stops changing."""

    def __init__(self, threshold: float | None) -> None:
        self.threshold = threshold
        self.total: Tensor | float = 0.0
        self.members = 0
        self.mask: Tensor | None = None

    def __call__(self, members: Tensor) -> bool:
        """Take further members (batch, members, classes, *spatial); True where they no longer change the mask."""
        if self.threshold is None:
            return False
        self.total = self.total + members.sum(1)
        self.members += members.shape[1]
        before, self.mask = self.mask, self.total / self.members > 0.5
        return before is not None and bool(
            (compute_dice(self.mask, before, ignore_empty=False) >= self.threshold).all()
        )
