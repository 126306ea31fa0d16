"""The package in layers, without upward imports or circles, and in short parts."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import medsegdiff_monai

PACKAGE = Path(medsegdiff_monai.__file__).parent
LAYERS = (
    "cli distributed errors files journal kinds nifti outputs running settings variables",
    "networks schedulers",
    "deep_ensemble engines ensembles fusion grading inferers metrics objective panels pictures structures weights "
    "windows",
    "cleanup data raters transforms",
    "cases handlers report results rows",
    "__init__ __main__ configs demo export package segmenter workflow",
)


def modules() -> dict[str, Path]:
    """The files of the package by their dotted names in it."""
    return {".".join(file.relative_to(PACKAGE).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


def imports(name: str, file: Path) -> Iterator[str]:
    """Names of what a module imports from the package, inside functions, too."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            inside = name.split(".")[: -node.level] + (node.module or "").split(".")
            for alias in node.names:
                whole = ".".join([part for part in inside if part] + [alias.name])
                known = [n for n in (whole, whole.rpartition(".")[0]) if n in modules()]
                yield known[0] if known else f"{whole.rpartition('.')[0]}.__init__".lstrip(".")


def layer(name: str) -> int:
    return next(i for i, names in enumerate(LAYERS) if name.split(".")[0] in names.split())


@pytest.mark.parametrize("name", sorted(modules()))
def test_no_import_runs_upwards(name: str) -> None:
    file = modules()[name]
    upwards = [other for other in imports(name, file) if layer(other) > layer(name)]
    assert not upwards, f"{name} imports {', '.join(upwards)}"


def test_no_imports_run_in_a_circle() -> None:
    graph = {name: {n for n in imports(name, file) if n != name} for name, file in modules().items()}
    TopologicalSorter(graph).prepare()


def test_functions_and_files_are_short() -> None:
    """From the first line of a signature to the end, docstrings included."""
    lengths = {}
    for name, file in modules().items():
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400, file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                lengths[f"{name}.{node.name}:{node.lineno}"] = (node.end_lineno or 0) - node.lineno + 1
    assert median(lengths.values()) <= 10
    assert not {where: length for where, length in lengths.items() if length > 60}


def test_every_module_has_a_layer_and_every_name_a_module() -> None:
    top = {name.split(".")[0] for name in modules()}
    assert sorted(top) == sorted(" ".join(LAYERS).split())
