"""The bundle as MONAI's model zoo takes it: a folder and a zip that need nothing but what metadata.json names."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import shutil
import statistics
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import InputError
from .export import read_segmenter
from .files import replacing, write_atomically, writing

__all__ = ["NAME", "package_bundle"]

NAME = "hippocampus_mr_diffusion_segmentation"  # of the folder, as the zoo names its bundles
WEIGHTS = "models/model.pt"
# names other weights; of several, MONAI Label's own app takes the file with the shortest name
LEFT_OUT = "configs/datasets/lidc.json"
DATA, METHOD = "Hippocampus3D", "shipped"  # of the record that scores these weights
MAX_BYTES = 25 * 2**20  # the zoo takes no larger file
MEASURED = "<!-- measured -->"  # in docs/README.md: where the scores go
SCORES = {"dice": "dice", "dice_per_class": "dice", "iou": "iou", "hd95": "hd95", "ece": "expected_calibration_error"}
FACTS = {
    "seed": "seed", "seconds": "seconds of training", "cases": "cases", "passes": "passes of the network",
    "seconds_per_image": "seconds per image", "date": "date",
}  # fmt: skip


def _read_json(path: Path, text: str | None = None) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8") if text is None else text)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}): repair or restore it.") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__} where a JSON object is expected: repair it.")
    return content


def _json(content: Any) -> bytes:
    """JSON in the layout that the zoo's checks ask for."""
    return (json.dumps(content, indent=4) + "\n").encode()


def _record(path: Path) -> dict[str, Any]:
    """The newest record of the shipped weights in a file of one JSON object a line.

    Raises:
        InputError: where the file or the record is missing.
    """
    if not path.is_file():
        raise InputError(f"{path}: no results: measure the weights first, or give --results FILE.")
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    records = [_read_json(path, line) for line in lines]
    found = [r for r in records if r.get("method") == METHOD and Path(str(r.get("data", ""))).name == DATA]
    if not found:
        raise InputError(f"{path}: holds no record of method {METHOD} on data {DATA}: measure that first.")
    return found[-1]


def _scores(record: Mapping[str, Any], names: list[str]) -> dict[str, float]:
    """The means and the scores of each class, which a record holds as a number, a list or a mapping.

    Raises:
        InputError: without Dice.
    """
    scores: dict[str, float] = {}
    for key, label in SCORES.items():
        value = record.get(key)
        classes = dict(zip(names, value)) if isinstance(value, list) else value if isinstance(value, Mapping) else {}
        if classes:
            scores.setdefault(f"mean_{label}", statistics.mean(classes.values()))
        elif isinstance(value, (int, float)):
            scores[f"mean_{label}"] = value
        scores |= {f"{label}_{name}": score for name, score in classes.items()}
    if "mean_dice" not in scores:
        raise InputError(f'results: the record of {DATA} and {METHOD} has no "dice": measure it again.')
    return {name: round(score, 4) for name, score in scores.items() if math.isfinite(score)}


def _metadata(path: Path, record: Mapping[str, Any]) -> dict[str, Any]:
    """``metadata.json`` with the measured scores.

    Raises:
        InputError: where the version is not in the changelog, as the zoo demands.
    """
    metadata = _read_json(path)
    if metadata.get("version") not in metadata.get("changelog", {}):
        raise InputError(f"{path}: version {metadata.get('version')!r} is missing in changelog: add what is new in it.")
    channels = metadata["network_data_format"]["outputs"]["pred"]["channel_def"]
    names = [channels[number] for number in sorted(channels, key=int) if number != "0"]
    metadata["eval_metrics"] = _scores(record, names)
    return metadata


def _measured(record: Mapping[str, Any], metadata: Mapping[str, Any], digest: str) -> str:
    """The scores as a table for the bundle's README, and how they came about."""
    rows = [f"| {name.replace('_', ' ')} | {score:.3f} |" for name, score in metadata["eval_metrics"].items()]
    told = [f"{label}: {record[key]}" for key, label in FACTS.items() if key in record]
    lines = ["| score | value |", "| --- | --- |", *rows, "", f"One run ({', '.join(told)}).", ""]
    return "\n".join([*lines, f"sha256 of `{WEIGHTS}`: `{digest}`"])


def _large_files(digest: str, url: str | None) -> bytes:
    """``large_files.yml``, from which MONAI downloads weights that are too large for the zoo.

    Raises:
        InputError: without an address.
    """
    if url is None:
        raise InputError(f"{WEIGHTS}: above {MAX_BYTES >> 20} MB: upload it, and give --weights_url URL.")
    entry = {"path": WEIGHTS, "url": url, "hash_val": digest, "hash_type": "sha256"}
    return _json({"large_files": [entry]})  # which is YAML, too


def _contents(root: Path, results: Path, weights_url: str | None) -> dict[str, bytes]:
    """All files of the package by their path inside it.

    Raises:
        InputError: for whatever is missing, and for weights that the packaged configs could not load or that were not
            measured.
    """
    if not (root / "configs" / "metadata.json").is_file():
        raise InputError(f"bundle_root: {root} is not a bundle: give --bundle_root DIR, the folder with configs/.")
    weights = root / WEIGHTS
    if not weights.is_file():
        raise InputError(f"{weights}: no weights to package: train first.")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    record = _record(results)
    metadata = _metadata(root / "configs" / "metadata.json", record)
    readme = (root / "docs" / "README.md").read_text(encoding="utf-8")
    if MEASURED not in readme:
        raise InputError(f"{root / 'docs' / 'README.md'}: lacks the line {MEASURED}, where the scores go: restore it.")
    read_segmenter(str(root / "configs" / "inference.json"), bundle_root=str(root))  # the weights are some, and fit
    if record.get("sha256") != digest:
        raise InputError(
            f"{weights}: are not the weights whose scores {results} holds: measure these, and record them."
        )

    code = Path(__file__).parent
    parts = [path for kind in ("*.py", "*.html") for path in code.rglob(kind)]
    sources = [(path, path.relative_to(code.parent)) for path in parts]
    for part in ("LICENSE", "configs", "docs"):
        found = [root / part] if (root / part).is_file() else (root / part).rglob("*")
        sources += [(path, path.relative_to(root)) for path in found if path.is_file() and path.name[0] != "."]
    sources = [(path, inside) for path, inside in sources if inside != Path(LEFT_OUT)]
    files = {inside.as_posix(): path.read_bytes() for path, inside in sources}
    files |= {name: _json(_read_json(root / name)) for name in files if name.endswith(".json")}
    files["configs/metadata.json"] = _json(metadata)
    files["docs/README.md"] = readme.replace(MEASURED, _measured(record, metadata, digest)).encode()
    if weights.stat().st_size > MAX_BYTES:
        files["large_files.yml"] = _large_files(digest, weights_url)
    else:
        files[WEIGHTS] = weights.read_bytes()
    return dict(sorted(files.items()))


def _zip(files: Mapping[str, bytes]) -> bytes:
    """A zip that is the same, byte for byte, on every machine: fixed dates and permissions, and no compression."""
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for name, data in files.items():
            info = zipfile.ZipInfo(f"{NAME}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            info.create_system = 3  # Unix, wherever it is written
            info.external_attr = 0o644 << 16
            archive.writestr(info, data)
    return content.getvalue()


def _write_folder(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write a folder as a whole, in place of an earlier package.

    Raises:
        InputError: where it holds something that no package holds.
    """
    if folder.exists():
        present = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
        foreign = sorted(present - set(files))
        if foreign or not folder.is_dir():
            raise InputError(
                f"{folder}: is not an earlier package, or has been used (it holds {', '.join(foreign[:3]) or 'text'}): "
                "move it away, or choose another --output."
            )
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{kind}") for kind in ("new", "old"))
    try:
        for name, data in files.items():
            write_atomically(new / name, data)
        if folder.exists():
            folder.rename(old)
        new.rename(folder)
    finally:
        if old.exists() and not folder.exists():
            old.rename(folder)
        for leftover in (new, old):
            shutil.rmtree(leftover, ignore_errors=True)


def package_bundle(
    output: str, bundle_root: str, results: str | None = None, weights_url: str | None = None
) -> tuple[Path, Path]:
    """Write the bundle with this package's code inside, as a folder and a zip; the same every time.

    The scores in ``metadata.json`` and ``docs/README.md`` are those of the results' newest record of the shipped
    weights.

    Args:
        output: folder to write both to.
        bundle_root: the bundle's folder.
        results: JSON lines with ``method``, ``data``, ``sha256`` of the weights, ``dice`` and, where there are, other
            scores and facts (``SCORES`` and ``FACTS``); by default ``benchmarks/results.jsonl`` beside the bundle.
        weights_url: where weights above 25 MB are downloaded from.

    Returns:
        The folder and the zip.

    Raises:
        InputError: for whatever is missing or does not fit, for a folder that would be lost, and for a place that
            cannot be written to.
    """
    root = Path(bundle_root)
    measured = Path(results) if results else root.resolve().parent / "benchmarks" / "results.jsonl"
    files = _contents(root, measured, weights_url)
    version = json.loads(files["configs/metadata.json"])["version"]
    folder, archive = Path(output) / NAME, Path(output) / f"{NAME}_v{version}.zip"
    with writing(output), replacing(archive) as temporary:  # a disk that is full leaves both as they were
        temporary.write_bytes(_zip(files))
        _write_folder(folder, files)
    return folder, archive
