"""The whole segmenter as one module, for ``torch.export``, ONNX and TorchScript: image in, probabilities out."""

from __future__ import annotations

import copy
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from monai.data.utils import compute_importance_map
from torch import Tensor, nn
from torch.export import ExportedProgram

from .configs import read_config
from .deep_ensemble import DeepEnsemble, load_checkpoints
from .errors import InputError
from .files import write_atomically, writing
from .inferers import DiffusionEnsembleInferer
from .networks.blocks import Stage
from .schedulers import DiffusionScheduler

__all__ = ["LinearStep", "Segmenter", "export_segmenter", "linear_steps", "read_segmenter", "stage_names"]


class LinearStep(NamedTuple):
    """A step of a deterministic sampler in numbers, whatever the sampler and what the network predicts.

    ``x0 = read_x x_t + read_output output`` (then clipped), ``x_p = keep x_t + take x0 + recall x0_before``.
    """

    timestep: int
    read_x: float
    read_output: float
    keep: float
    take: float
    recall: float


def linear_steps(scheduler: Any, num_steps: int) -> list[LinearStep]:
    """Read a sampler's steps as numbers, by letting it step on unit vectors: it is linear in all that it is given.

    Args:
        scheduler: a sampler of this package that draws no noise.
        num_steps: number of steps.

    Raises:
        InputError: for a sampler that draws noise, or a foreign one.
    """
    if not isinstance(scheduler, DiffusionScheduler) or scheduler.is_stochastic:
        raise InputError(
            f"scheduler: {type(scheduler).__name__} cannot be exported: it draws noise at every step, or is not this "
            "package's. Set scheduler#_target_ to DPMSolverPlusPlusScheduler, or DDIMScheduler with eta=0, of "
            "medsegdiff_monai.schedulers."
        )
    probe = copy.deepcopy(scheduler)
    probe.clip_sample = False  # the one thing that is not linear
    probe.set_timesteps(num_steps)
    timesteps = probe.timesteps.tolist()
    x, output = torch.eye(2, dtype=torch.float64)
    reads = [probe.predict(output, t, x)[0].tolist() for t in timesteps]
    probe.prediction_type = "sample"  # from here on the output is x0 itself
    x, *x0 = torch.eye(num_steps + 1, dtype=torch.float64)
    steps = []
    for i, (t, (read_x, read_output)) in enumerate(zip(timesteps, reads)):
        keep, *takes = probe.step(x0[i], t, x)[0].tolist()
        steps.append(LinearStep(t, read_x, read_output, keep, takes[i], takes[i - 1] if i else 0.0))
    return steps


class Segmenter(nn.Module):
    """Segment images of any size as :class:`DiffusionEnsembleInferer` does, the members fused by their mean.

    ``torch.export``, ``torch.onnx.export`` and :func:`torch.jit.script` take it, as it has the whole ensemble inside.
    The noise of the members is the inferer's, and stored; as there, some see the image flipped. All members are drawn,
    whatever the inferer's ``agreement_threshold``.

    Args:
        network: a trained :class:`medsegdiff_monai.networks.MedSegDiffUNet`; it is copied.
        inferer: has the sampler, the members and their noise, and the windows.

    Raises:
        InputError: for a sampler that draws noise at every step, or a ``roi_size`` that the network's stride does not
            divide.
    """

    def __init__(self, network: Any, inferer: DiffusionEnsembleInferer) -> None:
        super().__init__()
        roi_size = list(inferer.roi_size)
        if any(size % network.stride for size in roi_size):
            raise InputError(f"roi_size={roi_size} must be multiples of the network's stride {network.stride}.")
        self.steps = linear_steps(inferer.scheduler, inferer.num_steps)
        scheduler = inferer.scheduler
        self.x0_range = scheduler.clip_sample_values if scheduler.clip_sample else (-torch.inf, torch.inf)
        self.network = copy.deepcopy(network).requires_grad_(False)
        self.num_members = inferer.num_members
        self.num_classes = inferer.num_classes
        self.member_batch_size = inferer.member_batch_size
        self.roi_size = roi_size
        window: Any = inferer.window
        self.strides = [max(1, int(size * (1 - window.overlap))) for size in roi_size]
        views = inferer.views(range(inferer.num_members), network)
        order = sorted(range(inferer.num_members), key=lambda member: views.is_flipped[member])
        self.noise = nn.Buffer(inferer.noise()[order])  # those that see the image flipped come last
        self.num_upright = inferer.num_members - sum(views.is_flipped)
        self.flip_dims = list(views.dims) or [0]  # of an empty list TorchScript cannot tell what it holds
        self.importance = nn.Buffer(compute_importance_map(tuple(roi_size), mode=window.mode))
        self.eval()

    def forward(self, image: Tensor) -> Tensor:
        """Segment images.

        Args:
            image: (batch, channels, *spatial), preprocessed as the bundle's ``inference.json`` says.

        Returns:
            Probability of each class, calibrated where the training has left a calibration, (batch, classes, *spatial).
        """
        if image.dim() != len(self.roi_size) + 2:
            raise ValueError(f"image of shape {list(image.shape)} is not (batch, channels, {len(self.roi_size)} axes).")
        before: list[int] = []
        pad: list[int] = []
        for axis, roi in enumerate(self.roi_size):
            missing = max(roi - image.shape[axis + 2], 0)
            before.append(missing // 2)
            pad = [missing // 2, missing - missing // 2] + pad  # the last axis comes first
        padded = F.pad(image, pad)
        out = self._whole(padded, self.noise) if list(padded.shape[2:]) == self.roi_size else self._windows(padded)
        for axis, start in enumerate(before):
            out = out.narrow(axis + 2, start, image.shape[axis + 2])
        return self.network.record(out)

    def _windows(self, image: Tensor) -> Tensor:
        """Cover a field (batch, channels, *field) as MONAI's ``sliding_window_inference`` does."""
        origin: list[int] = []
        starts = [origin]
        for axis, (roi, stride) in enumerate(zip(self.roi_size, self.strides)):
            last = image.shape[axis + 2] - roi
            longer: list[list[int]] = []
            for start in starts:
                for i in range((last + stride - 1) // stride + 1):
                    longer.append(start + [min(i * stride, last)])
            starts = longer
        importance = self.importance.to(image)
        out = torch.zeros([image.shape[0], self.num_classes] + list(image.shape[2:])).to(image)
        weight = torch.zeros(list(image.shape[2:])).to(image)
        axes = [axis + 2 for axis in range(len(self.roi_size))]
        for start in starts:
            window, out_here, weight_here = image, out, weight
            for axis, (first, roi) in enumerate(zip(start, self.roi_size)):
                window = window.narrow(axis + 2, first, roi)
                out_here = out_here.narrow(axis + 2, first, roi)
                weight_here = weight_here.narrow(axis, first, roi)
            noise = self.noise.roll([-first for first in start], axes)
            out_here += importance * self._whole(window, noise)
            weight_here += importance
        return out / weight

    def _whole(self, image: Tensor, noise: Tensor) -> Tensor:
        """The mean of the members for a field of ``roi_size``, from noise (members, classes, *roi)."""
        total = self._sum(image, noise[: self.num_upright])
        if self.num_upright < self.num_members:
            flipped = noise[self.num_upright :].flip(self.flip_dims)
            total = total + self._sum(image.flip(self.flip_dims), flipped).flip(self.flip_dims)
        return total / self.num_members

    def _sum(self, image: Tensor, noise: Tensor) -> Tensor:
        """The sum of the members that noise (members, classes, *roi) makes."""
        context = self.network.encode_context(image)
        total = torch.zeros([1]).to(image)
        for first in range(0, noise.shape[0], self.member_batch_size):
            members = noise[first : first + self.member_batch_size].to(image)
            x = members.unsqueeze(0).expand([image.shape[0]] + list(members.shape)).flatten(0, 1)
            drawn = self._sample(x, context).unflatten(0, [image.shape[0], members.shape[0]])
            total = total + drawn.sum(1)
        return total

    def _sample(self, x: Tensor, context: list[Tensor]) -> Tensor:
        """Denoise (batch * members, classes, *roi) to probabilities."""
        before = x
        for t, read_x, read_output, keep, take, recall in self.steps:  # TorchScript keeps tuples, and no names
            output = self.network(x, torch.full([1], t, device=x.device), context)
            x0 = (read_x * x + read_output * output).clamp(self.x0_range[0], self.x0_range[1])
            x = keep * x + take * x0 + recall * before
            before = x0
        return ((x + 1) / 2).clamp(0, 1)


def _torchscript(segmenter: Segmenter) -> bytes:
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(segmenter), file)
    return file.getvalue()


def _program(segmenter: Segmenter) -> ExportedProgram:
    """Any batch; spatial axes are fixed to ``roi_size``, as ONNX Runtime's Fourier transform asks for."""
    image = torch.zeros(2, segmenter.network.in_channels, *segmenter.roi_size)  # a batch of one would be taken as fixed
    return torch.export.export(segmenter, (image,), dynamic_shapes={"image": {0: torch.export.Dim("batch")}})


def _torch_export(segmenter: Segmenter) -> bytes:
    file = io.BytesIO()
    torch.export.save(_program(segmenter), file)
    return file.getvalue()


def _onnx(segmenter: Segmenter) -> bytes:
    """Write the program as ONNX.

    Raises:
        InputError: where the packages for it are missing.
    """
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError("export: ONNX needs two more packages: pip install onnx onnxscript") from error
    program: Any = torch.onnx.export(
        _program(segmenter), verbose=False, input_names=["image"], output_names=["probabilities"]
    )
    return program.model_proto.SerializeToString()


_FORMATS = {".pt2": _torch_export, ".onnx": _onnx, ".ts": _torchscript, ".pt": _torchscript}


def read_segmenter(config_file: str | Sequence[str], **override: Any) -> tuple[nn.Module, DiffusionEnsembleInferer]:
    """Read what a config describes: the network, with its weights, and the inferer.

    Args:
        config_file: config, or list of configs, with ``network_def``, ``inferer`` and ``checkpoint``.
        **override: config variables.

    Raises:
        InputError: for a config that is not there, variables that it does not have, or weights that do not fit.
    """
    parser = read_config(config_file, **override)
    network = parser.get_parsed_content("network_def")
    checkpoint = parser.get_parsed_content("checkpoint")
    if isinstance(checkpoint, list):
        raise InputError(f"checkpoint={checkpoint}: export takes one network: give one file of weights.")
    load_checkpoints(checkpoint, network)
    return network, parser.get_parsed_content("inferer")


def export_segmenter(output: str, config_file: str | Sequence[str], **override: Any) -> None:
    """Write the segmenter that a config describes, with its weights, as one file.

    Args:
        output: file to write: ``.pt2`` (``torch.export``), ``.onnx``, or ``.ts`` or ``.pt`` (TorchScript, which torch
            has deprecated; the only one that takes images of any size).
        config_file: config, or list of configs, with ``network_def``, ``inferer`` and ``checkpoint``.
        **override: config variables.

    Raises:
        InputError: for another kind of file, a sampler that draws noise, weights that do not fit, or a place that
            cannot be written to.
    """
    write = _FORMATS.get(Path(output).suffix)
    if write is None:
        raise InputError(f"output: {output} must end in one of {', '.join(_FORMATS)}.")
    content = write(Segmenter(*read_segmenter(config_file, **override)))
    with writing(output):
        write_atomically(output, content)


def stage_names(network: nn.Module) -> list[str]:
    """Names of the submodules that do most of the work and need no Fourier transform, which TensorRT does not have.

    Raises:
        InputError: for several networks at once.
    """
    if isinstance(network, DeepEnsemble):
        raise InputError("checkpoint: TensorRT takes one network: give one file of weights.")
    return [name for name, module in network.named_modules() if isinstance(module, Stage)]
