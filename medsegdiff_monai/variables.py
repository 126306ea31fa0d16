"""The flat variables of the configs, each declared once: what it may hold, which configs have it, what it means.

Values that a user gives are checked against this, and ``medsegdiff settings`` and ``docs/settings.md`` print
it. Defaults are in the configs alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import kinds
from .errors import InputError
from .kinds import Boolean, Choice, Each, Kind, ListOf, Nullable, Number, Place, Several, Whole

__all__ = [
    "CONFIGS",
    "PARTS",
    "VARIABLES",
    "Variable",
    "defaults",
    "describe",
    "find_clashes",
    "recorded",
    "suggest",
    "table",
]

# What the configs hold besides variables, by the id it stands under
PARTS = {
    "": {
        "additional_metrics", "data_spec", "datalist", "dataloader", "dataset", "ddp_network", "displayable_configs",
        "ema_network", "evaluating", "evaluator", "field_size", "finalize", "handlers", "imports", "inference",
        "inferer", "initialize", "key_metric", "loss", "lr_scheduler", "made_with", "mask_and_label", "network",
        "network_def", "optimizer", "postprocessing", "preprocessing", "run", "scheduler", "splits", "train",
        "training", "trt_args", "validate", "variables",
    },
    "train": {"dataloader", "dataset", "handlers", "inferer", "preprocessing", "sampler", "trainer"},
    "validate": {
        "additional_metrics", "dataloader", "dataset", "evaluator", "handlers", "inferer", "key_metric",
        "postprocessing", "preprocessing",
    },
    "displayable_configs": {"fusion", "num_members", "num_steps"},
}  # fmt: skip
CONFIGS = ("train", "evaluate", "inference")
SCORED = ("evaluate", "inference")
TRAIN = ("train",)


@dataclass(frozen=True)
class Variable:
    """A flat variable of the configs.

    Args:
        name: its name.
        kind: what it may hold.
        help: what it means, in one line.
        configs: the configs that have it.
        default: what an expression in the configs comes to, in words.
    """

    name: str
    kind: Kind
    help: str
    configs: tuple[str, ...] = CONFIGS
    default: str = ""

    def read(self, value: Any) -> Any:
        """Return the value that is meant.

        Raises:
            InputError: naming variable, value and what is allowed.
        """
        try:
            return self.kind.read(value)
        except ValueError as error:
            shown = repr(value) if len(repr(value)) <= 80 else f"{repr(value)[:80]}..."
            raise InputError(f"{self.name}={shown} {str(error) or f'must be {self.kind.allowed}'}.") from error


_SPLIT = Nullable(Choice("training", "validation", "test"))

_DECLARED = [
    # places
    Variable("bundle_root", Place(), "folder of the bundle", default="of the working directory, else of this package"),
    Variable("dataset_dir", Place(), "data: a folder with dataset.json; for inference also one with images"),
    Variable("output_dir", Place(1), "folder for results", default="train, eval or inference in bundle_root"),
    Variable("ckpt_dir", Place(1), "folder of the weights", default="models in bundle_root"),
    Variable(
        "checkpoint", Several(Place(1)), "weights to use; several share the members", SCORED, "model.pt in ckpt_dir"
    ),
    Variable("pretrained", Nullable(Place(1)), "weights to start from", TRAIN),
    Variable("images", Nullable(ListOf(Place(1), 1)), "images to segment, in place of dataset_dir", ("inference",)),
    Variable("device", kinds.Device(), "where the network runs", default="cuda, else mps, else cpu"),
    # data
    Variable("spatial_dims", Choice(2, 3), "spatial axes of the images"),
    Variable("in_channels", Whole(1, 1024), "channels of the images"),
    Variable("num_classes", Whole(1, 255), "foreground classes, the channels of the mask"),
    Variable("regions", Nullable(kinds.Regions()), "what each mask channel holds; null: one channel for each label"),
    Variable(
        "ignore_label",
        Nullable(Whole(1, 65535)),
        "label value of unlabelled voxels; null: there are none",
        ("train", "evaluate"),
    ),
    Variable("spacing", Nullable(ListOf(Number(above=0), 2, 3)), "voxel size to resample to, in mm; null: keep it"),
    Variable(
        "intensity_range",
        Nullable(ListOf(Number(), 2, 2)),
        "intensities to scale from, if they mean the same in every image (CT in HU); null: normalise each by itself",
    ),
    Variable("fit", Choice("crop", "resize"), "crop: patches and windows of the image; resize: the whole image"),
    Variable("roi_size", ListOf(Whole(1, 4096), 2, 3), "field that the network sees, rounded up to its stride"),
    Variable(
        "surface_tolerance",
        Number(0.0, 1000),
        "distance up to which surfaces count as equal (NSD), mm or px",
        ("evaluate",),
    ),
    Variable("eval_split", _SPLIT, "list to evaluate; null: validation, else test", ("evaluate",)),
    Variable("infer_split", _SPLIT, "list to segment; null: test, else validation", ("inference",)),
    Variable(
        "num_folds",
        Nullable(Whole(2, 1000)),
        "parts for cross-validation, of training and validation together; null: use the lists as they are",
    ),
    Variable("fold", Nullable(Whole(0, 999)), "which of the num_folds parts is held out, from 0"),
    # network
    Variable("channels", ListOf(Whole(1, 8192), 2, 16), "channels of each level, from full resolution down"),
    Variable("num_res_blocks", Each(Whole(1, 64)), "residual blocks of a level"),
    Variable("stem_stride", Choice(1, 2), "2: the network computes at half the resolution"),
    Variable("attention_levels", Nullable(ListOf(Boolean())), "levels with self-attention; null: none"),
    Variable(
        "conditioning_levels", Nullable(ListOf(Whole(0, 15))), "levels of dynamic conditioning; null: the middle two"
    ),
    Variable("use_ff_parser", Boolean(), "whether the FF-Parser filters the mask's features"),
    Variable("num_head_channels", Each(Whole(1, 8192)), "channels of an attention head"),
    # diffusion
    Variable("prediction_type", Choice("sample", "epsilon", "v_prediction"), "what the network predicts"),
    Variable("noise_schedule", kinds.Schedule(), "how noise grows with time"),
    Variable("signal_scale", Number(above=0, high=100), "factor that scales the mask before noise is added"),
    Variable("num_train_timesteps", Whole(1, 100_000), "timesteps of the diffusion"),
    # training
    Variable(
        "objective",
        Choice("ensemble", "mask", "epsilon", "v_prediction"),
        "what training optimises",
        TRAIN,
        "ensemble; with another prediction_type, that",
    ),
    Variable("train_num_members", Whole(2, 1000), "masks per image that the objective ensemble scores together", TRAIN),
    Variable("max_epochs", Whole(), "epochs to train for", TRAIN),
    Variable("val_interval", Whole(), "epochs between validations; the last epoch always has one", TRAIN),
    Variable(
        "patience", Nullable(Whole()), "validations without improvement before training stops; null: never", TRAIN
    ),
    Variable("batch_size", Whole(1, 65536), "images per batch", TRAIN),
    Variable("accumulation_steps", Whole(), "batches per optimiser step", TRAIN),
    Variable("learning_rate", Number(above=0, high=1), "highest learning rate of AdamW", TRAIN),
    Variable("warmup_epochs", Whole(0), "epochs of learning rate warm-up", TRAIN),
    Variable("max_grad_norm", Number(above=0), "gradients are clipped to this norm", TRAIN),
    Variable(
        "flip_axes",
        ListOf(Whole(0, 2), 0, 3),
        "axes of the random flip, flipped together; every second pair of members sees the image so; []: none",
        TRAIN,
    ),
    Variable("augmentation", kinds.Transforms(), "further random transforms, of tensors without metadata", TRAIN),
    Variable("resume", Boolean(), "continue from the newest checkpoint in ckpt_dir", TRAIN),
    Variable("cache", Choice("memory", "disk", "none"), "where preprocessed cases are kept", TRAIN),
    Variable("cache_rate", Number(low=0, high=1), "share of the cases kept in memory", TRAIN),
    Variable("num_workers", Whole(0, 1024), "data loading processes", TRAIN),
    Variable("compile", Boolean(), "whether to use torch.compile", TRAIN),
    # ensemble
    Variable("num_members", Whole(1, 1000), "masks (members) per image", SCORED),
    Variable("num_steps", Whole(1, 100_000), "denoising steps per mask", SCORED),
    Variable("val_num_members", Whole(1, 1000), "num_members of validation during training", TRAIN),
    Variable("val_num_steps", Whole(1, 100_000), "num_steps of validation during training", TRAIN),
    Variable("member_batch_size", Nullable(Whole(1, 1000)), "members computed at a time, to save memory; null: all"),
    Variable(
        "agreement_threshold",
        Nullable(Number(above=0, high=1)),
        "Dice, such as 0.99: no further members once their mean is that stable; null: all",
        SCORED,
    ),
    Variable("fusion", Choice("staple", "mean", "vote", "expected_dice"), "how members are combined into one mask"),
    Variable("largest_component", Boolean(), "write only the largest component of each class", SCORED),
    Variable(
        "min_size",
        Nullable(Number(above=0, high=1e9)),
        "write only components of at least this size: mm^3, mm^2 in 2D, pixels of pictures; null: all",
        SCORED,
    ),
    Variable("seed", Whole(0, 2**32 - 1), "seed of noise, augmentation and random splits"),
    # running
    Variable(
        "amp",
        Choice(False, True, "bfloat16", "float16"),
        "autocast; true: bfloat16",
        default="`false`; training in 2D on a CPU that computes in bfloat16: `true`",
    ),
    Variable(
        "outputs",
        ListOf(Choice("seg", "prob", "uncertainty", "members", "overlay"), 1, 5),
        "what is written; seg must be there",
        SCORED,
    ),
    Variable("overwrite", Boolean(), "segment finished cases again", ("inference",)),
    Variable(
        "timeout_minutes",
        Number(above=0, high=100_000),
        "how long a process waits for the others",
        ("multi_gpu_train", "multi_gpu_evaluate", "multi_gpu_inference"),
    ),
]

VARIABLES = {variable.name: variable for variable in _DECLARED}


def _axes(values: Mapping[str, Any]) -> Iterator[str]:
    dims, roi_size, spacing = (values.get(name) for name in ("spatial_dims", "roi_size", "spacing"))
    if not dims:
        return
    if roi_size and len(roi_size) != dims:
        yield f"roi_size={roi_size} must be {dims} sizes, as spatial_dims={dims} says."
    if spacing and len(spacing) < dims:
        yield f"spacing={spacing} must be null or {dims} sizes of a voxel, as spatial_dims={dims} says."
    if max(values.get("flip_axes") or [0]) >= dims:
        yield f"flip_axes={values['flip_axes']} must be axes from 0 to {dims - 1}, as spatial_dims={dims} says."


def _levels(values: Mapping[str, Any]) -> Iterator[str]:
    channels, attention, conditioning = (
        values.get(name) for name in ("channels", "attention_levels", "conditioning_levels")
    )
    if not channels:
        return
    levels = len(channels)
    if channels[0] % 2:
        yield f"channels={channels} must begin with an even number."
    for name in ("attention_levels", "num_res_blocks", "num_head_channels"):
        if isinstance(values.get(name), list) and len(values[name]) != levels:
            yield f"{name}={values[name]} must have {levels} entries, one for each of channels={channels}."
            return
    if conditioning and (max(conditioning) > levels - 2 or len(set(conditioning)) < len(conditioning)):
        yield (
            f"conditioning_levels={conditioning} must be different levels from 0 to {levels - 2}: "
            "at the last of the channels both streams are summed."
        )
    heads = values.get("num_head_channels")
    heads = heads if isinstance(heads, list) else [heads] * levels
    for width, head, on in zip(channels, heads, attention or []):
        if on and head and width % head:
            yield f"num_head_channels={head} must divide the {width} channels of a level with attention."


def _data(values: Mapping[str, Any]) -> Iterator[str]:
    classes, regions, span = (values.get(name) for name in ("num_classes", "regions", "intensity_range"))
    if classes and regions and len(regions) != classes:
        names = ", ".join(map(str, regions))
        yield (
            f"num_classes={classes}, but regions names {len(regions)} ({names}): make them agree; where "
            "regions come from the data, leave num_classes out, or correct labels in dataset.json."
        )
    ignored = values.get("ignore_label")
    labels = {label for group in regions.values() for label in group} if regions else set(range(1, 1 + (classes or 0)))
    if ignored in labels:
        yield f"ignore_label={ignored} must not be a label of a class ({', '.join(map(str, sorted(labels)))})."
    if span and span[0] >= span[1]:
        yield f"intensity_range={span} must be a lower and a higher value."
    if values.get("outputs") and "seg" not in values["outputs"]:
        yield f"outputs={values['outputs']} must hold seg: the mask tells which cases are finished."


def _diffusion(values: Mapping[str, Any]) -> Iterator[str]:
    objective, predicted = values.get("objective"), values.get("prediction_type")
    needed = "sample" if objective in ("ensemble", "mask") else objective
    if objective and predicted and predicted != needed:
        yield f"objective={objective!r} needs prediction_type={needed!r}, it is {predicted!r}: set both."
    timesteps = values.get("num_train_timesteps")
    for name in ("num_steps", "val_num_steps"):
        if timesteps and values.get(name, 0) > timesteps:
            yield f"{name}={values[name]} must be at most num_train_timesteps={timesteps}."


def _epochs(values: Mapping[str, Any]) -> Iterator[str]:
    warmup, epochs = values.get("warmup_epochs", 0), values.get("max_epochs")
    if epochs and warmup >= epochs:
        yield f"warmup_epochs={warmup} must be below max_epochs={epochs}."


def _folds(values: Mapping[str, Any]) -> Iterator[str]:
    number, fold = values.get("num_folds"), values.get("fold")
    if number is None and fold is not None:
        yield f"fold={fold} needs num_folds, the number of all folds: set both."
    if number is not None and (fold is None or fold >= number):
        yield f"fold={fold} must be from 0 to {number - 1}, as num_folds={number} says."


def _weights(values: Mapping[str, Any]) -> Iterator[str]:
    checkpoint, members = values.get("checkpoint"), values.get("num_members")
    if not isinstance(checkpoint, list):
        return
    twice = [path for i, path in enumerate(checkpoint) if path in checkpoint[:i]]
    if twice:
        yield f"checkpoint names {twice[0]} twice: name each file of weights once."
    if members and members < len(checkpoint):
        yield (
            f"num_members={members} is fewer than the {len(checkpoint)} files of weights in checkpoint, of which each "
            f"makes one at least: set num_members={len(checkpoint)}, or name fewer."
        )


def find_clashes(values: Mapping[str, Any]) -> list[str]:
    """Say what does not fit together among values of variables that are right one by one; some may be missing."""
    checks: list[Callable[[Mapping[str, Any]], Iterator[str]]]
    checks = [_axes, _levels, _data, _diffusion, _epochs, _folds, _weights]
    return [fault for check in checks for fault in check(values)]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return ``": did you mean ...?"`` for what is most like a name that is not known, or nothing."""
    close = get_close_matches(name, list(known), n=1)
    return f": did you mean {close[0]}?" if close else ""


def recorded(config: str, content: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of a config, as the report of a training lists them: by references to their values.

    Args:
        config: ``train``, ``evaluate`` or ``inference``; variables that only others have are left out.
        content: of the config, with its overlays.
    """
    others = {*CONFIGS} - {config}
    mine = [v for v in VARIABLES.values() if v.name in content and (config in v.configs or not others & {*v.configs})]
    # transforms by the text that describes them
    described = {
        v.name: json.dumps(content[v.name], default=str).replace("::", "#") for v in mine if v.name == "augmentation"
    }
    return {variable.name: f"@{variable.name}" for variable in mine} | described


def defaults(config: str, bundle_root: str | Path) -> dict[str, str]:
    """Return the variables of a config with their defaults, as they are written in JSON or in words.

    Args:
        config: ``train``, ``evaluate`` or ``inference``.
        bundle_root: folder of the bundle.
    """
    content = json.loads((Path(bundle_root) / "configs" / f"{config}.json").read_text(encoding="utf-8"))
    mine = [variable for variable in VARIABLES.values() if config in variable.configs]
    return {variable.name: variable.default or json.dumps(content[variable.name]) for variable in mine}


def describe(config: str, bundle_root: str | Path) -> str:
    """Return the variables of a config in two lines each: default and what is allowed, then the meaning.

    Args:
        config: ``train``, ``evaluate`` or ``inference``.
        bundle_root: folder of the bundle.

    Raises:
        InputError: for another config.
    """
    if config not in CONFIGS:
        hint = suggest(config, CONFIGS) or f": give one of {', '.join(CONFIGS)}."
        raise InputError(f"{config}: no such config{hint}")
    given = defaults(config, bundle_root)
    width = max(map(len, given)) + 2
    return "\n".join(
        f"{name:{width}}{VARIABLES[name].help}\n{'':{width}}{default} ({VARIABLES[name].kind.allowed})"
        for name, default in given.items()
    )


def table(bundle_root: str | Path) -> str:
    """Return all variables of the three configs as a table in Markdown, for ``docs/settings.md``.

    Args:
        bundle_root: folder of the bundle.
    """
    given = {name: default for config in CONFIGS for name, default in defaults(config, bundle_root).items()}
    lines = ["| variable | in | default | allowed | meaning |", "|---|---|---|---|---|"]
    for variable in VARIABLES.values():
        if variable.name in given:
            places = "all" if variable.configs == CONFIGS else ", ".join(variable.configs)
            default = variable.default or f"`{given[variable.name]}`"
            lines.append(f"| `{variable.name}` | {places} | {default} | {variable.kind.allowed} | {variable.help} |")
    return "\n".join(lines)
