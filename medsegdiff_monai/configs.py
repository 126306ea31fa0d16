"""Configs are read, and checked before anything is done: names, values, and whether values fit together."""

from __future__ import annotations

import inspect
import json
import logging
import pydoc
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from monai.bundle import ConfigComponent, ConfigParser, ConfigWorkflow, ReferenceResolver, create_workflow, run
from monai.bundle.utils import merge_kv
from monai.utils import OptionalImportError, ensure_tuple

from .errors import InputError, find_input_error, show_input_errors_plainly
from .kinds import is_place
from .settings import as_bool, tell_of_other_weights
from .variables import CONFIGS, PARTS, VARIABLES, find_clashes, recorded, suggest

__all__ = ["OPTIONS_OF_RUN", "as_written", "check", "check_config", "merge_configs", "read_config", "to_be_set"]

logger = logging.getLogger(__name__)

OPTIONS_OF_RUN = set(inspect.signature(run).parameters) - {"override"}
TRACKING = {"experiment_name", "is_not_rank0", "run_name", "save_execute_config", "tracking_uri"}  # MLflow's
WHOLE = {"bundle_root", "initialize", "network_def"}  # no overlay has all of them
SPECIAL = ("$", "@", "%")  # at the beginning of a text, MONAI takes it for code, a reference or a macro


def as_written(path: str) -> str:
    """Return what stands for a path in a config, where MONAI would take its signs for something else."""
    if not path.startswith(SPECIAL) and "#" not in path and "::" not in path:
        return path
    return "$" + repr(path).replace("#", r"\x23").replace("@", r"\x40")


def to_be_set(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Return values as MONAI takes them for what they are: paths are no code, and None is not left out."""
    places = {name for name in variables if name in VARIABLES and is_place(VARIABLES[name].kind)}
    written = {name: _map_texts(as_written, value) if name in places else value for name, value in variables.items()}
    return {name: "$None" if value is None else value for name, value in written.items()}


def check(config: str) -> None:
    """Check the config that is being initialised; the first of a config's ``initialize``, and of its ``run``.

    When it is run, it has been checked, unless a stray word of the command line stands for ``initialize``. Nothing is
    checked where MONAI evaluates this at another time.

    Args:
        config: ``train``, ``evaluate`` or ``inference``.

    Raises:
        InputError: naming all that is wrong.
    """
    _refuse_stray_word(config)
    workflow = _running(ConfigWorkflow.initialize).get("self")
    if workflow is None:
        return
    call = _running(create_workflow)
    asked = {k: v for k, v in call.get("kwargs", {}).items() if k not in OPTIONS_OF_RUN}
    _restore(workflow.parser, asked)
    if workflow.run_id not in workflow.parser:
        hint = suggest(workflow.run_id, PARTS[""] & set(workflow.parser.get()))
        raise InputError(f"{workflow.run_id}: {config}.json has nothing of that name to run{hint or '.'}")
    check_config(workflow.parser, config, [workflow.run_id, workflow.init_id, workflow.final_id])
    overlays = [content for _, content in _load_all(call.get("config_file") or ())[1:]]
    _explain_parts(workflow.parser, {k: v for part in (*overlays, asked) for k, v in part.items()})
    used = _references(workflow.parser.get())
    for name in asked.keys() - {"bundle_root"}:  # which MONAI uses
        if name in VARIABLES and not any(_touch(name, id) for id in used):
            logger.warning(f"{name}: {config}.json does not use it.")
    if config == "train" and "checkpoint" in workflow.parser and "checkpoint" not in asked:
        tell_of_other_weights(*map(workflow.parser.get_parsed_content, ("checkpoint", "ckpt_dir")))
    if "variables" in workflow.parser:
        workflow.parser["variables"] = recorded(config, workflow.parser.get())


def _refuse_stray_word(config: str) -> None:
    """Refuse a word after the name of what is run, which MONAI takes for the name of what to initialise."""
    workflow = _running(ConfigWorkflow.run).get("self")
    if workflow is not None and workflow.init_id not in workflow.parser:
        show_input_errors_plainly()
        raise InputError(
            f"{workflow.init_id}: {config}.json has nothing of that name to initialise: give a list in one word, such "
            "as --images \"['a.png','b.png']\"."
        )


def _explain_parts(parser: ConfigParser, asked: Mapping[str, Any]) -> None:
    """Say in one line where a component cannot be made with a part of it that the user has set."""
    parts = {name: ReferenceResolver.split_id(name)[:-1] for name in asked}
    owners = {name: parser.get("::".join(above), {}) for name, above in parts.items() if above}
    targets: dict[str, list[str]] = {}
    for name, owner in owners.items():
        if isinstance(owner, Mapping) and "_target_" in owner:
            targets.setdefault(str(owner["_target_"]), []).append(name)
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        chain = [error]
        while (cause := chain[-1].__cause__) is not None and cause not in chain:
            chain.append(cause)
        text = "\n".join(map(str, chain))
        names = next(
            (n for t, n in targets.items() if re.search(rf"(component|path:?) '([\w.]*\.)?{re.escape(t)}'", text)), None
        )
        if names is None:
            previous(kind, error, traceback)
        else:
            told = " or ".join(f"{name}={asked[name]!r}" for name in names)
            previous(InputError, InputError(f"{told} cannot be used: {chain[-1]}"), traceback)

    if targets:
        sys.excepthook = hook


def _running(function: Callable[..., Any]) -> Mapping[str, Any]:
    """Local variables of the innermost call of a function that is under way, or nothing.

    MONAI gives an expression what it refers to and no more, and forgets what the user asked for.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return {} if frame is None else frame.f_locals


def _restore(parser: ConfigParser, asked: Mapping[str, Any]) -> None:
    """Set what was lost on the way from the command line: None, which MONAI drops, and paths, which fire evaluates."""
    for name, value in asked.items():
        if value is None:
            _put(parser, name, None, "the command line")
        elif name in VARIABLES and is_place(VARIABLES[name].kind) and not isinstance(value, list):
            typed = _typed(name, value)
            if typed is not None and typed != value:
                parser[name] = as_written(typed)


def _typed(name: str, value: Any) -> str | None:
    """The word of the command line that fire read as this value: 2024, 1_2 and a,b#c are folders, too."""
    from fire.parser import DefaultParseValue

    for word, after in zip(sys.argv[1:], [*sys.argv[2:], ""]):
        option, equals, text = word.partition("=")
        text = text if equals else after
        if option.startswith("-") and option.lstrip("-").replace("-", "_") == name and DefaultParseValue(text) == value:
            return text
    return None


def check_config(parser: ConfigParser, config: str, entries: Iterable[str] = ()) -> None:
    """Check all names and values of a config, and set the values that are meant, such as a number for its text.

    Args:
        parser: config, parsed.
        config: name of the config, for messages.
        entries: ids that are run, so that no other has to refer to them.

    Raises:
        InputError: naming all that is wrong.
    """
    names = [name for name in VARIABLES if name in parser.get()]
    computed = [name for name in names if _is_computed(parser[name])]
    faults = [*_slips(parser.get(), config, entries), *_wrong_arguments(parser.get(), parser.locator)]
    if "train" in parser.get():
        from .handlers.order import out_of_order  # with all handlers, which other configs have few of

        faults += out_of_order(parser.get())
    _read_booleans(parser)
    faults += [fault for name in names if name not in computed for fault in _set_literal(parser, name)]
    _refuse(faults)
    _refuse([fault for name in computed for fault in _set_computed(parser, name)])
    single = [name for name in names if is_place(VARIABLES[name].kind) and not isinstance(parser[name], list)]
    _refuse(find_clashes({n: parser.get_parsed_content(n) for n in names if n not in (*single, "augmentation")}))


def _read_booleans(parser: ConfigParser) -> None:
    """Read true and false of the command line where they are set in the network itself, which takes no text."""
    network = parser["network_def"] if "network_def" in parser.get() else None
    for name, value in list(network.items()) if isinstance(network, Mapping) else ():
        if isinstance(value, str) and value.lower() in ("true", "false"):
            parser[f"network_def::{name}"] = as_bool(value)


def _is_computed(value: Any) -> bool:
    """Whether a value, or one of a list, is code or a reference."""
    values = value if isinstance(value, (list, tuple)) else [value]
    return any(isinstance(v, str) and v.startswith(SPECIAL) for v in values)


def _refuse(faults: Sequence[str]) -> None:
    if faults:
        many = f"{len(faults)} settings cannot be used:\n  " if len(faults) > 1 else ""
        raise InputError(many + "\n  ".join(faults))


def _set_literal(parser: ConfigParser, name: str) -> Iterator[str]:
    """Read a value that is no expression; yields what is wrong with it."""
    variable, value = VARIABLES[name], parser[name]
    places = is_place(variable.kind)
    try:
        # for # MONAI has put :: into every text
        meant = variable.read(_map_texts(lambda text: text.replace("::", "#"), value) if places else value)
    except InputError as error:
        yield str(error)
        return
    meant = _map_texts(as_written, meant) if places else meant
    if type(meant) is not type(value) or meant != value:
        parser[name] = meant


def _map_texts(function: Callable[[str], str], value: Any) -> Any:
    """A text or a list of texts through a function; anything else as it is."""
    if isinstance(value, (list, tuple)):
        return [_map_texts(function, part) for part in value]
    return function(value) if isinstance(value, str) else value


def _set_computed(parser: ConfigParser, name: str) -> Iterator[str]:
    """Read a value that an expression comes to; yields what is wrong with it."""
    try:
        value = parser.get_parsed_content(name)
    except Exception as error:  # an expression may raise anything
        if find_input_error(error) is None:  # else it is raised again, by whatever needs the value
            reason: BaseException = error
            while reason.__cause__ is not None:
                reason = reason.__cause__
            yield f"{name}={parser[name]!r} cannot be evaluated: {reason}."
        return
    try:
        meant = VARIABLES[name].read(value)
    except InputError as error:
        yield str(error)
        return
    if type(meant) is not type(value) or meant != value:
        parser[name] = meant


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, str):
        yield content
    elif isinstance(content, (Mapping, list, tuple)):
        for part in content.values() if isinstance(content, Mapping) else content:
            yield from _texts(part)


def _references(content: Mapping[str, Any]) -> set[str]:
    """All ids that something in a config refers to."""
    return {id for text in _texts(content) for id in ReferenceResolver.match_refs_pattern(text)}


def _touch(one: str, other: str) -> bool:
    """Whether one of two ids is, or holds, the other."""
    return one == other or one.startswith(f"{other}::") or other.startswith(f"{one}::")


def _slips(content: Mapping[str, Any], config: str, entries: Iterable[str]) -> Iterator[str]:
    """Names that are neither declared nor referred to by anything; those that begin with _ are left alone."""
    used = _references(content) | set(entries)
    mine = {name for name, variable in VARIABLES.items() if config in variable.configs or config not in CONFIGS}
    for group, parts in PARTS.items():
        members = content.get(group) if group else content
        known = parts if group else {*parts, *VARIABLES, *TRACKING}
        for name in members if isinstance(members, Mapping) else ():
            id = f"{group}::{name}" if group else name
            if name not in known and not name.startswith("_") and not any(_touch(id, other) for other in used):
                hint = suggest(name, parts if group else {*parts, *mine, *OPTIONS_OF_RUN})
                path = id.replace("::", "#")
                yield f"{path}: is not a variable of {config}.json, and nothing refers to it{hint or '.'}"


def _wrong_arguments(content: Any, locator: Any, id: str = "") -> Iterator[str]:
    """Arguments that the classes and functions of a config do not have, and such that are not there at all."""
    if isinstance(content, Mapping) and isinstance(content.get("_target_"), str):
        component = ConfigComponent(content, locator=locator)
        target = component.resolve_module_name()
        if not component.is_disabled() and not target.startswith(SPECIAL):
            yield from _compare(target, component.resolve_args(), id)
    parts = content.items() if isinstance(content, Mapping) else enumerate(content)
    for name, part in parts:
        if isinstance(part, (Mapping, list, tuple)):
            yield from _wrong_arguments(part, locator, f"{id}#{name}" if id else str(name))


def _compare(target: str, arguments: Iterable[str], id: str) -> Iterator[str]:
    found = pydoc.locate(target)
    if found is None:
        package, (module, _, name) = target.split(".")[0], target.rpartition(".")
        if not module or pydoc.locate(package) is not None:  # else it may be found once MONAI has the bundle's folder
            hint = suggest(name, dir(pydoc.locate(module)) if module else ())
            yield f"{id}#_target_: there is no {target}{hint or '.'}"
        return
    try:
        parameters = inspect.signature(found).parameters  # type: ignore[arg-type]
    except (TypeError, ValueError):  # some that are written in C do not say
        return
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in arguments:
            if name not in parameters and not name.startswith("_"):
                yield f"{id}#{name}: {target} has no such argument{suggest(name, parameters) or '.'}"


def read_config(config_file: str | Path | Sequence[str | Path], **override: Any) -> ConfigParser:
    """Read a config of the bundle, set variables of it, and check it.

    Args:
        config_file: config, or list of configs, of which later ones take precedence.
        **override: config variables; parts of one are set by ``variable#part`` or ``variable::part``.

    Raises:
        InputError: for a config that is not there or cannot be read, and naming all that is wrong with it.
    """
    parser = merge_configs(config_file, **override)
    parser.parse()
    check_config(parser, Path(str(ensure_tuple(config_file)[0])).stem)
    return parser


def merge_configs(config_file: str | Path | Sequence[str | Path], **override: Any) -> ConfigParser:
    """Read a config of the bundle and set variables of it, as :func:`read_config` does, and leave the rest unchecked.

    Raises:
        InputError: for a config that is not there or cannot be read, and parts that it does not have.
    """
    files = _load_all(config_file)
    parser = ConfigParser(config={ConfigParser.meta_key: {}})
    for file, content in files:
        for name, value in content.items():
            _put(parser, name, value, file)
    if "network_def" not in parser.get():
        raise InputError(f"{', '.join(dict(files))}: only variables: name the bundle's config before them.")
    for name, value in override.items():
        _put(parser, name, value, "the command line")
    return parser


def _put(parser: ConfigParser, name: str, value: Any, where: str) -> None:
    """Set a value by its id, whose last part alone may be new."""
    content: Any = parser.get()
    parts = ReferenceResolver.split_id(name.removeprefix("+"))
    for part in parts[:-1]:
        inner = content.get(part) if isinstance(content, Mapping) else None
        if isinstance(content, list) and part.isdigit() and int(part) < len(content):
            inner = content[int(part)]
        if not isinstance(inner, (Mapping, list)):
            hint = suggest(part, content) if isinstance(content, Mapping) else ""
            raise InputError(f"{name}: {where} sets a part of {part}, which is not there{hint or '.'}")
        content = inner
    if isinstance(content, list) and not (parts[-1].isdigit() and int(parts[-1]) < len(content)):
        raise InputError(f"{name}: {where} sets number {parts[-1]} of a list of {len(content)}, counted from 0.")
    try:
        merge_kv(parser, name, value)
    except ValueError as error:
        raise InputError(f"{name}: {where} adds {value!r} to something of another kind.") from error


def _load_all(config_file: Any) -> list[tuple[str, dict[str, Any]]]:
    """Load config and overlays, by their files; a config behind others would replace all that they set."""
    files = [(str(file), _load(str(file))) for file in ensure_tuple(config_file)]
    for file, content in files[1:]:
        if content.keys() >= WHOLE:
            raise InputError(f"{file}: would replace what {files[0][0]} sets: name it first, with overlays alone.")
    return files


def _load(file: str) -> dict[str, Any]:
    if not Path(file).is_file():
        raise InputError(f"{file}: no such config: give --config_file FILE, or --bundle_root DIR with configs/ in it.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # of a name that is there twice
            content: Any = ConfigParser.load_config_file(file)
    except json.JSONDecodeError as error:
        raise InputError(f"{file}: is not JSON: line {error.lineno}, column {error.colno}: {error.msg}.") from error
    except OptionalImportError as error:
        raise InputError(f"{file}: YAML needs another package: pip install pyyaml; or write it as JSON.") from error
    except Exception as error:  # YAML's errors have no class of their own where it is not installed
        raise InputError(f"{file}: cannot be read: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise InputError(f"{file}: holds a {type(content).__name__}, no variables with values.")
    return content
