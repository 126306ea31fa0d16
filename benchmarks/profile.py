"""Where the time of a start and of one picture goes: ``python -m benchmarks.profile`` writes ``results/profile.md``.

Each command runs in a process of its own with one thread, and is measured in CPU time as a multiple of that of
``python -c "import torch, monai"`` in the same round. ``--before DIR`` measures an earlier version of this repository,
unpacked in that folder, beside it.
"""

from __future__ import annotations

import argparse
import cProfile
import os
import platform
import pstats
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from monai.bundle import ConfigParser
from torch.profiler import ProfilerActivity, profile

from medsegdiff_monai.files import write_atomically

from .accuracy import ROOT
from .peers import CONFIGS

PAGE = ROOT / "benchmarks" / "results" / "profile.md"
FLOOR = "import torch, monai"
MODULE = [sys.executable, "-m", "medsegdiff_monai"]
SHOWN = 12  # rows of a table
CROP, VOLUME = (36, 50, 40), (128, 128, 75)  # of a hippocampus; and what takes many windows


def commands(image: Path, output: Path) -> dict[str, list[str]]:
    """What is measured, by name; the first one is the unit."""
    return {
        FLOOR: [sys.executable, "-c", FLOOR],
        "medsegdiff --help": [*MODULE, "--help"],
        "medsegdiff segment --help": [*MODULE, "segment", "--help"],
        "medsegdiff segment, one hippocampus": [*MODULE, "segment", str(image), "--output_dir", str(output)],
    }


def write_image(folder: Path, shape: Sequence[int] = CROP) -> Path:
    """Noise."""
    path = folder / "scan.nii.gz"
    nib.save(nib.Nifti1Image(np.random.default_rng(0).normal(size=shape).astype(np.float32), np.eye(4)), path)
    return path


def run(words: Sequence[str], tree: Path, **environment: str) -> tuple[float, str]:
    """Run a command with the package of a tree; returns its CPU seconds and what it wrote to stderr."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    more = {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1", **environment}
    done = subprocess.run(words, env={**os.environ, **more}, cwd=tree, capture_output=True, encoding="utf-8")
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr[-2000:]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stderr


def ratios(tree: Path, rounds: int, cache: Path) -> dict[str, float]:
    """CPU time of each command in units of the first, with compiled modules as after an installation."""
    rows: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        with tempfile.TemporaryDirectory() as folder:
            image = write_image(Path(folder))
            environment = {"PYTHONPYCACHEPREFIX": str(cache), "PYTHONDONTWRITEBYTECODE": ""}
            listed = commands(image, Path(folder) / "out").items()
            times = {name: run(words, tree, **environment)[0] for name, words in listed}
        if turn:  # the first one compiles
            for name, seconds in times.items():
                rows.setdefault(name, []).append(seconds / times[FLOOR])
    return {name: statistics.median(values) for name, values in rows.items()}


def import_times(report: str, known: Sequence[str] = ()) -> Counter[str]:
    """Milliseconds of the imports of each package, from what ``-X importtime`` writes.

    Args:
        report: what was written.
        known: modules that do not count.
    """
    times: Counter[str] = Counter()
    for microseconds, module in re.findall(r"^import time:\s+(\d+) \|\s+\d+ \|\s+(\S+)$", report, re.MULTILINE):
        if module not in known:
            times[module.partition(".")[0]] += int(microseconds) / 1000
    return times


def imports(cache: Path) -> Counter[str]:
    """Milliseconds of what ``segment`` imports besides torch and MONAI."""
    with tempfile.TemporaryDirectory() as folder:
        words = commands(write_image(Path(folder)), Path(folder) / "out")["medsegdiff segment, one hippocampus"]
        known = subprocess.check_output(
            [sys.executable, "-c", f"{FLOOR}; import sys; print(*sys.modules)"], encoding="utf-8"
        ).split()
        words = [words[0], "-X", "importtime", *words[1:]]
        return import_times(run(words, ROOT, PYTHONPYCACHEPREFIX=str(cache))[1], known)


def functions(shape: Sequence[int]) -> dict[str, float]:
    """CPU seconds of the package's functions, with what they call, while ``segment`` segments an image."""
    from medsegdiff_monai.__main__ import segment

    profiler = cProfile.Profile(time.process_time)
    with tempfile.TemporaryDirectory() as folder:
        image = write_image(Path(folder), shape)
        profiler.runcall(segment, str(image), output_dir=f"{folder}/out", bundle_root=str(ROOT / "bundle"))
    found: dict[str, float] = {}
    stats: Mapping[tuple[str, int, str], tuple] = pstats.Stats(profiler).stats  # type: ignore[attr-defined]
    for (file, _, name), values in stats.items():
        if "medsegdiff_monai" in file and not name.startswith("<"):
            found[f"{Path(file).stem}.{name}"] = max(values[3], found.get(f"{Path(file).stem}.{name}", 0))
    return dict(sorted(found.items(), key=lambda item: -item[1])[: 2 * SHOWN])


def operators() -> dict[str, float]:
    """Share of the CPU time of torch's operators in one window of five members."""
    parser = ConfigParser()
    parser.read_config(str(CONFIGS / "inference.json"))
    parser.update({"bundle_root": str(ROOT / "bundle"), "device": "cpu"})
    network, inferer = (parser.get_parsed_content(name) for name in ("network_def", "inferer"))
    image = torch.randn(1, 1, *parser.get_parsed_content("field_size"))
    with torch.no_grad():
        inferer(image, network)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            inferer(image, network)
    events = sorted(found.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: event.self_cpu_time_total / total for event in events[:SHOWN]}


def table(heads: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    """Lines of a table of Markdown."""
    lines = [f"| {' | '.join(heads)} |", "|" + " --- |" * len(heads)]
    return [*lines, *(f"| {name} | {' | '.join(cells)} |" for name, cells in rows.items()), ""]


def functions_table(shape: Sequence[int]) -> list[str]:
    """Lines of a table of Markdown, and what it is of."""
    size = " × ".join(map(str, shape))
    head = (
        f"Functions of the package while `segment` segments {size} voxels, with what they call (cProfile, which slows"
    )
    rows = {name: [f"{seconds:.2f}"] for name, seconds in functions(shape).items()}
    return [f"{head} Python down):", "", *table(["function", "CPU s"], rows)]


def main() -> None:
    """Measure, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="folder of an earlier version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=PAGE)
    options = parser.parse_args()
    torch.set_num_threads(1)
    trees = {"before": options.before} if options.before else {}
    with tempfile.TemporaryDirectory() as cache:
        found = {
            name: ratios(tree.resolve(), options.rounds, Path(cache) / name)
            for name, tree in {**trees, "now": ROOT}.items()
        }
        packages = imports(Path(cache) / "now").most_common(SHOWN)
    lines = [
        "# Where the time goes",
        "",
        f"`python -m benchmarks.profile --rounds {options.rounds}`: one thread of {platform.machine()}, torch "
        f"{torch.__version__}; medians.",
        "",
        f'CPU time as a multiple of `python -c "{FLOOR}"`:',
        "",
        *table(["", *found], {name: [f"{found[c][name]:.2f}" for c in found] for name in found["now"]}),
        "What `segment` imports besides torch and MONAI, by package (`-X importtime`):",
        "",
        *table(["package", "ms"], {name: [f"{ms:.0f}"] for name, ms in packages}),
        *(line for shape in (CROP, VOLUME) for line in functions_table(shape)),
        "Operators in one window of five members (torch profiler):",
        "",
        *table(["operator", "share"], {name: [f"{share:.0%}"] for name, share in operators().items()}),
    ]
    write_atomically(options.output, "\n".join(lines).encode())


if __name__ == "__main__":
    main()
