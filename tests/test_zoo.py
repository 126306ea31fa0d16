"""The packaged bundle in a fresh environment that has only what its metadata.json names."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from medsegdiff_monai.package import NAME, package_bundle

from .conftest import ROOT, make_nifti_dataset

SCHEMA = ROOT / "tests" / "data" / "meta_schema_20240725.json"
LINTERS = ["black", "isort", "flake8", "flake8-bugbear", "flake8-comprehensions", "flake8-executable", "pep8-naming"]
# the zoo's list, and what MONAI's own adds to it
FLAKE8 = [
    "--select=B,C,E,F,N,P,T4,W,B9", "--max-line-length=120",
    "--ignore=E203,E501,E741,W503,W504,C408,N812,B023,B905,B028,B907,B908",
    "--per-file-ignores=__init__.py:F401,__main__.py:F401",
]  # fmt: skip
SMALL = {  # what makes the README's commands short: a tiny network to train, one case to segment
    "training": ["--max_epochs", "1", "--channels", "[8,8]", "--num_res_blocks", "1", "--roi_size", "[16,16,16]"],
    "evaluating": ["--eval_split", "test"],
    "inference": ["--overwrite", "true"],
}

pytestmark = pytest.mark.slow


def run(command: list[str | Path], cwd: Path, **variables: str) -> str:
    """Run a command without what this environment adds to Python's path; returns what it printed."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"PYTHONUTF8": "1"} | variables
    done = subprocess.run(list(map(str, command)), cwd=cwd, env=environment, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, f"{shlex.join(map(str, command))}\n{done.stdout[-1000:]}\n{done.stderr[-3000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle, from its zip, alone in an empty folder, whose path has a space."""
    tmp = tmp_path_factory.mktemp("dist")
    digest = hashlib.sha256((ROOT / "bundle" / "models" / "model.pt").read_bytes()).hexdigest()
    record = {"data": "Hippocampus3D", "method": "shipped", "sha256": digest, "dice": 0.5}
    (tmp / "results.jsonl").write_text(json.dumps(record))
    _, archive = package_bundle(str(tmp), str(ROOT / "bundle"), str(tmp / "results.jsonl"))
    empty = tmp_path_factory.mktemp("empty folder")
    with zipfile.ZipFile(archive) as file:
        file.extractall(empty)
    return empty / NAME


def fresh(place: Path, packages: list[str]) -> Path:
    """Python of a new environment with packages."""
    subprocess.run([sys.executable, "-m", "venv", place], check=True)
    python = next(p for p in (place / "bin" / "python", place / "Scripts" / "python.exe") if p.exists())
    probe = subprocess.run([python, "-m", "pip", "install", "-q", packages[-1]], capture_output=True, encoding="utf-8")
    if probe.returncode:
        pytest.skip(f"pip has no index: {probe.stderr[-200:]}")
    run([python, "-m", "pip", "install", "-q", *packages], place)
    return python


@pytest.fixture(scope="module")
def python(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment."""
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    named = {
        "monai": metadata["monai_version"],
        "torch": metadata["pytorch_version"],
        "numpy": metadata["numpy_version"],
    }
    lines = [f"{name}=={version}" for name, version in {**named, **metadata["required_packages_version"]}.items()]
    return fresh(tmp_path_factory.mktemp("venv"), lines)


@pytest.fixture(scope="module")
def torch_alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Python of a fresh environment with torch and what torch needs."""
    metadata = json.loads((folder / "configs" / "metadata.json").read_text())
    return fresh(tmp_path_factory.mktemp("torch"), [f"torch=={metadata['pytorch_version']}"])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_nifti_dataset(tmp_path_factory.mktemp("data"), (30, 40, 34), affine=np.eye(4))


def readme_commands(folder: Path) -> list[list[str]]:
    """The commands of the bundle's README that take one process."""
    lines = re.findall(r"^python .+$", (folder / "docs" / "README.md").read_text(), re.MULTILINE)
    return [shlex.split(line)[1:] for line in lines]


def test_commands_of_its_readme(folder, python, data, tmp_path):
    commands = readme_commands(folder)
    assert [c[3] if c[1] == "monai.bundle" else c[2] for c in commands] == [
        "training", "evaluating", "inference", "network_def", "export", "export", "inference"
    ]  # fmt: skip
    for i, command in enumerate(commands):
        out = tmp_path / str(i)
        command = [{"DIR": str(data), "OUT": str(out)}.get(word, word) for word in command]
        if command[3] in SMALL:
            command += [*SMALL[command[3]], "--device", "cpu"]
        if command[3] == "training":
            command += ["--ckpt_dir", str(tmp_path / "models"), "--output_dir", str(out)]
        run([python, *command], folder)
    assert (tmp_path / "models" / "model.pt").is_file()
    assert "image_4" in (folder / "eval" / "cases.csv").read_text()
    for number in ("2", "6"):  # the second with TensorRT, where there is one
        assert nib.load(tmp_path / number / "image_4" / "image_4_seg.nii.gz").shape == (30, 40, 34)
    assert (folder / "models" / "model.ts").is_file() and (folder / "segmenter.onnx").is_file()
    shape = "import torch; print(list(torch.jit.load('segmenter.ts')(torch.zeros(1, 1, 40, 50, 21)).shape))"
    assert run([python, "-I", "-c", shape], folder) == "[1, 2, 40, 50, 21]\n"


def test_checks_of_the_zoo(folder, python, tmp_path):
    """Metadata, shapes and TorchScript, without being excluded from any; ONNX; loading; all with the code inside."""
    meta = ["--meta_file", "configs/metadata.json"]
    config = ["--config_file", "configs/inference.json"]
    weights = ["--ckpt_file", "models/model.pt"]
    run([python, "-m", "monai.bundle", "verify_metadata", *meta, "--filepath", SCHEMA], folder)
    run([python, "-m", "monai.bundle", "verify_net_in_out", "network_def", *meta, *config, "--device", "cpu"], folder)
    for kind, name in (("ckpt_export", "model.ts"), ("onnx_export", "model.onnx")):
        out = tmp_path / name
        run([python, "-m", "monai.bundle", kind, "network_def", "--filepath", out, *weights, *meta, *config], folder)
        assert out.stat().st_size > 10**5
    script = (
        "import medsegdiff_monai, monai, torch\n"
        f"network = monai.bundle.load('{NAME}', bundle_dir='..', device='cpu').eval()\n"
        f"script = torch.jit.load('{(tmp_path / 'model.ts').as_posix()}')\n"
        "image = torch.rand(1, 1, 32, 48, 32)\n"
        "torch.testing.assert_close(network(image), script(image), atol=1e-4, rtol=0)\n"
        "print(medsegdiff_monai.__file__)"
    )
    assert run([python, "-c", script], folder).splitlines()[-1] == str(folder / "medsegdiff_monai" / "__init__.py")


def test_workflow_from_python(folder, python, data, tmp_path):
    """MONAI's ``ConfigWorkflow``, as applications run a bundle."""
    script = (
        "from monai.bundle import ConfigWorkflow\n"
        f"settings = {{'dataset_dir': {str(data)!r}, 'output_dir': {str(tmp_path)!r}, 'device': 'cpu'}}\n"
        "one = ConfigWorkflow('configs/inference.json', meta_file='configs/metadata.json', workflow_type='infer',\n"
        "                     bundle_root='.', logging_file=False, **settings)\n"
        "one.initialize()\n"
        "assert one.check_properties() == []\n"
        "one.run()\n"
        "one.finalize()\n"
    )
    run([python, "-c", script], folder)
    assert nib.load(tmp_path / "image_4" / "image_4_seg.nii.gz").shape == (30, 40, 34)


ALONE = """
import sys
import torch
image = torch.load("image.pt", weights_only=True)
segment = torch.jit.load("alone.ts") if sys.argv[1] == "ts" else torch.export.load("alone.pt2").module()
torch.testing.assert_close(segment(image), torch.load("expected.pt", weights_only=True), atol=2e-3, rtol=0)
assert not {"monai", "medsegdiff_monai", "numpy"} & {name.split(".")[0] for name in sys.modules}
"""
EXPECTED = """
import torch
from monai.bundle import ConfigParser
parser = ConfigParser()
parser.read_config("configs/inference.json")
parser.update({"bundle_root": ".", "device": "cpu"})
network, inferer = parser.get_parsed_content("network_def").eval(), parser.get_parsed_content("inferer")
network.load_state_dict(torch.load("models/model.pt", weights_only=True))
image = torch.randn(1, 1, *inferer.roi_size)
with torch.no_grad():
    members = inferer(inputs=image, network=network).unflatten(1, (-1, network.out_channels))
torch.save(image, "image.pt")
torch.save(network.record(members.mean(1)), "expected.pt")
"""


@pytest.mark.parametrize("kind", ["ts", "pt2"])
def test_exported_file_runs_with_torch_alone(kind, folder, python, torch_alone):
    run([python, "-c", EXPECTED], folder)
    run([python, "-m", "medsegdiff_monai", "export", "--output", f"alone.{kind}"], folder)
    run([torch_alone, "-c", ALONE, kind], folder)


def test_from_elsewhere_with_the_path(folder, python, data, tmp_path):
    command = ["-m", "monai.bundle", "run", "inference", "--config_file", folder / "configs" / "inference.json"]
    command += ["--bundle_root", folder, "--dataset_dir", data, "--output_dir", tmp_path / "out", "--device", "cpu"]
    (tmp_path / "here").mkdir()
    run([python, *command], tmp_path / "here", PYTHONPATH=str(folder))
    assert (tmp_path / "out" / "image_4" / "image_4_seg.nii.gz").is_file()


def test_format_and_lint_of_the_zoo(folder, python):
    run([python, "-m", "pip", "install", "-q", *LINTERS], folder)
    code = "medsegdiff_monai"
    run([python, "-m", "black", "--check", "--skip-magic-trailing-comma", "--line-length", "120", code], folder)
    run([python, "-m", "isort", "--check", "--profile", "black", "--line-length", "120", code], folder)
    run([python, "-m", "flake8", *FLAKE8, code], folder)
