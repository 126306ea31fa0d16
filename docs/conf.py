"""The site that ``make docs`` builds: the pages of this folder, and pages that are made of the code at build time."""

from __future__ import annotations

import contextlib
import inspect
import io
import os
import pkgutil
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
ROOT = DOCS.parent
GENERATED = DOCS / "generated"  # ignored by git
sys.path.insert(0, str(ROOT))

import medsegdiff_monai  # noqa: E402
from medsegdiff_monai import cli  # noqa: E402
from medsegdiff_monai.__main__ import COMMANDS  # noqa: E402

ELSEWHERE = {  # pages of the repository outside of this folder, by their names in the site
    **{page.stem: page for page in sorted(ROOT.glob("benchmarks/results/*.md"))},
    "federated": ROOT / "examples" / "federated" / "README.md",
    "lidc": ROOT / "examples" / "lidc" / "ATTRIBUTION.md",
    "full_size": ROOT / "benchmarks" / "full_size.md",
    "contributing": ROOT / "CONTRIBUTING.md",
    "changelog": ROOT / "CHANGELOG.md",
}

project = "MedSegDiff for MONAI"
author = copyright = "The MedSegDiff for MONAI authors"
version = release = medsegdiff_monai.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = project
html_show_sphinx = False
html_static_path = ["static"]
html_css_files = ["wide.css"]
myst_heading_anchors = 3
autodoc_default_options = {"show-inheritance": True}
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
smartquotes = False
napoleon_numpy_docstring, napoleon_use_ivar = False, True
# references to this package must lead somewhere; those to others are not looked up, and type variables have no page
nitpicky = True
nitpick_ignore_regex = [
    ("py:.*", r"(?!medsegdiff_monai).*"),
    ("py:class", r"medsegdiff_monai\.\w+\.(T|Members|Row|Trained)"),
]


@cache
def modules() -> list[str]:
    """Return the package and all of its modules."""
    found = pkgutil.walk_packages(medsegdiff_monai.__path__, f"{medsegdiff_monai.__name__}.")
    names = [module.name for module in found if not module.name.rpartition(".")[2].startswith("_")]
    return [medsegdiff_monai.__name__, *sorted(names)]


def public_names(module: str) -> dict[str, str]:
    """Return the public classes and functions of a module, each with the full name of where it is documented."""
    content = import_module(module)
    public = {name: getattr(content, name) for name in getattr(content, "__all__", ())}
    homes = {name: one.__module__ for name, one in public.items() if inspect.isclass(one) or inspect.isroutine(one)}
    return {name: f"{home if home in modules() else module}.{name}" for name, home in homes.items()}


def write(name: str, *lines: str) -> Path:
    """Write a page, unless it is there already: what is unchanged is not built again."""
    page, text = GENERATED / f"{name}.md", "\n".join(lines) + "\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    if not page.is_file() or page.read_text(encoding="utf-8") != text:
        page.write_text(text, encoding="utf-8")
    return page


def write_commands() -> Iterator[Path]:
    """Write the help of each command."""
    lines = ["# Commands", "", "`medsegdiff COMMAND`, or `python -m medsegdiff_monai COMMAND`.", ""]
    os.environ["COLUMNS"], sys.argv[0] = "100", "medsegdiff"
    for name in COMMANDS:
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            cli.main(COMMANDS, [name, "--help"])
        lines += [f"## {name}", "", "```text", shown.getvalue().strip(), "```", ""]
    yield write("commands", *lines)


def write_api() -> Iterator[Path]:
    """Write a page for each module; a package's lists what it gathers from its modules."""
    for module in modules():
        names = public_names(module)
        own = [name for name, home in names.items() if home == f"{module}.{name}"]
        gathered = [f"- {{py:obj}}`{name} <{home}>`" for name, home in names.items() if name not in own]
        members = f":members: {', '.join(own)}" if own else ":no-members:"
        directive = f"```{{eval-rst}}\n.. automodule:: {module}\n   {members}\n```"
        yield write(f"api/{module}", f"# {module}", "", directive, "", *gathered)
    lines = ["# API", "", "What most people need is at the top of the package:", ""]
    lines += [f"- {{py:obj}}`{name} <{home}>`" for name, home in public_names(medsegdiff_monai.__name__).items()]
    yield write("api/index", *lines, "", "```{toctree}\n:maxdepth: 1", *modules(), "```")


def write_elsewhere() -> Iterator[Path]:
    """Write a page that includes each of those that are elsewhere."""
    for name, page in ELSEWHERE.items():
        orphan = "---\norphan: true\n---\n" if page.parent.name in ("results", "lidc", "benchmarks") else ""
        where = page.relative_to(ROOT).as_posix()
        yield write(name, f"{orphan}```{{include}} ../../{where}\n:relative-images:\n:relative-docs: ../../docs\n```")


def lead_inside(app: Any, page: str, source: list[str]) -> None:
    """Let links to pages elsewhere lead to their copies in the site."""
    for name, target in ELSEWHERE.items():
        path = re.escape(os.path.relpath(target, DOCS).replace(os.sep, "/"))
        source[0] = re.sub(rf"\]\({path}(?=[#)])", f"](generated/{name}.md", source[0])


def plain_stars(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep the stars of shapes such as (batch, *spatial): in reStructuredText they begin an emphasis."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [re.sub(r"(?<![\\*\w])\*(?=\w)", r"\\*", part) for part in parts[::2]]
        lines[i] = "".join(parts)


def lead_home(app: Any, env: Any, node: Any, content: Any) -> Any:
    """Let the name that a package gives something lead to where that is documented."""
    module, _, name = node.get("reftarget", "").rpartition(".")
    home = public_names(module).get(name) if module in modules() else None
    if home in (None, f"{module}.{name}"):
        return None
    return env.domains["py"].resolve_xref(env, node["refdoc"], app.builder, "obj", home, node, content)


def generate(app: Any) -> None:
    """Write all pages that are made of the code, and remove those of what is no longer there."""
    before = set(GENERATED.rglob("*.md"))
    written = {*write_commands(), *write_api(), *write_elsewhere()}
    for page in before - written:
        page.unlink()


def setup(app: Any) -> None:
    """Tell Sphinx."""
    app.connect("builder-inited", generate)
    app.connect("source-read", lead_inside)
    app.connect("missing-reference", lead_home)
    app.connect("autodoc-process-docstring", plain_stars, priority=900)
