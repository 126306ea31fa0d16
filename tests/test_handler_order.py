"""The order that the handlers of a training rely on: train.json keeps it, and whatever breaks it is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from monai.bundle import ConfigParser

from medsegdiff_monai.configs import read_config
from medsegdiff_monai.errors import InputError
from medsegdiff_monai.handlers.order import ORDER, Rule, out_of_order

from .conftest import CONFIGS, ROOT

GROUPS = ("train", "validate")


def handlers() -> dict[str, list[dict[str, Any]]]:
    content = ConfigParser.load_config_file(CONFIGS / "train.json")
    return {group: content[group]["handlers"] for group in GROUPS}


def places(group: str, name: str) -> list[int]:
    return [i for i, handler in enumerate(handlers()[group]) if handler["_target_"].split(".")[-1] == name]


def test_the_config_keeps_the_order() -> None:
    assert not list(out_of_order({group: {"handlers": found} for group, found in handlers().items()}))


@pytest.mark.parametrize("rule", ORDER, ids=lambda rule: f"{rule.first}-{rule.second}")
def test_a_config_that_breaks_a_rule_is_refused_with_the_reason(rule: Rule, tmp_path: Path) -> None:
    (group,) = [g for g in GROUPS if places(g, rule.first) and places(g, rule.second)]
    changed = handlers()[group]
    for place in places(group, rule.first):  # to the end
        changed.append(handlers()[group][place])
    first = places(group, rule.first)
    changed = [handler for i, handler in enumerate(changed) if i not in first]
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({f"{group}#handlers": changed}))
    expected = f"{group}#handlers: {rule.first} must stand before {rule.second}: {rule.why}."
    with pytest.raises(InputError, match=re.escape(expected)):
        read_config([CONFIGS / "train.json", overlay], bundle_root=str(ROOT / "bundle"))


@pytest.mark.parametrize("found", [[], "$list()", None])
def test_lists_that_a_program_makes_are_left_alone(found: Any) -> None:
    assert not list(out_of_order({"train": {"handlers": found}, "validate": found}))


def test_further_handlers_may_stand_anywhere() -> None:
    more = {"_target_": "mine.Handler"}
    content = {g: {"handlers": [more, *[h for one in found for h in (one, more)]]} for g, found in handlers().items()}
    assert not list(out_of_order(content))
