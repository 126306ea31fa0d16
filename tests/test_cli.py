"""Commands get what was typed, refuse what they do not know, and help at once."""

from __future__ import annotations

import configparser
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import medsegdiff_monai.__main__ as commands
from medsegdiff_monai import cli
from medsegdiff_monai.data.raw.prepare import KINDS
from medsegdiff_monai.errors import InputError

from .conftest import ROOT


def call(monkeypatch, *words: str) -> dict[str, Any]:
    """Values that a command would be called with."""
    got: dict[str, Any] = {}
    if words[0] in commands.COMMANDS:
        monkeypatch.setitem(commands.COMMANDS, words[0], commands.COMMANDS[words[0]]._replace(run=got.update))
    monkeypatch.setattr(sys, "argv", ["medsegdiff", *words])
    commands.main()
    return got


ODD = [
    "2024",
    "20180217_064501",
    "1e3",
    "0x10",
    "a,b",
    "scan#2.nii.gz",
    "[1]",
    "{a}",
    "None",
    "true",
    "a b",
    "it's",
    "ä",
]


@pytest.mark.parametrize("word", ODD)
def test_paths_are_what_was_typed(word, monkeypatch):
    got = call(monkeypatch, "segment", word, "--output_dir", word, f"--checkpoint={word}", "--bundle_root", word)
    assert got["images"] == [word] and {got[k] for k in ("output_dir", "checkpoint", "bundle_root")} == {word}
    got = call(monkeypatch, "check", "--dataset", word, "--write", word)
    assert (got["dataset"], got["write"], got["strict"]) == (word, word, False)
    got = call(monkeypatch, "prepare", "folder", "--source", word, "--output", word, "--patient_pattern", word)
    assert (got["kind"], got["source"], got["patient_pattern"], "rater" in got) == ("folder", word, word, False)


def test_images_may_stand_anywhere_and_begin_with_a_dash(monkeypatch):
    got = call(monkeypatch, "segment", "a", "-o", "out", "b", "--seed", "-1", "c", "--", "-d", "--e", "--")
    assert got["images"] == ["a", "b", "c", "-d", "--e", "--"] and (got["output_dir"], got["seed"]) == ("out", "-1")
    with pytest.raises(InputError, match="unrecognized arguments: x"):
        call(monkeypatch, "check", "--dataset", "d", "--", "x")


def test_variables_and_parts_of_the_config(monkeypatch):
    words = ["--num_members", "9", "--inferer#overlap", "0.25", "--scheduler::_target_=a.B", "--inferer#seed=None"]
    got = call(monkeypatch, "export", "--output", "x.ts", *words, "--use_ff_parser")
    assert got["num_members"] == "9" and got["inferer#overlap"] == 0.25 and got["scheduler::_target_"] == "a.B"
    assert got["inferer#seed"] is None and got["use_ff_parser"] is True and "num_steps" not in got


FILES = {"a.json": ["a.json"], "['a#1.json','b.yaml']": ["a#1.json", "b.yaml"], "a,b": ["a", "b"], "[a": ["[a"]}


@pytest.mark.parametrize("text", FILES)
def test_configs_are_one_or_several(text, monkeypatch):
    assert call(monkeypatch, "segment", "x", "-o", "out", "--config_file", text)["config_file"] == FILES[text]


def test_a_config_with_commas_in_its_name(monkeypatch, tmp_path):
    (tmp_path / "a,b.json").touch()
    monkeypatch.chdir(tmp_path)
    assert call(monkeypatch, "segment", "x", "-o", "out", "--config_file", "a,b.json")["config_file"] == ["a,b.json"]


WRONG = {
    "chek --dataset d": "chek: medsegdiff has no such command: did you mean check?",
    "check --datset d": "--datset: medsegdiff check has no such option: did you mean --dataset?",
    "check": "the following arguments are required: --dataset",
    "check --dataset d --strict maybe": "'maybe' must be true or false",
    "segment a -o b --num_membrs 3": "did you mean --num_members?",
    "segment a --output_dri b": "did you mean --output_dir?",
    "segment a -o b --num_memb 3": "--num_memb: medsegdiff segment has no such option",
    "package --output d --inferer#overlap 1": "has no such option",
    "prepare folder --source a --output b --seed x": "invalid int value: 'x'",
    "prepare folder --source a --output b --slice 2D": "did you mean --slices?",
    "demo there": "unrecognized arguments: there",
}


@pytest.mark.parametrize("words", WRONG)
def test_a_slip_is_one_line(words, monkeypatch):
    with pytest.raises(InputError) as error:
        call(monkeypatch, *words.split())
    assert WRONG[words] in str(error.value) and "\n" not in str(error.value)


def test_a_switch_has_a_value_or_none(monkeypatch):
    for words, value in ((["--strict"], True), (["--strict", "False"], False), ([], False)):
        assert call(monkeypatch, "check", "--dataset", "d", *words)["strict"] is value


def test_options_of_every_kind_of_data_set_are_there():
    options = {name for find in KINDS.values() for name in inspect.signature(find).parameters} - {"source"}
    assert options == set(commands.PREPARE)


@pytest.mark.parametrize("name", commands.COMMANDS)
def test_options_are_what_the_command_takes(name, monkeypatch, capsys):
    taken = inspect.signature(commands.COMMANDS[name].run).parameters
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, name, "--help")
    assert end.value.code == 0 and commands.COMMANDS[name].summary.split()[0] in capsys.readouterr().out
    parser = cli.Parser(name, "")
    commands.COMMANDS[name].options(parser)
    own = {action.dest for action in parser._actions if action.default is not cli.UNSET} - {"help"}
    assert own <= set(taken) or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def test_commands_are_listed(monkeypatch, capsys):
    for words in ([], ["--help"]):
        monkeypatch.setattr(sys, "argv", ["python", *words])
        commands.main()
        printed = capsys.readouterr().out
        assert all(f"  {name} " in printed for name in commands.COMMANDS)


def test_help_imports_nothing_heavy():
    code = (
        "import sys; sys.argv = ['x', 'segment', '--help']; import medsegdiff_monai.__main__ as m\n"
        "try: m.main()\n"
        "except SystemExit: print(sorted({'torch', 'monai', 'numpy', 'ignite', 'fire'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, encoding="utf-8", check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "--num_members" in done.stdout


def test_console_script():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    name, _, target = setup["options.entry_points"]["console_scripts"].strip().partition(" = ")
    module, _, function = target.partition(":")
    assert name == "medsegdiff" and getattr(import_module(module), function) is commands.main


def test_settings_are_printed(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["medsegdiff", "settings", "train"])
    commands.main()
    assert "max_epochs" in capsys.readouterr().out


def test_a_message_comes_alone(tmp_path):
    command = [sys.executable, "-m", "medsegdiff_monai", "segment", "a", "--output_dri", "b"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8", env={"PYTHONPATH": str(ROOT)})
    assert done.returncode == 1 and done.stderr.startswith("\nerror: --output_dri: ") and "Traceback" not in done.stderr
    assert list(Path(tmp_path).iterdir()) == []
