"""Names of cases: of the files and folders that their results get, and in tables."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .entries import first_file
from .reading import IMAGE_SUFFIXES

__all__ = ["case_names", "folded", "safe_name", "stem_of"]

MAX_BYTES = 180  # file systems take 255, of which the names of results and of temporary files need some
# What else stands in a folder of results. Of another case, the name would be that of a case's folder.
RESERVED = ("cases.csv", "cases.jsonl", "structures.csv", "report.html", "tensorboard", "validation", "cache")


def stem_of(path: str) -> str:
    """The name of an image file without its suffix, of which ``.nii.gz`` is one."""
    name = Path(path).name
    for suffix in sorted(IMAGE_SUFFIXES, key=len, reverse=True):
        if name.lower().endswith(suffix):
            return name[: -len(suffix)]
    return name


def folded(name: str) -> str:
    """A name without what some file systems do not tell apart: upper and lower case, and ways to write an umlaut."""
    return unicodedata.normalize("NFC", name).casefold()


def safe_name(name: str) -> str:
    """A name for a folder: inside of the one that it is made in, no formula to a spreadsheet, not too long, not hidden.

    Most names stay as they are.
    """
    name = name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")  # bytes of a file system that are no text
    name = re.sub(r"^[=+@.\s-]", "_", re.sub(r"[\x00-\x1f\x7f/\\\ufffd]", "_", name)) or "_"
    if folded(name) in RESERVED:
        name = f"{name.replace('.', '_')}_"
    if len(name.encode()) > MAX_BYTES:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name.encode()[: MAX_BYTES - 9].decode('utf-8', 'ignore')}_{digest}"
    return name


def case_names(images: Sequence[str | Sequence[str]]) -> list[str]:
    """Name each case by its file's stem; stems that collide get their folder as prefix, or as many as it takes.

    Upper and lower case are the same to some file systems, and so they are here (:func:`folded`).

    Args:
        images: image files (the first one names a case of several).
    """
    paths = [Path(first_file(image)) for image in images]
    beside = Counter(path.parent / stem_of(str(path)) for path in paths)
    stems = [  # of two files that differ in their suffix alone, the suffix is part of the name
        stem_of(str(path)) if beside[path.parent / stem_of(str(path))] == 1 else path.name.replace(".", "_")
        for path in paths
    ]
    names = [safe_name(stem) for stem in stems]
    deepest = max((len(path.parts) for path in paths), default=0)
    for depth in range(1, deepest):
        clash = Counter(map(folded, names))
        if len(clash) == len(names):
            break
        longer = [_with_folders(path, stem, depth) for path, stem in zip(paths, stems)]
        names = [new if clash[folded(name)] > 1 else name for name, new in zip(names, longer)]
    return _numbered(names)


def _with_folders(path: Path, stem: str, depth: int) -> str:
    """The name of a file after that of so many folders above it."""
    return safe_name(re.sub(r"[^\w.-]+", "_", "_".join([*path.parent.parts[-depth:], stem])))


def _numbered(names: Sequence[str]) -> list[str]:
    """Add a number to names that are still equal: those of names which are not safe, or of one file given twice."""
    taken, result = {folded(name) for name in names}, []
    seen: set[str] = set()
    for name in names:
        new, number = name, 1
        while folded(new) in seen or (new != name and folded(new) in taken):
            number += 1
            new = f"{name}_{number}"
        seen.add(folded(new))
        result.append(new)
    return result
