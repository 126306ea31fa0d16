"""The report that a person reads: what is in it, that it is one safe file, and how it behaves in a browser."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsegdiff_monai.grading import ReliabilityCounts
from medsegdiff_monai.outputs import result_file
from medsegdiff_monai.report.page import MAX_BEST, MAX_FLAGGED, MAX_WORST, write_report
from medsegdiff_monai.report.summary import summary_lines

EVIL = "<script>alert(1)</script>\"'&"


def made_rows(count: int = 12, names: tuple[str, ...] = ("disc", "cup"), scored: bool = True) -> list[dict[str, Any]]:
    """Cases c0, c1, ... from the worst to the best; every fifth is flagged."""
    rows = []
    for i in range(count):
        dice = (i + 1) / (count + 1)
        row: dict[str, Any] = {"case": f"c{i}", "flag": "low expected Dice of disc (0.40)" if i % 5 == 0 else ""}
        for k, name in enumerate(names):
            row |= {f"expected_dice_{name}": 0.4 + 0.5 * dice + 0.01 * k, f"area_px_{name}": 100.0 + i}
            if scored:
                row |= {f"dice_{name}": dice, f"hd95_{name}": 10 * (1 - dice), f"nsd_{name}": dice}
        rows.append(row)
    return rows


def draw_pictures(folder: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        file = result_file(folder, row["case"], "overlay.png")
        file.parent.mkdir(parents=True)
        Image.fromarray(np.full((30, 60, 3), 90, np.uint8)).save(file)


class Page(HTMLParser):
    """Tags with their attributes, and the text outside of style and script."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.content = file.read_text(encoding="utf-8")
        self.feed(self.content)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] not in ("style", "script"):
            self.text += f" {data}"

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(self.text.split())


def test_the_report_is_one_file_that_fetches_nothing(tmp_path: Path) -> None:
    rows = made_rows()
    draw_pictures(tmp_path, rows)
    page = Page(write_report(rows, tmp_path, ["disc", "cup"]))
    assert page.content.lstrip().startswith("<!DOCTYPE html>")
    assert all(str(image["src"]).startswith("data:image/jpeg;base64,") for image in page.all("img"))
    assert not page.all("link") and not any("src" in script for script in page.all("script"))
    assert "default-src 'none'" in str(page.all("meta")[2]["content"])
    assert "http" not in re.sub(r'content="[^"]*"|http-equiv', "", page.content)


def test_each_picture_is_embedded_once_and_others_are_linked(tmp_path: Path) -> None:
    rows = made_rows(40)
    draw_pictures(tmp_path, rows)
    page = Page(write_report(rows, tmp_path, ["disc", "cup"]))
    shown = [str(image["alt"]).removeprefix("picture of ") for image in page.all("img")]
    flagged = [f"c{i}" for i in range(0, 40, 5)]
    assert shown[: len(flagged)] == flagged
    assert set(shown) == {*flagged, *(f"c{i}" for i in range(MAX_WORST)), *(f"c{39 - i}" for i in range(MAX_BEST))}
    assert len(shown) == len(set(shown))
    links = [str(a["href"]) for a in page.all("a")]
    assert "c20/c20_overlay.png" in links and all((tmp_path / link).exists() for link in links if "/" in link)
    anchors = {figure["id"] for figure in page.all("figure") if "id" in figure}
    assert {link[1:] for link in links if link.startswith("#")} <= anchors


def test_of_many_flagged_cases_the_rest_is_linked(tmp_path: Path) -> None:
    rows = [{**row, "flag": "far from the training"} for row in made_rows(MAX_FLAGGED + 30)]
    draw_pictures(tmp_path, rows)
    page = Page(write_report(rows, tmp_path, ["disc", "cup"]))
    assert f"Flagged: {len(rows)} of {len(rows)} cases" in page.words
    assert len(page.all("img")) == MAX_FLAGGED + MAX_BEST
    assert f"Flagged, too: c{MAX_FLAGGED} , c{MAX_FLAGGED + 1} , " in page.words


def test_scores_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = made_rows(3, ("disc",))
    for row, dice in zip(rows, (0.2, 0.6, 0.9)):
        row["dice_disc"] = dice
    rows[0]["hd95_disc"] = float("inf")
    page = Page(write_report(rows, tmp_path, ["disc"], tolerance=2))
    assert "disc 3 0.567 0.600 33% 5.00 0.500" in page.words
    assert "mean NSD (2 px)" in page.words and "median HD95 (px)" in page.words
    assert "mean over classes" not in page.words
    assert "∞" in page.words


def test_rows_as_a_table_holds_them_give_the_same_page(tmp_path: Path) -> None:
    rows = made_rows()
    texts = [{key: str(value) for key, value in row.items()} for row in rows]
    pages = [write_report(some, tmp_path / name, ["disc", "cup"]) for name, some in (("a", rows), ("b", texts))]
    assert pages[0].read_text() == pages[1].read_text()


def test_without_labels_expected_scores_take_their_place(tmp_path: Path) -> None:
    page = Page(write_report(made_rows(scored=False), tmp_path, ["disc", "cup"]))
    assert "Expected scores" in page.words and "Worst cases, by expected Dice" in page.words
    assert "12 cases, without labels." in page.words
    for word in ("AURC", "HD95", "NSD", "Do the probabilities"):
        assert word not in page.words


@pytest.mark.parametrize(
    ("split", "chose", "words"),
    [
        ("validation", True, "chose the weights"),
        ("validation", False, None),
        ("training", False, "were trained on these cases"),
        ("test", False, None),
    ],
)
def test_the_list_is_named_and_a_biased_one_is_warned_of(
    tmp_path: Path, split: str, chose: bool, words: str | None
) -> None:
    rows = made_rows()
    page = Page(write_report(rows, tmp_path, ["disc", "cup"], split=split, chose_weights=chose))
    log = " ".join(summary_lines(rows, ["disc", "cup"], split=split, chose_weights=chose))
    for text in (page.words, log):
        assert split in text
        assert (words in text) if words else ("the weights" not in text)


def test_names_cannot_bring_in_html(tmp_path: Path) -> None:
    rows = made_rows(2, (EVIL,))
    rows[0] |= {"case": EVIL.replace("/", "_"), "flag": f"{EVIL} is empty", "source": EVIL}
    structure = {
        "case": EVIL, "class": EVIL, "structure": 1, "kind": "possible miss", "size": 3.0, "unit": "px",
        "largest_diameter": 2.0, "centre_voxel": "1.0 2.0", "centre_mm": "", "mean_probability": 0.3,
        "share_of_members": 0.4,
    }  # fmt: skip
    page = Page(write_report(rows, tmp_path, [EVIL], structures=[structure], title=EVIL))
    assert len(page.all("script")) == 1
    assert "alert(1)" in page.text
    assert all(set(attributes) <= {"class", "data-sort"} for attributes in page.all("th"))


def test_names_and_links_take_any_character(tmp_path: Path) -> None:
    rows = made_rows(1, ("a",))
    rows[0]["case"] = "ä b%20#?\udcff"
    file = result_file(tmp_path, rows[0]["case"], "overlay.png")
    file.parent.mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(file)
    page = Page(write_report(rows, tmp_path, ["a"]))
    assert "#" not in str(page.all("a")[1]["href"]) and "?" not in str(page.all("a")[1]["href"])


def test_reliability_is_drawn_before_and_after(tmp_path: Path) -> None:
    counts = ReliabilityCounts(1)
    probability = torch.rand(1, 50, 50, generator=torch.Generator().manual_seed(0))
    counts.add(probability, (torch.rand(1, 50, 50) < probability).float())
    states = {"before calibration": counts.counts, "after calibration": counts.counts}
    page = Page(write_report(made_rows(), tmp_path, ["disc"], reliability=states))
    points = [title for title in re.findall(r"<title>(.*?)</title>", page.content) if "voxels" in title]
    assert len(points) == 20
    for point in points:
        stated, true = re.search(r"([\d.]+) stated, ([\d.]+) true", point).groups()
        assert float(stated) == pytest.approx(float(true), abs=0.15)
    assert "after calibration" in page.words


def test_empty_and_odd_tables_make_a_page(tmp_path: Path) -> None:
    write_report([], tmp_path / "none", ["a"])
    page = Page(write_report([{"case": "x"}], tmp_path / "bare", ["a"]))
    assert "Cases were not flagged." in page.words
    result_file(tmp_path / "broken", "c0", "overlay.png").parent.mkdir(parents=True)
    result_file(tmp_path / "broken", "c0", "overlay.png").write_bytes(b"no picture")
    page = Page(write_report(made_rows(1), tmp_path / "broken", ["disc", "cup"]))
    assert "There is no picture of this case." in page.words


def test_the_log_has_an_aligned_table_and_the_worst_cases() -> None:
    names = [f"class_{i}" for i in range(7)] + ["left atrial appendage"]
    lines = summary_lines(made_rows(12, tuple(names)), names, report="out/report.html", split="test")
    head = next(i for i, line in enumerate(lines) if line.startswith("class "))
    table = lines[head : head + 9]
    assert len({len(line) for line in table}) == 1
    assert table[-1].split() == ["left", "atrial", "appendage", "0.500", "0.500", "50%", "5.00"]
    assert lines[0] == "Scored: 12 cases of the list 'test'."
    assert "Worst: c0 (Dice 0.077), c1 (Dice 0.154), c2 (Dice 0.231)." in lines
    assert "Flagged for review: 3 of 12 cases." in lines and lines[-1] == "Report: out/report.html"


def test_the_log_says_nothing_of_columns_that_are_not_there() -> None:
    rows = [{"case": "a", "dice_x": "0.5"}, {"case": "b", "dice_x": ""}]
    lines = summary_lines(rows, ["x"])
    assert lines == [
        "Scored: 2 cases.", "class  mean Dice  median  below 0.5", "x          0.500   0.500         0%",
        "Worst: a (Dice 0.500).",
    ]  # fmt: skip
    assert summary_lines([{"case": "a"}], ["x"]) == ["Segmented: 1 case."]


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
WATCH = """<script>
const problems = [];
addEventListener('error', e => problems.push(e.message));
addEventListener('securitypolicyviolation', e => problems.push(e.violatedDirective));
</script>"""
USE = """<script>
document.documentElement.style.width = 'WIDTHpx';  // a window cannot be narrower than 500
const shownRows = () => [...document.querySelectorAll('#cases tbody tr')].filter(row => !row.hidden);
const column = i => shownRows().map(row => row.cells[i].textContent);
const heads = [...document.querySelectorAll('#cases th')];
const at = text => heads.findIndex(h => h.textContent === text);
const click = i => { heads[i].querySelector('button').click(); return column(i); };
const found = {width: document.body.scrollWidth};
found.rising = click(at('Dice disc'));
found.falling = click(at('Dice disc'));
found.names = click(0);
filter.value = 'LOW disc';
filter.dispatchEvent(new Event('input'));
found.filtered = column(0);
found.shown = document.querySelector('#shown').textContent;
found.images = [...document.images].every(i => i.naturalWidth > 0);
found.problems = problems;
document.body.dataset.found = JSON.stringify(found);
</script></body>"""


@pytest.mark.skipif(BROWSER is None, reason="there is no Chromium or Chrome")
@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_works_in_a_browser(tmp_path: Path, width: int) -> None:
    rows = made_rows()
    rows[3]["dice_disc"] = ""
    draw_pictures(tmp_path, rows)
    file = write_report(rows, tmp_path, ["disc", "cup"], split="test")
    content = file.read_text(encoding="utf-8")
    used = content.replace("<head>", f"<head>{WATCH}", 1).replace("</body>", USE.replace("WIDTH", str(width)), 1)
    file.write_text(used, encoding="utf-8")
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--enable-logging=stderr"]
    options += [f"--user-data-dir={tmp_path / 'profile'}", "--window-size=1280,900", "--dump-dom", file.as_uri()]
    done = subprocess.run([str(BROWSER), *options], capture_output=True, text=True, timeout=120)
    body = next(attributes for tag, attributes in _tags(done.stdout, tmp_path) if tag == "body")
    found = json.loads(str(body["data-found"]))
    assert found["problems"] == [] and "CONSOLE" not in done.stderr
    assert found["width"] <= width  # wide tables and pictures scroll by themselves
    rising = [float(text) for text in found["rising"] if text]
    assert rising == sorted(rising) and found["rising"][-1] == ""
    assert [float(t) for t in found["falling"] if t] == rising[::-1] and found["falling"][-1] == ""
    assert found["names"] == [f"c{i}" for i in range(12)]  # c10 after c9
    assert found["filtered"] == ["c0", "c5", "c10"] and found["shown"] == "3"
    assert found["images"]


def _tags(content: str, folder: Path) -> list[tuple[str, dict[str, str | None]]]:
    (folder / "seen.html").write_text(content, encoding="utf-8")
    return Page(folder / "seen.html").tags


@pytest.mark.parametrize("scored", [True, False])
def test_an_expected_dice_without_an_interval_is_called_a_rough_guess(tmp_path: Path, scored: bool) -> None:
    names = ["disc", "cup"]
    rows = made_rows(3, ("disc", "cup"), scored)
    half = [{**row, "expected_dice_low_disc": 0.3} for row in rows]
    both = [{**row, "expected_dice_low_cup": 0.3} for row in half]
    unknown = [{"case": "a", "dice_disc": 0.5}]
    told = {"The expected Dice is a rough guess": rows, "The expected Dice of cup is a rough guess": [*half, *both]}
    for text, table in told.items():
        assert text in Page(write_report(table, tmp_path, names)).words
        assert text in " ".join(summary_lines(table, names))
    for table in (both, unknown):
        assert "rough guess" not in Page(write_report(table, tmp_path, names)).words + str(summary_lines(table, names))


def test_scores_against_several_raters_are_explained(tmp_path: Path) -> None:
    rows = made_rows(3)
    write_report(rows, tmp_path, ["disc", "cup"])
    assert "as raters do" not in Page(tmp_path / "report.html").words
    for row, ged in zip(rows, (0.2, 0.4, math.nan)):
        row |= {"ged_disc": ged, "best_iou_cup": 0.7}
    write_report(rows, tmp_path, ["disc", "cup"])
    words = Page(tmp_path / "report.html").words
    assert "Do masks differ as raters do?" in words
    assert "lower is better; 0: drawn alike) of disc 0.300 0.100 2" in words
    assert "best mask (higher is better) of cup 0.700 0.000 3" in words
