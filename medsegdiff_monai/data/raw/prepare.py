"""From a raw download to Decathlon layout."""

from __future__ import annotations

import inspect
import json
import os
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from monai.utils import ensure_tuple
from tqdm import tqdm

from ...errors import InputError
from ...files import write_atomically
from ..datalist import hold_out
from ..reading import read_json
from ..rules import SHOWN
from . import brats, ddti, decathlon, folder, nnunet, refuge
from .layout import Case, CaseFiles, Layout

__all__ = ["KINDS", "prepare"]

KINDS: dict[str, Callable[..., Layout]] = {
    "refuge": refuge.find,
    "brats": brats.find,
    "ddti": ddti.find,
    "decathlon": decathlon.find,
    "nnunet": nnunet.find,
    "folder": folder.find,
}
RECORDS = ".prepared"  # folder of the output that tells which cases are finished


def prepare(kind: str, source: str, output: str, seed: int = 0, workers: int | None = None, **options: Any) -> None:
    """Read a raw data set as its owners distribute it and write it in Decathlon layout, with a summary.

    The source is never altered. Finished cases are not done again, ``dataset.json`` comes last. The official split is
    kept where there is one; else patients are drawn by the seed, 20 % for ``test`` (where none is given) and 20 % of
    the rest for ``validation``.

    Args:
        kind: ``refuge``, ``brats``, ``ddti``, ``decathlon``, ``nnunet`` or ``folder``.
        source: folder of the raw data.
        output: folder to write to.
        seed: seed of the split.
        workers: cases at a time; by default one for each processor.
        **options: of the kind: ``crop_disc`` (refuge), ``slices`` and ``regions`` (brats), ``rater`` (ddti),
            ``patient_pattern`` and ``raters`` (folder).

    Raises:
        InputError: for a source that is not of this kind, and, after the others are written, for bad cases.
    """
    find = _kind(kind, options)
    raw, target = Path(source), Path(output)
    if not raw.is_dir():
        raise InputError(f"source={str(source)!r} is not a folder: give the unpacked download.")
    if target.resolve().is_relative_to(raw.resolve()):
        raise InputError(f"output={str(output)!r} lies in the source, which is never altered: give another folder.")
    layout = find(raw, **options)
    if not layout.cases:
        raise InputError(f"{source}: no case can be used: " + " ".join(layout.notes[:SHOWN]))
    print(f"{kind}: {layout.edition}")
    _stamp(target, {"kind": kind, "source": str(raw.resolve()), "options": {k: str(v) for k, v in options.items()}})
    records = _convert_all(layout.cases, target, workers)
    faults = [record for record in records if isinstance(record, InputError)]
    good = [(case, record) for case, record in zip(layout.cases, records) if not isinstance(record, InputError)]
    if good:
        content = _content(layout, good, int(seed))
        write_atomically(target / "dataset.json", (json.dumps(content, indent=1) + "\n").encode())
        _summarise(layout, content, target)
    if faults:
        more = f"\n  ... and {len(faults) - SHOWN} more" if len(faults) > SHOWN else ""
        raise InputError(
            f"{len(faults)} bad cases were left out, {len(good)} are ready in {target}:\n  "
            + "\n  ".join(str(fault) for fault in faults[:SHOWN])
            + more
        )


def _kind(kind: str, options: dict[str, Any]) -> Callable[..., Layout]:
    if kind not in KINDS:
        raise InputError(f"{kind!r} is not a kind of data set: give one of {', '.join(KINDS)}.")
    known = [name for name in inspect.signature(KINDS[kind]).parameters if name != "source"]
    for name in options:
        if name not in known:
            raise InputError(f"--{name}: {kind} has no such option; it has {', '.join(known) or 'none'}.")
    return KINDS[kind]


def _stamp(output: Path, made_of: dict[str, Any]) -> None:
    """Refuse an output folder that holds something else than an earlier run of the same."""
    file = output / RECORDS / "made_of.json"
    if file.is_file():
        if read_json(file) != made_of:
            raise InputError(
                f"{output}: was prepared from another source or with other options: give another --output."
            )
    elif output.is_dir() and any(output.iterdir()):
        raise InputError(f"{output}: is not empty and not from an earlier run: give another --output.")
    write_atomically(file, json.dumps(made_of).encode())


def _convert_all(cases: Sequence[Case], output: Path, workers: int | None) -> list[dict[str, Any] | InputError]:
    def attempt(case: Case) -> dict[str, Any] | InputError:
        try:
            return _convert(case, output)
        except InputError as error:
            return error

    try:
        with ThreadPoolExecutor(int(workers or os.cpu_count() or 1)) as pool:
            return list(tqdm(pool.map(attempt, cases), total=len(cases), desc="Prepare"))
    except OSError as error:
        raise InputError(f"{output}: cannot be written ({error}): free space, or give another --output.") from error


def _convert(case: Case, output: Path) -> dict[str, Any]:
    """Write a case unless it is finished; return its items and label values."""
    file = output / RECORDS / "cases" / f"{case.name}.json"
    if file.is_file() and all(p.exists() and p.stat().st_mtime <= file.stat().st_mtime for p in case.sources):
        finished = read_json(file)
        written = [path for item in finished["items"] for value in item.values() for path in ensure_tuple(value)]
        if finished.get("recipe", "") == case.recipe and all((output / path).is_file() for path in written):
            return finished
    files = CaseFiles(output)
    record = {"items": case.convert(files), "values": sorted(files.values), "recipe": case.recipe}
    write_atomically(file, json.dumps(record).encode())
    return record


def _content(layout: Layout, good: Sequence[tuple[Case, dict[str, Any]]], seed: int) -> dict[str, Any]:
    lists: dict[str, list[dict[str, Any]]] = {"training": [], "validation": [], "test": [], "unlabelled": []}
    drawn: list[dict[str, Any]] = []
    for case, record in good:
        items = [{**item, "patient": case.patient} for item in record["items"]]
        (drawn if case.split is None else lists[case.split]).extend(items)
    _draw(lists, drawn, seed)
    values = sorted({value for _, record in good for value in record["values"]})
    return {
        "name": layout.edition,
        "modality": dict(layout.modality),
        "labels": dict(layout.labels or {str(v): f"label_{v}" if v else "background" for v in sorted({0, *values})}),
        **({"regions": {name: list(v) for name, v in layout.regions.items()}} if layout.regions else {}),
        **({} if layout.ignore_label is None else {"ignore_label": layout.ignore_label}),
        "split": {"drawn_by_seed": seed, "images": len(drawn)} if drawn else "official",
        "numTraining": len(lists["training"]),
        "numTest": len(lists["test"]),
        **{split: items for split, items in lists.items() if items or split != "unlabelled"},
    }


def _draw(lists: dict[str, list[dict[str, Any]]], items: list[dict[str, Any]], seed: int) -> None:
    """Divide items by patient among the splits that are not given."""
    rest = [{**item, "group": item["patient"]} for item in items]
    for split, least in (("test", 3), ("validation", 2)):
        if not lists[split] and len({item["group"] for item in rest}) >= least:
            rest, held = hold_out(rest, seed)
            lists[split] = held
    lists["training"] += rest
    for item in [item for split in lists.values() for item in split]:
        item.pop("group", None)


def _summarise(layout: Layout, content: dict[str, Any], output: Path) -> None:
    for split in ("training", "validation", "test", "unlabelled"):
        items = content.get(split, [])
        print(f"  {split:<11} {len(items):>6} images of {len({item['patient'] for item in items})} patients")
    print(f"  labels      {', '.join(f'{value} {name}' for value, name in content['labels'].items())}")
    raters = [len(i["labels"]) for split in ("training", "validation", "test") for i in content[split] if "labels" in i]
    if raters:
        number = "-".join(dict.fromkeys((str(min(raters)), str(max(raters)))))
        print(f"  raters      {number} in each of {len(raters)} images")
    print(f"  split       {content['split']}")
    for note in layout.notes[:SHOWN]:
        print(f"  note: {note}")
    if len(layout.notes) > SHOWN:
        kinds = Counter(note.rsplit(":", 1)[-1].strip() for note in layout.notes[SHOWN:])
        print(*(f"  note: {n} more: {text}" for text, n in kinds.items()), sep="\n")
    print(f"Written: {output / 'dataset.json'}")
    print(f"Next:    medsegdiff train {shlex.quote(str(output))} --output_dir MODEL")
