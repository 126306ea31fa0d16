"""Variables of the configs: declared once, checked before anything is done, printed for who wants to know them."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow, create_workflow, run
from monai.bundle.utils import DEFAULT_MLFLOW_SETTINGS

from medsegdiff_monai.configs import PARTS, TRACKING, as_written, check_config, read_config
from medsegdiff_monai.errors import InputError, find_input_error
from medsegdiff_monai.kinds import literal
from medsegdiff_monai.variables import CONFIGS as NAMES
from medsegdiff_monai.variables import VARIABLES, describe

from .conftest import CONFIGS, PICTURE_SETTINGS, ROOT, TINY

BUNDLE = str(ROOT / "bundle")
RUN = {"train": "training", "evaluate": "evaluating", "inference": "inference"}


def content(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))


def read(name: str = "train", *overlays: Path, **variables: Any) -> ConfigParser:
    return read_config([CONFIGS / f"{name}.json", *overlays], **{"bundle_root": BUNDLE, **variables})


def refusal(*arguments: Any, **variables: Any) -> str:
    with pytest.raises(InputError) as error:
        read(*arguments, **variables)
    return str(error.value)


def workflow(name: str, **variables: Any) -> ConfigWorkflow:
    """Initialised as ``monai.bundle.run`` does it, and not run."""
    config = str(CONFIGS / f"{name}.json")
    return create_workflow(config_file=config, **{"bundle_root": BUNDLE, "device": "cpu", **variables})


# one declaration


@pytest.mark.parametrize("name", NAMES)
def test_variables_on_top_of_a_config_are_those_that_are_declared(name):
    keys = list(content(name))
    objects = next(keys.index(key) for key in ("displayable_configs", "field_size") if key in keys)
    assert set(keys[1:objects]) == {v.name for v in VARIABLES.values() if name in v.configs}


@pytest.mark.parametrize("name", ["multi_gpu_train", "multi_gpu_evaluate", "multi_gpu_inference"])
def test_overlays_for_several_processes_bring_one_more(name):
    declared = {variable.name for variable in VARIABLES.values() if name in variable.configs}
    assert declared == set(content(name)) - set(content(name.removeprefix("multi_gpu_"))) & set(VARIABLES)


def test_the_other_parts_of_the_configs_are_known_by_name():
    files = [content(path.stem) for path in CONFIGS.glob("*.json") if path.stem != "metadata"]
    top = {key.split("#")[0].removeprefix("+") for config in files for key in config}
    assert top - set(VARIABLES) == PARTS[""]
    for group in set(PARTS) - {""}:
        assert set().union(*(config.get(group, {}) for config in files)) == PARTS[group]


def test_a_default_is_the_same_in_every_config_and_what_an_expression_comes_to_is_said():
    for variable in VARIABLES.values():
        configs = set(variable.configs) - ({"train"} if variable.name == "amp" else set())  # which depends on the CPU
        given = [content(name)[variable.name] for name in sorted(configs)]
        computed = [isinstance(value, str) and value.startswith("$") for value in given]
        assert (
            all(computed) == any(computed) and bool(variable.default or "gpu" in str(variable.configs)) >= computed[0]
        )
        assert all(value == given[0] for value in given) or variable.name == "output_dir"
        assert all(computed) or all(variable.read(value) == value for value in given)


OVERLAYS = sorted(path for folder in ("variants", "datasets") for path in (CONFIGS / folder).glob("*.json"))


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
def test_overlays_of_the_bundle_pass(overlay):
    """Each alone where it fits the default's dimensions, else on top of the plain overlay for pictures."""
    flat = [] if "3d" in overlay.stem or "hippocampus" in overlay.stem else [CONFIGS / "datasets" / "generic_2d.json"]
    more = {"attention_levels": None} if "medsegdiff" not in overlay.stem else {}
    for name in NAMES:
        read(name, *flat, overlay, **more)


def test_overlays_for_gpus_pass():
    for name in NAMES:
        read(name, CONFIGS / f"multi_gpu_{name}.json")
    read("inference", CONFIGS / "inference_trt.json")


def test_settings_lists_all_that_a_config_has():
    for name in NAMES:
        lines = describe(name, BUNDLE).splitlines()
        assert [line.split()[0] for line in lines[::2]] == [v.name for v in VARIABLES.values() if name in v.configs]
    assert "60 (a whole number of at least 1)" in describe("train", BUNDLE)
    with pytest.raises(InputError, match="trian: no such config: did you mean train"):
        describe("trian", BUNDLE)


# names

SLIPS = {
    "max_epoch": ("train", "did you mean max_epochs?"),
    "lerning_rate": ("train", "did you mean learning_rate?"),
    "evalsplit": ("evaluate", "did you mean eval_split?"),
    "num_member": ("inference", "did you mean num_members?"),
    "logging_fil": ("inference", "did you mean logging_file?"),
    "train#dataloder": ("train", "did you mean dataloader?"),
    "train#trainer#max_epoch": ("train", "SupervisedTrainer has no such argument: did you mean max_epochs?"),
    "inferer#overlp": ("inference", "DeepEnsembleInferer has no such argument: did you mean overlap?"),
    "network_def#use_mask_gat": ("train", "did you mean use_mask_gate?"),
    "train#handlers#0#adept": ("train", "did you mean adapt?"),
    "displayable_configs#fusio": ("inference", "did you mean fusion?"),
    "qwertz": ("evaluate", "nothing refers to it."),
}


@pytest.mark.parametrize("name", SLIPS)
def test_a_misspelt_name_is_refused_with_the_nearest_one(name, tmp_path):
    config, words = SLIPS[name]
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({name: 1}))
    for message in (refusal(config, **{name: 1}), refusal(config, overlay)):
        assert message.startswith(f"{name}: ") and message.endswith(words) and "\n" not in message
    with pytest.raises(RuntimeError) as error:
        workflow(config, **{name: 1})
    assert str(find_input_error(error.value)) == message


@pytest.mark.parametrize(
    "name", ["inferor#overlap", "inferer#scheduler#x#y", "handlers#7", "handlers#x", "handlers#0#a#b"]
)
def test_a_part_of_what_is_not_there_is_refused(name, tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({name: 1}))
    for message in (refusal("inference", **{name: 1}), refusal("inference", overlay)):
        assert message.startswith(f"{name}: ") and "\n" not in message


def test_a_class_that_is_not_there_is_refused():
    message = refusal(**{"scheduler#_target_": "medsegdiff_monai.schedulers.DDIMSchedular"})
    assert message.endswith("there is no medsegdiff_monai.schedulers.DDIMSchedular: did you mean DDIMScheduler?")


def test_a_class_of_a_folder_that_monai_has_not_searched_yet_is_left_to_it():
    read(augmentation=[{"_target_": "scripts.noise.MyNoised", "keys": "image"}])


def test_what_is_run_must_be_there():
    with pytest.raises(RuntimeError) as error:
        workflow("train", run_id="trainig")
    assert str(find_input_error(error.value)).endswith("nothing of that name to run: did you mean training?")


def test_all_slips_are_named_at_once():
    message = refusal("train", max_epoch=3, batch_size=0, fusion="median")
    assert message.startswith("3 settings cannot be used:\n") and all(
        word in message for word in ("max_epoch: ", "batch_size=0 must be", "fusion='median' must be staple")
    )


def test_overlays_may_add_what_they_refer_to(tmp_path):
    overlay = tmp_path / "overlay.json"
    mine = {"my_noise": {"_target_": "RandGaussianNoised", "keys": "image", "prob": "@_share"}, "_share": 0.3}
    overlay.write_text(json.dumps({**mine, "augmentation": ["@my_noise"], "_note": "any"}))
    assert read("train", overlay).get_parsed_content("my_noise").prob == 0.3
    overlay.write_text(json.dumps({**mine, "augmentation": []}))
    assert refusal("train", overlay).startswith("my_noise: ")


def test_an_id_that_is_run_needs_no_reference(volumes):
    config = str(CONFIGS / "inference.json")
    create_workflow(config_file=config, bundle_root=BUNDLE, device="cpu", run_id="count", count="$len(@images)")


def test_variables_of_another_config_are_ignored_and_said_to_be(capsys):
    workflow("train", num_members=3, max_epochs=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "does not use" in line]
    assert len(lines) == 1 and lines[0].endswith("WARNING - num_members: train.json does not use it.")


def test_tracking_adds_names_of_its_own(tmp_path):
    assert set(DEFAULT_MLFLOW_SETTINGS["configs"]) - {"output_dir", "trainer", "validator", "evaluator"} == TRACKING
    workflow("train", tracking="mlflow", experiment_name="mine", output_dir=str(tmp_path), save_execute_config=False)


# values


def value(name: str, given: Any, config: str = "train", **more: Any) -> Any:
    return read(config, **{name: given, **more}).get_parsed_content(name)


@pytest.mark.parametrize("text", ["None", "none", "null", None, "$None"])
def test_null_in_every_spelling(text):
    assert value("spacing", text) is None
    assert workflow("inference", spacing=text).parser.get_parsed_content("spacing") is None


TEXTS = {
    "batch_size": ("8", 8),
    "learning_rate": ("1e-4", 1e-4),
    "resume": ("False", False),
    "amp": ("TRUE", True),
    "roi_size": ("[16,16,16]", [16, 16, 16]),
    "spacing": ((1, 2, "2.5"), [1, 2, 2.5]),
    "regions": ("{a: [1], b: [2]}", {"a": [1], "b": [2]}),
    "num_res_blocks": ("2.0", 2),
    "attention_levels": ("[false, False, true]", [False, False, True]),
    "spatial_dims": ("3", 3),
    "patience": ("null", None),
}


@pytest.mark.parametrize("name", TEXTS)
def test_values_may_come_as_text(name):
    text, meant = TEXTS[name]
    assert value(name, text) == meant and type(value(name, text)) is type(meant)


def test_outputs_may_be_words_with_commas():
    assert value("outputs", "seg,members", "inference") == value("outputs", "[seg, members]", "inference")


@pytest.mark.parametrize("text", ["__import__('os').getcwd()", "a.b", "f(1)", "[x for x in y]", "a#b", "-", "1_", "("])
def test_text_is_never_evaluated(text):
    assert literal(text) == text


def test_an_expression_is_checked_by_what_it_comes_to():
    assert value("batch_size", "$2 * @num_classes") == 4
    assert refusal(batch_size="$0 * @num_classes").startswith("batch_size=0 must be a whole number")
    assert refusal(batch_size="$1 / 0").startswith("batch_size='$1 / 0' cannot be evaluated: division by zero")
    assert "nowhere" in refusal(batch_size="@nowhere")


CLASHES: dict[str, dict[str, Any]] = {
    "roi_size=[16, 16] must be 3 sizes": {"roi_size": [16, 16]},
    "spacing=[1, 1] must be null or 3": {"spacing": [1, 1]},
    "flip_axes=[2] must be axes from 0 to 1": {**PICTURE_SETTINGS, "flip_axes": [2]},
    "num_classes=2, but regions names 1": {"regions": {"a": [1]}},
    "ignore_label=2 must not be a label": {"ignore_label": 2},
    "intensity_range=[5, 5] must be a lower": {"intensity_range": [5, 5]},
    "attention_levels=[True] must have 3": {"attention_levels": [True]},
    "num_res_blocks=[1, 1] must have 3": {"num_res_blocks": [1, 1]},
    "num_head_channels=24 must divide the 32": {"num_head_channels": 24, "attention_levels": [True, False, False]},
    "conditioning_levels=[2] must be different": {"conditioning_levels": [2]},
    "conditioning_levels=[1, 1] must be different": {"conditioning_levels": [1, 1]},
    "channels=[31, 64, 128] must begin with an even": {"channels": [31, 64, 128]},
    "objective='mask' needs prediction_type='sample'": {"objective": "mask", "prediction_type": "epsilon"},
    "val_num_steps=11 must be at most num_train_timesteps=10": {"num_train_timesteps": 10, "val_num_steps": 11},
    "warmup_epochs=5 must be below max_epochs=5": {"warmup_epochs": 5, "max_epochs": 5},
}


@pytest.mark.parametrize("message", CLASHES)
def test_values_that_do_not_fit_together(message):
    assert refusal("train", **CLASHES[message]).startswith(message)


def test_outputs_without_the_mask_are_refused():
    assert refusal("inference", outputs=["prob"]).startswith("outputs=['prob'] must hold seg")


def test_nothing_is_not_everything():
    assert refusal("inference", images=[]) == "images=[] must be null, or a list, each a path."
    for name in ("output_dir", "ckpt_dir", "checkpoint"):
        assert refusal("evaluate", **{name: " "}).startswith(f"{name}=' ' must be a path")


@pytest.mark.parametrize("device", ["gpu", "cuda", "cuda:1", "cpu:1", "meta", "mps", "", 0])
def test_a_device_that_is_not_there(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    message = refusal("inference", device=device)
    assert message.startswith(f"device={device!r} ") and "cpu" in message
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert value("device", "cuda:0", "inference") == "cuda:0"


# The eight are wrong for every variable, but for those that are named.
BAD = {
    "word": "qwertz", "below": -1, "half": 0.3, "nan": math.nan, "huge": 10**12, "empty": "", "dict": {"a": 0},
    "list": [[]],
}  # fmt: skip
PLACES = {"bundle_root", "dataset_dir", "output_dir", "ckpt_dir", "checkpoint", "pretrained"}
RIGHT = {
    "word": PLACES,
    "empty": {"bundle_root", "dataset_dir"},
    "half": {
        "learning_rate", "max_grad_norm", "cache_rate", "agreement_threshold", "signal_scale", "surface_tolerance",
        "min_size",
    },
    "huge": {"max_grad_norm"},
}  # fmt: skip


@pytest.fixture(scope="module")
def parsed() -> Mapping[str, ConfigParser]:
    return {name: read(name, device="cpu") for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_bad_values_of_every_variable(name, parsed, monkeypatch):
    """Each is refused in a line that names variable, value and what is allowed; what is not refused is right."""
    monkeypatch.setattr("medsegdiff_monai.configs._wrong_arguments", lambda *_: [])  # does not depend on them; slow
    for variable in (v for v in VARIABLES.values() if name in v.configs):
        for kind, bad in BAD.items():
            parser = ConfigParser({**deepcopy(parsed[name].get()), variable.name: bad})
            parser.parse()
            if variable.name in RIGHT.get(kind, ()):
                check_config(parser, name)
                continue
            with pytest.raises(InputError) as error:
                check_config(parser, name)
            message = str(error.value)
            assert message.startswith(f"{variable.name}={bad!r} must be ") and "\n" not in message
            assert variable.kind.allowed in message or "write ./" in message


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_bad_values_of_every_variable_in_a_run(name, pictures, tmp_path, monkeypatch):
    """As above, through ``monai.bundle.run``: nothing but a refusal, or a run to its end."""
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "model.pt"
    settings = {
        **TINY,
        **PICTURE_SETTINGS,
        "num_steps": 1,
        "val_num_members": 2,
        "device": "cpu",
        "bundle_root": BUNDLE,
    }
    settings |= {"dataset_dir": str(pictures), "ckpt_dir": str(tmp_path / "ckpt"), "checkpoint": str(weights)}
    torch.save(read(name, **settings).get_parsed_content("network_def").state_dict(), weights)
    config, finished = str(CONFIGS / f"{name}.json"), set()
    for variable in (v for v in VARIABLES.values() if name in v.configs):
        for kind, bad in BAD.items():
            try:
                run(
                    RUN[name],
                    config_file=config,
                    **{**settings, "output_dir": str(tmp_path / "out"), variable.name: bad},
                )
                finished.add((kind, variable.name))
            except Exception as error:
                assert find_input_error(error) is not None, (variable.name, bad, error)
    assert finished and all(variable in RIGHT.get(kind, ()) for kind, variable in finished)


# paths


@pytest.mark.parametrize("path", ["a#1", "$a", "@b", "%c", "a::b", "a@b'\"", "#", "x$y"])
def test_paths_stand_in_a_config_as_they_are(path):
    config = read("inference", images=[as_written(path)], output_dir=as_written(path))
    assert config.get_parsed_content("images") == [path] and config.get_parsed_content("output_dir") == path


def test_a_hash_in_a_path_survives():
    """MONAI writes :: for it in all texts of a config."""
    assert value("dataset_dir", "studies#2/x") == "studies#2/x"
    assert value("images", ["a#1", "b"], "inference") == ["a#1", "b"]
    assert workflow("train", ckpt_dir="a#1").parser.get_parsed_content("ckpt_dir") == "a#1"


TYPED = {
    "2024": 2024, "20180217_064501": 20180217064501, "1e3": 1000.0, "a,b": ("a", "b"), "out#2": "out", "007": "007"
}  # fmt: skip


@pytest.mark.parametrize("word", TYPED)
@pytest.mark.parametrize("form", [["--dataset_dir", ""], ["--dataset-dir", ""], ["--dataset_dir="]])
def test_a_folder_is_what_was_typed_whatever_fire_makes_of_it(word, form, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["run", "--seed", "1", *form[:-1], form[-1] + word, "--output_dir", "2024"])
    parser = workflow("inference", dataset_dir=TYPED[word], seed=1).parser
    assert parser.get_parsed_content("dataset_dir") == word


def test_a_bundle_that_cannot_be_found_is_missed_where_it_is_needed(monkeypatch):
    """Such as for the folder of the weights, and not by who loads the network alone."""

    def nowhere() -> str:
        raise InputError("give --bundle_root DIR")

    monkeypatch.setattr("medsegdiff_monai.settings.find_bundle_root", nowhere)
    config = create_workflow(config_file=str(CONFIGS / "train.json"), device="cpu").parser
    assert config.get_parsed_content("network_def").spatial_dims == 3
    with pytest.raises(RuntimeError) as error:
        config.get_parsed_content("ckpt_dir")
    assert "give --bundle_root DIR" in str(find_input_error(error.value))


def test_a_number_that_nobody_typed_is_no_folder():
    assert refusal(dataset_dir=2024).startswith("dataset_dir=2024 must be text: where the name is 2024, write ./2024")


# overlays


def test_overlays_may_be_yaml(tmp_path):
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("learning_rate: 1e-4\nspacing: null\nmax_epochs: 3\n")
    config = read("train", overlay)
    assert [config[name] for name in ("learning_rate", "spacing", "max_epochs")] == [1e-4, None, 3]


BROKEN = {
    "cut.json": ('{"num_members": 2,', "is not JSON: line 1, column 19"),
    "list.json": ("[1]", "holds a list"),
    "twice.json": ('{"seed": 1, "seed": 2}', "seed"),
    "cut.yaml": ("a: [1,\nb: 2", "line 2"),
    "overlay.txt": ("{}", "overlay.txt"),
    "latin.json": (b'{"output_dir": "\xe9"}', "cannot be read"),
    "merge.json": ('{"+seed": [1]}', "+seed: "),
}


def test_an_overlay_alone_is_no_config(tmp_path):
    (tmp_path / "overlay.json").write_text('{"seed": 1}')
    with pytest.raises(InputError, match="only variables: name the bundle's config before them"):
        read_config(tmp_path / "overlay.json")


@pytest.mark.parametrize("before", ["overlay.json", "train.json"])
def test_a_config_of_the_bundle_comes_first_and_alone(before, tmp_path):
    (tmp_path / "overlay.json").write_text('{"seed": 1}')
    files = [
        str(CONFIGS / before) if before == "train.json" else str(tmp_path / before),
        str(CONFIGS / "inference.json"),
    ]
    with pytest.raises(InputError, match=rf"inference.json: would replace what .*{before} sets: name it first"):
        read_config(files)
    with pytest.raises(RuntimeError) as error:
        run("inference", config_file=files, bundle_root=BUNDLE, dataset_dir=str(tmp_path), device="cpu")
    assert "inference.json: would replace what" in str(find_input_error(error.value))


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_overlay_is_named_with_the_place(name, tmp_path):
    text, words = BROKEN[name]
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    message = refusal("train", tmp_path / name)
    assert str(tmp_path / name) in message and words in message and "\n" not in message


def test_a_typo_stops_a_training_before_anything_is_written(pictures, tmp_path):
    """On the command line, with its exit code, the message alone."""
    command = [sys.executable, "-m", "monai.bundle", "run", "training", "--config_file", str(CONFIGS / "train.json")]
    command += ["--bundle_root", BUNDLE, "--dataset_dir", str(pictures), "--max_epoch", "3", "--spacing", "None"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, encoding="utf-8", env={**os.environ, "PYTHONUTF8": "1"}
    )
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.rstrip().endswith("did you mean max_epochs?") and "\nerror: max_epoch: " in done.stderr
    assert list(tmp_path.iterdir()) == []


BAD_PARTS = {
    "optimizer#lr": ("train", "abc", "'<=' not supported between instances of 'float' and 'str'"),
    "scheduler#schedule": ("inference", "nope", "schedule is 'nope'"),
    "scheduler#_target_": ("inference", "nowhere.DDIM", "Cannot locate class or function path: 'nowhere.DDIM'"),
    "train#dataloader#batch_size": ("train", 0, "batch_size should be a positive integer"),
    "validate#inferer#overlap": ("train", "abc", "overlap='abc' must be a number"),
}


@pytest.mark.parametrize("place", ["command line", "overlay"])
@pytest.mark.parametrize("name", BAD_PARTS)
def test_a_part_that_its_class_does_not_take_is_named(name, place, pictures, tmp_path, monkeypatch, capsys):
    """In one line; what is wrong elsewhere is shown as ever."""
    config, bad, words = BAD_PARTS[name]
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    files = [str(CONFIGS / f"{config}.json")]
    if place == "overlay":
        (tmp_path / "overlay.json").write_text(json.dumps({name: bad}))
        files.append(str(tmp_path / "overlay.json"))
    asked = {name: bad} if place == "command line" else {}
    settings = {**PICTURE_SETTINGS, "dataset_dir": str(pictures), "bundle_root": BUNDLE, "device": "cpu"}
    parser = create_workflow(config_file=files, **settings, **asked).parser
    with pytest.raises(Exception) as error:
        parser.get_parsed_content(name.rpartition("#")[0])
    sys.excepthook(error.type, error.value, error.tb)
    told = capsys.readouterr().err
    told = told[told.index("\nerror: ") :]  # after a progress bar
    assert words in told and "Traceback" not in told and told.count("\n") == 2
    if "overlap" not in name:  # that says it by itself
        assert told.startswith(f"\nerror: {name}={bad!r} cannot be used: ")
    sys.excepthook(RuntimeError, RuntimeError("of another kind"), None)
    assert "RuntimeError: of another kind" in capsys.readouterr().err


def test_of_several_parts_that_are_set_no_right_one_is_blamed(pictures, monkeypatch, capsys):
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    asked = {"inferer#roi_size": 5, "inferer#seed": 3}
    settings = {**PICTURE_SETTINGS, "dataset_dir": str(pictures), "bundle_root": BUNDLE, "device": "cpu"}
    parser = create_workflow(config_file=[str(CONFIGS / "inference.json")], **settings, **asked).parser
    with pytest.raises(Exception) as error:
        parser.get_parsed_content("inferer")
    sys.excepthook(error.type, error.value, error.tb)
    said = capsys.readouterr().err
    assert "error: inferer#roi_size=5 or inferer#seed=3 cannot be used: roi_size=5 must be a list" in said


def test_a_stray_word_is_no_reason_to_check_nothing():
    """MONAI takes the second of two images for what is to be initialised."""
    stray = workflow("inference", init_id="b.png")
    with pytest.raises(RuntimeError) as error:
        stray.run()
    assert "b.png: inference.json has nothing of that name to initialise" in str(find_input_error(error.value))


@pytest.mark.parametrize("text, value", [("false", False), ("True", True), (False, False)])
def test_booleans_of_the_network_itself_are_read_before_it_is_built(text, value):
    """As ``--network_def#use_mask_gate false`` sets them, which fire leaves a text."""
    parser = read_config(
        CONFIGS / "train.json", bundle_root=str(ROOT / "bundle"), **{"network_def#use_mask_gate": text}
    )
    assert parser["network_def"]["use_mask_gate"] is value
