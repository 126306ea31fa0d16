"""What the pages point to is there, and their figures are those of the results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from docs.blocks import BLOCK, fill
from docs.blocks import PAGES as WRITTEN

from .conftest import ROOT

SITE = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SITE, *ROOT.glob("examples/*/*.md")]

# Decimals in prose that are no result: versions, settings, thresholds, and facts about data and machines.
# Whatever else is measured stands in a table that a program has written.
TYPED = {"README.md": {"3.10"}, "benchmarks/results_text.md": {"2.5"}}


def anchors(page: Path) -> set[str]:
    """Of its headings, as GitHub makes them, and those that it names."""
    text = page.read_text(encoding="utf-8")
    titles = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    made = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}
    return made | set(re.findall(r'<a id="([^"]+)">', text))


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8"))
    for path, anchor in links:
        target = (page.parent / path) if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


def test_commands_name_files_that_are_there():
    for page in PAGES:
        named = re.findall(
            r"(?<![\w/])(?:bundle/configs|benchmarks|examples|tests)/[\w/]+\.\w+", page.read_text("utf-8")
        )
        assert all((ROOT / name).exists() for name in named), page


@pytest.mark.parametrize("name", WRITTEN)
def test_parts_of_pages_are_what_results_and_code_make(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    assert BLOCK.search(page)
    assert page == fill(page), f"{name}: write it anew by python -m docs.blocks"


NO_FIGURES = (r"^```.*?^```", r"^    [^\n]*$", r"`[^`]*`", r"\]\([^)]*\)", r"https?://\S+", r"arXiv:?\s?\d+\.\d+")


def typed_decimals(page: Path) -> set[str]:
    """Decimals that somebody has typed: in no written part, code, link or licence, and of no version of three parts."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for pattern in (*NO_FIGURES, r"CC[ -]BY(-SA)? \d\.\d"):
        text = re.sub(pattern, "", text, flags=re.MULTILINE | re.DOTALL)
    return set(re.findall(r"(?<![\w.-])\d+\.\d+(?![\w.]*\d)", text))


@pytest.mark.parametrize(
    "page",
    [ROOT / "README.md", ROOT / "bundle/docs/README.md", ROOT / "benchmarks/results_text.md"]
    + [page for page in SITE if page.name not in ("results.md", "tutorial.md")],  # the one is written, and the other
    ids=lambda p: p.relative_to(ROOT).as_posix(),  # shows what a command has printed, in a block of code
)
def test_no_figure_is_typed_by_hand(page):
    allowed = TYPED.get(page.relative_to(ROOT).as_posix(), set())
    assert typed_decimals(page) == allowed, "link the table of results, or let docs/blocks.py write the figure"


def test_typed_decimals_are_found_wherever_they_stand(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "Dice 0.91, at `0.5`.\n```\n0.92\n```\n| 0.93 |\n<!-- written: shipped -->\n0.94\n<!-- end -->\n"
        "Version 1.2.3 of [a thing](https://a.b/0.95), arXiv 2211.00611. Ends in 0.96.\n\n    0.97\n"
    )
    assert typed_decimals(page) == {"0.91", "0.93", "0.96"}


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built without a warning."""
    pytest.importorskip("sphinx")
    pytest.importorskip("myst_parser")
    pytest.importorskip("furo")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "sphinx", "-q", "-E", "-W", "--keep-going", "-b", "html", "-d", out / "cache"]
    done = subprocess.run([*command, ROOT / "docs", out / "html"], capture_output=True, text=True)
    assert not done.returncode, done.stderr[-3000:]
    return out / "html"


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    from sphinx.util.inventory import InventoryFile

    sys.path.insert(0, str(ROOT / "docs"))
    import conf

    with (site / "objects.inv").open("rb") as file:
        inventory = InventoryFile.load(file, "", lambda a, b: b)
    documented = {name for kind in inventory.values() for name in kind}
    assert len(conf.modules()) > 50
    for module in conf.modules():
        missing = [home for home in conf.public_names(module).values() if home not in documented]
        assert not missing, f"{module}: {missing}"
    top = (site / "generated" / "api" / "index.html").read_text(encoding="utf-8")
    assert all(f">{name}<" in top for name in conf.public_names("medsegdiff_monai"))


@pytest.mark.slow
def test_the_site_needs_no_network(site):
    page = (site / "index.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|rel="stylesheet"[^>]*href)="(?:https?:)?//', page)
