"""The bundle as the model zoo takes it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from monai.bundle import verify_metadata

from medsegdiff_monai import __version__, package
from medsegdiff_monai.__main__ import package as command
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.package import NAME, package_bundle

from .conftest import ROOT
from .test_export import write_weights

SCHEMA = str(ROOT / "tests" / "data" / "meta_schema_20240725.json")
OTHERS = [
    {"data": "Hippocampus3D", "method": "baseline", "dice": 0.1},
    {"data": "LGG_MRI", "method": "shipped", "dice": 0.2},
    {"data": "Hippocampus3D", "method": "shipped", "dice": 0.3, "note": "measured again since"},
]
RECORD = {
    "data": "sets/Hippocampus3D", "method": "shipped", "seed": 0, "seconds": 3500.0, "dice": [0.9, 0.868],
    "hd95": [1.5, float("nan")], "ece": {"anterior": 0.003, "posterior": 0.004}, "cases": 40,
}  # fmt: skip


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> bytes:
    """Weights that the configs load as they are."""
    write_weights(file := tmp_path_factory.mktemp("weights") / "model.pt", {})
    return file.read_bytes()


@pytest.fixture
def root(tmp_path: Path, weights: bytes) -> Path:
    """The real bundle, and what training, evaluation and editors leave in it."""
    bundle = tmp_path / "project" / "bundle"
    for part in ("configs", "docs"):
        shutil.copytree(ROOT / "bundle" / part, bundle / part)
    shutil.copy(ROOT / "bundle" / "LICENSE", bundle)
    for name in ("models/model.pt", "models/checkpoint_epoch=1.pt", "train/history.csv", "configs/.train.json.swp"):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(weights if name == "models/model.pt" else b"left")
    write_results(bundle, *OTHERS, measured(weights))
    return bundle


def measured(weights: bytes, **more: object) -> dict:
    """What the results hold of weights."""
    return {**RECORD, "sha256": hashlib.sha256(weights).hexdigest(), **more}


def write_results(bundle: Path, *records: dict) -> Path:
    file = bundle.parent / "benchmarks" / "results.jsonl"
    file.parent.mkdir(exist_ok=True)
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    return file


def contents(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_holds_the_bundle_and_this_code_and_nothing_else(root, tmp_path, capsys):
    command(str(tmp_path / "dist"), bundle_root=str(root))
    folder, archive = map(Path, capsys.readouterr().out.split())
    assert (folder, archive) == (tmp_path / "dist" / NAME, tmp_path / "dist" / f"{NAME}_v{__version__}.zip")
    files = contents(folder)
    parts = [p for kind in ("*.py", "*.html") for p in (ROOT / "medsegdiff_monai").rglob(kind)]
    code = {p.relative_to(ROOT).as_posix() for p in parts}
    own = {f"{part}/{name}" for part in ("configs", "docs") for name in contents(root / part) if ".swp" not in name}
    own -= {"configs/datasets/lidc.json"}  # it names weights that the package does not hold
    assert set(files) == code | own | {"LICENSE", "models/model.pt"}
    for name in code | own - {"configs/metadata.json", "docs/README.md"}:
        source = (ROOT / name if name in code else root / name).read_bytes()
        if name.endswith(".json"):
            assert files[name].decode() == json.dumps(json.loads(source), indent=4) + "\n"  # the zoo's layout
        else:
            assert files[name] == source, name
    with zipfile.ZipFile(archive) as file:
        assert {i.filename: file.read(i) for i in file.infolist()} == {f"{NAME}/{k}": v for k, v in files.items()}
    assert sorted(p.name for p in (tmp_path / "dist").iterdir()) == sorted([NAME, archive.name])


def test_is_the_same_byte_for_byte(root, tmp_path):
    _, first = package_bundle(str(tmp_path / "first"), str(root))
    for file in root.rglob("*"):
        os.utime(file, (10**9, 10**9))
        file.chmod(0o755)
    _, second = package_bundle(str(tmp_path / "second"), str(root))
    assert first.read_bytes() == second.read_bytes()
    package_bundle(str(tmp_path / "second"), str(root))  # over the earlier one
    assert first.read_bytes() == second.read_bytes()


def test_scores_are_those_measured(root, weights, tmp_path):
    folder, _ = package_bundle(str(tmp_path), str(root))
    verify_metadata(meta_file=str(folder / "configs" / "metadata.json"), filepath=SCHEMA)
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"] == {
        "mean_dice": 0.884, "dice_anterior": 0.9, "dice_posterior": 0.868, "hd95_anterior": 1.5,
        "mean_expected_calibration_error": 0.0035,
        "expected_calibration_error_anterior": 0.003, "expected_calibration_error_posterior": 0.004,
    }  # fmt: skip
    assert metadata["version"] == __version__ and metadata["version"] in metadata["changelog"]
    assert metadata["schema"].endswith("meta_schema_20240725.json") and metadata["intended_use"]
    readme = (folder / "docs" / "README.md").read_text()
    assert (
        "| dice anterior | 0.900 |" in readme and "One run (seed: 0, seconds of training: 3500.0, cases: 40)." in readme
    )
    assert hashlib.sha256(weights).hexdigest() in readme


def test_scores_may_be_few_or_of_another_form(root, weights, tmp_path):
    digest = hashlib.sha256(weights).hexdigest()
    record = {
        "sha256": digest,
        "data": "Hippocampus3D",
        "method": "shipped",
        "dice": 0.88,
        "dice_per_class": [0.9, 0.8],
        "ece": 0.004,
    }
    (tmp_path / "other.jsonl").write_text(json.dumps(record))
    folder, _ = package_bundle(str(tmp_path), str(root), str(tmp_path / "other.jsonl"))
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    assert metadata["eval_metrics"] == {
        "mean_dice": 0.88, "dice_anterior": 0.9, "dice_posterior": 0.8, "mean_expected_calibration_error": 0.004
    }  # fmt: skip


def test_readme_follows_the_template_of_the_zoo():
    titles = re.findall(r"^##+ \*\*(.+)\*\*$", (ROOT / "bundle" / "docs" / "README.md").read_text(), re.MULTILINE)
    assert titles == [
        "Authors", "Tags", "Model Description", "Data", "Preprocessing", "Performance", "Additional Usage Steps",
        "System Configuration", "Limitations", "Citation Info", "References",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda root: write_results(root, *OTHERS[:2]), r"no record of method shipped on data Hippocampus3D"),
        (lambda root: write_results(root, {**RECORD, "dice": None}), r'shipped has no "dice"'),
        (lambda root: (root.parent / "benchmarks" / "results.jsonl").unlink(), r"results\.jsonl: no results: measure"),
        (lambda root: (root.parent / "benchmarks" / "results.jsonl").write_text("{"), r"cannot be read as JSON"),
        (lambda root: (root / "models" / "model.pt").unlink(), r"model\.pt: no weights to package"),
        (
            lambda root: (root / "models" / "model.pt").write_bytes((root / "models" / "model.pt").read_bytes()[:-9]),
            r"model\.pt: is truncated",
        ),
        (
            lambda root: torch.save({"a": torch.zeros(1)}, root / "models" / "model.pt"),
            r"model\.pt: weights of another",
        ),
        (lambda root: (root / "configs" / "metadata.json").unlink(), r"is not a bundle: give --bundle_root DIR"),
        (lambda root: (root.parents[1] / "dist").write_text(""), r"\.zip: cannot be written \("),
        (lambda root: (root / "docs" / "README.md").write_text("# Title"), r"README\.md: lacks the line <!-- measured"),
        (
            lambda root: (root / "configs" / "metadata.json").write_text('{"version": "9"}'),
            r"'9' is missing in changelog",
        ),
    ],
)
def test_what_is_missing_is_named_before_anything_is_written(root, tmp_path, spoil, message):
    spoil(root)
    with pytest.raises(InputError, match=message):
        package_bundle(str(tmp_path / "dist"), str(root))
    assert not (tmp_path / "dist").is_dir()


def test_large_weights_are_left_to_a_download(root, weights, tmp_path, monkeypatch):
    monkeypatch.setattr(package, "MAX_BYTES", 3)
    with pytest.raises(InputError, match=r"--weights_url URL"):
        package_bundle(str(tmp_path / "dist"), str(root))
    folder, _ = package_bundle(str(tmp_path / "dist"), str(root), weights_url="https://example.org/model.pt?a=1")
    assert not (folder / "models").exists()
    (entry,) = json.loads((folder / "large_files.yml").read_text())["large_files"]  # JSON is YAML
    digest = hashlib.sha256(weights).hexdigest()
    url = "https://example.org/model.pt?a=1"
    assert entry == {"path": "models/model.pt", "url": url, "hash_val": digest, "hash_type": "sha256"}


@pytest.mark.parametrize(
    ("start", "path", "expected"),
    [("bundle", ["installed"], "bundle"), ("elsewhere", ["bundle", "installed"], "bundle"),
     ("elsewhere", ["installed"], "installed")],
)  # fmt: skip
def test_own_code_runs_where_another_is_installed(root, tmp_path, start, path, expected):
    """Within the folder, or with it on the path, as its README says; the installed one is later on Python's path."""
    folder, _ = package_bundle(str(tmp_path / "dist"), str(root))
    places = {"bundle": folder, "installed": tmp_path / "installed", "elsewhere": tmp_path / "elsewhere"}
    shutil.copytree(ROOT / "medsegdiff_monai", places["installed"] / "medsegdiff_monai")
    places["elsewhere"].mkdir()
    told = subprocess.run(
        [sys.executable, "-m", "monai.bundle", "run", "told", "--config_file", folder / "configs" / "inference.json",
         "--bundle_root", folder, "--told", "$print('from', medsegdiff_monai.__file__)"],
        cwd=places[start], env={**os.environ, "PYTHONPATH": os.pathsep.join(str(places[name]) for name in path)},
        check=True, capture_output=True, encoding="utf-8",
    ).stdout  # fmt: skip
    assert f"from {places[expected] / 'medsegdiff_monai' / '__init__.py'}" in told


@pytest.mark.parametrize("foreign", ["models/checkpoint_epoch=3.pt", "notes.txt", ""])
def test_what_no_package_has_written_is_left_alone(root, tmp_path, foreign):
    target = tmp_path / "dist" / NAME / foreign
    target.parent.mkdir(parents=True)
    target.write_text("mine")
    with pytest.raises(InputError, match=r"is not an earlier package.*move it away"):
        package_bundle(str(tmp_path / "dist"), str(root))
    assert target.read_text() == "mine" and len(list((tmp_path / "dist").iterdir())) == 1


def test_a_failure_leaves_the_earlier_package(root, tmp_path, monkeypatch):
    package_bundle(str(tmp_path / "dist"), str(root))
    before = contents(tmp_path / "dist")

    def fail(path: Path, content: bytes) -> None:
        if Path(path).name == "README.md":
            raise OSError("disk full")
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content)

    monkeypatch.setattr(package, "write_atomically", fail)
    (root / "LICENSE").write_text("other")
    with pytest.raises(InputError, match=r"cannot be written \(disk full\)"):
        package_bundle(str(tmp_path / "dist"), str(root))
    assert contents(tmp_path / "dist") == before


def test_scores_of_other_weights_are_refused(root, weights, tmp_path):
    for record in ({**RECORD}, measured(weights + b"others")):
        results = write_results(root, record)
        with pytest.raises(InputError, match=f"model.pt: are not the weights whose scores {results} holds"):
            package_bundle(str(tmp_path / "dist"), str(root))
    assert not (tmp_path / "dist").exists()
