"""From a data set to masks in a few commands, each of which runs the bundle and says how to do so without it."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from monai.bundle import run

from .configs import read_config, to_be_set
from .data.entries import read_data_list
from .data.report import check
from .errors import InputError, find_input_error
from .files import write_atomically
from .settings import find_bundle_root
from .variables import VARIABLES

__all__ = ["copy_bundle", "evaluate", "say_command", "train", "trained_files"]

OVERLAY = "overlay.json"  # in the folder of a training
WEIGHTS = "models/model.pt"
OF_A_RUN = ("device", "amp")  # of a training, and not of what is done with its weights
SPLIT = {"num_folds", "fold", "seed"}  # which cases a training has held out


class Trained(NamedTuple):
    """What one or several trainings have left.

    Attributes:
        overlay: their settings.
        variables: to be set over it: ``checkpoint``, and no folds where each has held out another.
        apart: variables of the split in which they differ.
    """

    overlay: str
    variables: dict[str, Any]
    apart: set[str]

    def has_seen(self, dataset: str) -> bool:
        """Whether any of them was trained on cases of a data set that ``evaluating`` takes by itself."""
        if not self.apart or "num_folds" in self.variables:
            return bool(self.apart)
        data = read_data_list(dataset)  # without a list to evaluate, the seed decides which cases were held out
        return not data.of("validation") and not any(entry.labels for entry in data.of("test"))


def trained_files(folders: Sequence[str | Path]) -> Trained:
    """Return what :func:`train` has written to a folder, or to several whose weights share the members of an ensemble.

    Raises:
        InputError: where it is not there, or settings differ.
    """
    for file in (Path(folder) / name for folder in folders for name in (OVERLAY, WEIGHTS)):
        if not file.is_file():
            raise InputError(f"{file}: no such file: give the folder of a finished `medsegdiff train`.")
    overlays = [Path(folder) / OVERLAY for folder in folders]
    first, *others = (json.loads(overlay.read_text()) for overlay in overlays)
    apart: set[str] = set()
    for overlay, other in zip(overlays[1:], others):
        # how many members are drawn can be chosen anew; rate and batch size of a training no longer matter
        needed = (name for name in {**first, **other} if name in SPLIT or (_is_needed(name) and name != "num_members"))
        differ = {name for name in needed if first.get(name) != other.get(name)}
        apart |= differ & SPLIT
        if differ - SPLIT:
            names = ", ".join(sorted(differ - SPLIT))
            raise InputError(f"{overlay}: differs from {overlays[0]} in {names}: give trainings of the same settings.")
    weights = [str(Path(folder) / WEIGHTS) for folder in folders]
    variables: dict[str, Any] = {"checkpoint": weights if others else weights[0]}
    if apart and any("num_folds" in overlay for overlay in (first, *others)):
        variables |= {"num_folds": None, "fold": None}
    return Trained(str(overlays[0]), variables, apart)


def train(dataset: str, output: str, bundle_root: str | None = None, **override: Any) -> None:
    """Check a data set, choose the settings that fit it, and train.

    Args:
        dataset: folder that holds ``dataset.json``.
        output: folder for overlay, weights, pictures, curves and report.
        bundle_root: the bundle's folder; by default the one in the working directory, else the installed one.
        **override: config variables, which take precedence over the chosen settings; with ``resume``, over those of
            the training that is continued.

    Raises:
        InputError: for faults of the data, variables that do not fit, and an output folder that holds another training,
            before anything is trained.
    """
    resumes = _resumes(output, override)
    root = bundle_root or find_bundle_root()
    overlay = Path(output) / OVERLAY
    earlier = overlay.read_bytes() if resumes and overlay.is_file() else None
    check(dataset, str(overlay) if earlier is None else None, advises=False)  # a training goes on with its own settings
    _keep(overlay, override)
    where = {"bundle_root": root, "dataset_dir": dataset, "output_dir": output, "ckpt_dir": f"{output}/models"}
    try:
        _run("training", [f"{root}/configs/train.json", str(overlay)], {**where, **override})
    except Exception as error:
        if earlier is not None and find_input_error(error) is not None:  # refused: its weights are as they were
            write_atomically(overlay, earlier)
        raise
    print(f"Report: {output}/training_report.md")
    for command, what in (("evaluate", shlex.quote(dataset)), ("segment", "IMAGE")):
        print(f"Next:   medsegdiff {command} {what} --trained {shlex.quote(output)} --output_dir OUT")


def _resumes(output: str, override: Mapping[str, Any]) -> bool:
    """Whether a training is continued; refuses to replace one."""
    resumes = "resume" in override and bool(VARIABLES["resume"].read(override["resume"]))
    if not resumes and (held := sorted((Path(output) / WEIGHTS).parent.glob("*.pt"))):
        raise InputError(
            f"{held[-1]}: of an earlier training: add --resume true to continue it, or choose another --output_dir."
        )
    return resumes


def _keep(overlay: Path, override: Mapping[str, Any]) -> None:
    """Put into an overlay what evaluation and inference of that training need, too, and what is set otherwise there."""
    content = json.loads(overlay.read_text())
    content |= {name: VARIABLES[name].read(v) for name, v in override.items() if _is_needed(name) or name in content}
    write_atomically(overlay, (json.dumps(content, indent=4) + "\n").encode())


def _is_needed(name: str) -> bool:
    return name in VARIABLES and {"evaluate", "inference"} <= set(VARIABLES[name].configs) and name not in OF_A_RUN


def evaluate(
    dataset: str, output: str, trained: Sequence[str] | None = None, bundle_root: str | None = None, **override: Any
) -> None:
    """Segment and score the cases of a data set.

    Args:
        dataset: folder that holds ``dataset.json``.
        output: folder for masks, tables and report.
        trained: folder of a training, or of several, whose weights share the members; by default the bundle's weights
            are scored.
        bundle_root: see :func:`train`.
        **override: config variables.

    Raises:
        InputError: for faults of the data, and variables that do not fit, before anything is segmented; for trainings
            that have held out different cases, without an ``eval_split``: each has seen those of another.
    """
    root = bundle_root or find_bundle_root()
    files = [f"{root}/configs/evaluate.json"]
    where: dict[str, Any] = {"bundle_root": root, "dataset_dir": dataset, "output_dir": output}
    if trained is not None:
        found = trained_files(trained)
        if "eval_split" not in override and found.has_seen(dataset):
            raise InputError(
                f"trained={', '.join(map(str, trained))}: differ in {', '.join(sorted(found.apart))}, so that each has "
                "seen cases that another has held out: set --eval_split test."
            )
        files.append(found.overlay)
        where |= found.variables
    _run("evaluating", files, {**where, **override})


def _run(what: str, files: Sequence[str], variables: dict[str, Any]) -> None:
    given = to_be_set(variables)
    read_config(files, **given)
    say_command(what, files, variables)
    run(what, config_file=list(files), **given)


def say_command(what: str, files: Sequence[str], variables: Mapping[str, Any]) -> None:
    """Print the command of MONAI that does the same.

    Args:
        what: ``training``, ``evaluating`` or ``inference``.
        files: configs, the later ones over the earlier.
        variables: that are set on the command line.
    """
    given = {"config_file": list(files), **variables}
    texts = {name: json.dumps(value) if isinstance(value, list) else str(value) for name, value in given.items()}
    words = " ".join(f"--{name} {shlex.quote(text)}" for name, text in texts.items())
    print(f"Runs: python -m monai.bundle run {what} {words}", flush=True)


def copy_bundle(output: str, bundle_root: str | None = None) -> None:
    """Write a copy of the bundle, to be changed and trained.

    Args:
        output: folder to write, which must not be there.
        bundle_root: see :func:`train`.

    Raises:
        InputError: where it is there.
    """
    if Path(output).exists():
        raise InputError(f"{output}: already exists: choose another folder, or remove it.")
    shutil.copytree(bundle_root or find_bundle_root(), output)
    print(f"Written: {output}")
    where = f"--config_file {shlex.quote(output + '/configs/train.json')} --bundle_root {shlex.quote(output)}"
    print(f"Next:    python -m monai.bundle run training {where} --dataset_dir DIR")
