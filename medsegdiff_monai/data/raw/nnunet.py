"""A raw data set of nnU-Net: channels in a file each, cases found by name."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from monai.data import MetaTensor
from monai.data.utils import to_affine_nd
from nibabel.affines import voxel_sizes

from ...errors import InputError
from ..entries import DataList
from ..geometry import onto_grid
from ..pictures import PICTURES
from ..reading import IMAGE_SUFFIXES, NIFTI, files_below, load_image, read_json
from ..rules import read_label
from .layout import Case, CaseFiles, Layout

__all__ = ["find"]

CHANNEL = re.compile(r"(?P<case>.+)_(?P<channel>\d{4})")
FOLDERS: dict[str, str | None] = {"Tr": None, "Ts": "test"}  # endings of imagesTr and labelsTr ..., and their split


def find(source: Path) -> Layout:
    """Read ``dataset.json`` and the files that are named by it, in the folder given or one below it.

    ``imagesTr/<case>_0000<ending>`` is the first channel of a case, ``_0001`` the second; ``labelsTr/<case><ending>``
    its label. ``imagesTs`` becomes ``test``, with ``labelsTs`` where that is there. Version 1, with ``modality`` in
    place of ``channel_names``, is read alike.

    Quirks:
    - Several channels become one file; a picture may hold its three colours as ``_0000``.
    - Labels of several values (``"whole": [1, 2]``) become ``regions``, a label ``ignore`` becomes ``ignore_label``.
    - ``dataset`` in ``dataset.json``, a list of files elsewhere, and stacks in TIFF are refused.

    Args:
        source: folder of the data set, such as ``Dataset001_BrainTumour``.

    Returns:
        The data set.

    Raises:
        InputError: where ``dataset.json`` is missing or not of this kind, or there is no image.
    """
    found = [source / "dataset.json", *sorted(source.glob("*/dataset.json"))]
    file = next((path for path in found if path.is_file()), None)
    if file is None:
        raise InputError(f"{source}: holds no dataset.json: give the folder of one data set of nnU-Net.")
    content = read_json(file)
    names, ending = _channels(content, file), _ending(content, file)
    notes: list[str] = []
    cases = [case for part, split in FOLDERS.items() for case in _cases(file.parent, part, split, ending, names, notes)]
    if not cases:
        raise InputError(f"{file.parent}: holds no imagesTr/<case>_0000{ending}: correct 'file_ending', or add images.")
    data = DataList(file, content, [], [])
    labels, regions = _labels(data)
    name = str(content.get("name") or file.parent.name)[:100]
    edition = f"nnU-Net {name}, {len(cases)} cases, channels {', '.join(names)}"
    modality = {str(i): channel for i, channel in enumerate(names)}
    return Layout(edition, cases, labels, modality, regions, notes, data.ignore_label)


def _channels(content: Any, file: Path) -> list[str]:
    """Names of the channels in their order."""
    table = content.get("channel_names", content.get("modality")) if isinstance(content, dict) else None
    names = table if isinstance(table, dict) else {}
    if (
        not names
        or set(names) != set(map(str, range(len(names))))
        or not all(isinstance(n, str) for n in names.values())
    ):
        raise InputError(f'{file}: needs \'channel_names\', such as {{"0": "T1", "1": "T2"}}, as nnU-Net has them.')
    if "dataset" in content:
        raise InputError(f"{file}: 'dataset' lists files that lie elsewhere: copy them to imagesTr/ and labelsTr/.")
    return [names[str(i)] for i in range(len(names))]


def _ending(content: Mapping[str, Any], file: Path) -> str:
    ending = content.get("file_ending", ".nii.gz")
    if not isinstance(ending, str) or ending.lower() not in IMAGE_SUFFIXES:
        raise InputError(
            f"{file}: 'file_ending' is {str(ending)[:100]!r}, which is not read ({', '.join(IMAGE_SUFFIXES)}): "
            "convert the files."
        )
    return ending


def _labels(data: DataList) -> tuple[dict[str, str], dict[str, list[int]] | None]:
    """The name of each label value, and the regions where labels share values."""
    if data.labels is None:
        raise InputError(
            f'{data.file}: \'labels\' must be a table such as {{"background": 0, "tumour": 1}}: correct it.'
        )
    values = [value for one in data.labels.values() for value in one]
    if len(set(values)) == len(values):
        return {str(v): name for name, one in data.labels.items() for v in one}, None
    table = {str(v): f"label_{v}" if v else "background" for v in sorted({0, *values})}
    return table, {name: [v for v in one if v] for name, one in data.labels.items() if any(one)}


def _stems(folder: Path, ending: str, notes: list[str]) -> dict[str, Path]:
    """The files of a folder by their names without ending."""
    found = {}
    for path in files_below(folder) if folder.is_dir() else []:
        if path.parent == folder and path.name.lower().endswith(ending.lower()):
            found[path.name[: -len(ending)]] = path
        else:
            notes.append(f"{path}: is no {ending} of {folder.name}/ and is left out.")
    return found


def _cases(root: Path, part: str, split: str | None, ending: str, names: Sequence[str], notes: list[str]) -> list[Case]:
    """The cases of a folder of images, in the order of their names."""
    images, labels = f"images{part}", f"labels{part}"
    channels: dict[str, dict[int, Path]] = {}
    for stem, path in _stems(root / images, ending, notes).items():
        found = CHANNEL.fullmatch(stem)
        if found:
            channels.setdefault(found["case"], {})[int(found["channel"])] = path
        else:
            notes.append(f"{path}: has no channel in its name, such as _0000, and is left out.")
    masks = _stems(root / labels, ending, notes)
    notes += [
        f"{path}: has no image in {images}/ and is left out." for stem, path in masks.items() if stem not in channels
    ]
    bare = [case for case in channels if case not in masks]
    if bare and split is None:
        notes.append(
            f"{len(bare)} images have no label and are listed as 'unlabelled': {', '.join(sorted(bare)[:10])}."
        )
    cases = []
    for case, files in sorted(channels.items()):
        label = masks.get(case)
        sources = [files[i] for i in sorted(files)] + ([] if label is None else [label])
        convert = partial(_convert, name=case, files_of=files, label=label, names=names)
        cases.append(Case(case, case, sources, convert, split or (None if label is not None else "unlabelled")))
    return cases


def _image(case: str, files: Mapping[int, Path], names: Sequence[str]) -> MetaTensor:
    """The channels (channels, *spatial) of a case, on the grid of the first.

    Raises:
        InputError: where channels are missing, too many, or of different grids.
    """
    if 0 in files and len(files) == 1:
        whole = load_image(files[0], len(names))
        if len(whole) == len(names):
            return whole
        if len(names) == 1:
            raise InputError(f"{files[0]}: has {len(whole)} channels, 'channel_names' has one: correct either.")
    missing = [f"{i:04d} ({name})" for i, name in enumerate(names) if i not in files]
    if missing or len(files) > len(names):
        more = ", ".join(f"{i:04d}" for i in sorted(files) if i >= len(names))
        fault = f"lacks the channel {', '.join(missing)}" if missing else f"has channels without a name: {more}"
        raise InputError(f"{next(iter(files.values())).parent / case}: {fault}: correct the files or 'channel_names'.")
    channels = [load_image(files[i], 1) for i in range(len(names))]
    for i, channel in enumerate(channels):
        if len(channel) != 1:
            raise InputError(f"{files[i]}: has {len(channel)} channels: save each as a file of its own.")
        channels[i], difference = _on_grid(channel, channels[0])
        if difference:
            raise InputError(
                f"{files[i]}: {difference} ({files[0].name}): resample it onto the grid of the first channel."
            )
    return MetaTensor(np.concatenate([channel.numpy() for channel in channels])).copy_meta_from(channels[0])


def _on_grid(channel: MetaTensor, first: MetaTensor) -> tuple[MetaTensor, str]:
    fitted, difference = onto_grid(channel, first)
    return channel if fitted is None else fitted, difference.replace("label of", "channel of")


def _convert(
    files: CaseFiles, name: str, files_of: Mapping[int, Path], label: Path | None, names: Sequence[str]
) -> list[dict[str, Any]]:
    """Write a case: a file with a single channel as it is, several as one NIfTI, or MetaImage in 2D."""
    image = _image(name, files_of, names)
    affine, flat = to_affine_nd(3, image.affine).numpy(), image.ndim == 3
    first = files_of[0]
    if len(files_of) == 1 and first.name.lower().endswith((*NIFTI, *PICTURES)):
        suffix = ".nii.gz" if first.name.lower().endswith(".nii.gz") else first.suffix.lower()
        item = {"image": files.copy(first, f"images/{name}{suffix}")}
    elif flat:
        item = {"image": files.meta_image(image.numpy(), voxel_sizes(affine)[:2], f"images/{name}.mha")}
    else:
        item = {"image": files.nifti(image.numpy(), affine, f"images/{name}.nii.gz")}
    if label is not None:
        fitted = read_label(str(label), image).numpy()[0]
        if flat and label.name.lower().endswith(PICTURES):
            item["label"] = files.label_picture(fitted.T, f"labels/{name}.png")
        else:
            item["label"] = files.label_nifti(fitted, affine, f"labels/{name}.nii.gz")
    return [item]
