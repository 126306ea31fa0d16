"""The cost of starting, reading and writing is measured and written down; figures of so little mean nothing."""

from __future__ import annotations

import sys

import torch

from benchmarks import startup


def test_ratios_are_measured_and_written(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(startup, "cpu_seconds", lambda words: asked.append(words) or len(asked) % 3 + 1)
    monkeypatch.setattr(startup, "PASSES", 1)
    threads, original = torch.get_num_threads(), startup.per_picture
    small = {"channels": [8, 8], "num_res_blocks": 1, "roi_size": [16, 16]}
    monkeypatch.setattr(startup, "per_picture", lambda number, iterations: original(number, 2, **small))
    words = ["startup", "--rounds", "2", "--pictures", "3", "--output", str(tmp_path / "startup.md")]
    monkeypatch.setattr(sys, "argv", words)
    startup.main()
    torch.set_num_threads(threads)
    rows = [line.split(" | ") for line in (tmp_path / "startup.md").read_text("utf-8").splitlines()[6:]]
    assert [float(row[2].strip(" |")) for row in rows[:2]] == [1.5, 0.5]  # of 2, 3 and 1 seconds
    assert [row[0].strip("| ") for row in rows] == [
        "`--help`", "`segment` of one volume", *["`segment` of a folder of 3 pictures, each"] * 2
    ]  # fmt: skip
    assert all(float(row[2].strip(" |")) > 0 for row in rows[2:])


def test_cpu_time_is_that_of_the_command_alone():
    idle, busy = (startup.cpu_seconds(["-c", f"for _ in range({n}): sum(range(1000))"]) for n in (1, 100_000))
    assert 0 < idle < busy


def test_a_fitted_network_finds_the_discs():
    images, masks = startup.discs(4)
    parser = startup.read_config(startup.CONFIG, bundle_root="", in_channels=1, num_classes=1, channels=[8, 8])
    torch.manual_seed(0)
    network = startup.fitted(parser.get_parsed_content("network_def"), images, masks, 30)
    picture = torch.tensor(images, dtype=torch.float32)[:, None]
    with torch.no_grad():
        found = network(torch.randn(picture.shape), torch.full((4,), 999.0), (picture - picture.mean()) / picture.std())
    mask = found[:, 0].numpy() > 0
    assert (mask & masks).sum() > 0.6 * (mask | masks).sum()
