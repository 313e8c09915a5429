"""`--config FILE.yaml`: the same names as a command's flags, and the flags win.

A file's entries are rewritten as flags in front of the user's own, so that one parser checks both
with the same messages.
"""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from prunekit.errors import PrunekitError

_SCALARS = (str, int, float, bool)
_RESOLVERS = (
    ("null", r"^(?:~|null|)$", [*"~n", ""]),
    ("bool", r"^(?:true|false)$", [*"tf"]),
    ("int", r"^[-+]?[0-9]+$", [*"-+0123456789"]),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", [*"-+.0123456789"]),
)


def apply_config(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Arguments `argv` of one command, with those of its `--config` file put in front.

    Args:
        parser: The command's parser; its positionals and nested keys become its defaults.
        argv: Arguments behind the command's name.

    Raises:
        PrunekitError: The file is missing or not a YAML mapping, or has a key that the command
            doesn't know; the message names the nearest.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--config")
    try:
        path = finder.parse_known_args(list(argv))[0].config
    except argparse.ArgumentError as error:  # `--config` without a value
        raise PrunekitError("--config needs a file: --config FILE.yaml") from error
    if path is None:
        return list(argv)
    actions = {action.dest: action for action in parser._actions if action.dest != "help"}
    nested = parser.get_default("nested_keys") or ()
    given = {word.partition("=")[0] for word in argv}
    front: list[str] = []
    for key, value in _read(Path(path)).items():
        name = str(key).replace("-", "_")
        if name in nested:
            parser.set_defaults(**{name: value})
        elif name not in actions or name == "config":
            known = [name.replace("_", "-") for name in [*actions, *nested] if name != "config"]
            near = difflib.get_close_matches(str(key).replace("_", "-"), known, n=1, cutoff=0)
            _fail(path, f"unknown key '{key}'", f"did you mean '{near[0]}'?")
        elif value is None or given & set(actions[name].option_strings):
            continue
        elif not actions[name].option_strings:
            values = value if isinstance(value, list) else [value]
            several = actions[name].nargs == "*"
            texts = [_text(path, key, one) for one in (values if several else [value])]
            parser.set_defaults(**{name: texts if several else texts[0]})
        else:
            front += _flags(path, key, value, actions[name])
    return [*front, *argv]


def _read(path: Path) -> dict[Any, Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """YAML 1.2's plain scalars: 1.1 reads `pattern: 2:4` as the base-60 number 124."""

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, starts in _RESOLVERS:
        Loader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(pattern), starts)
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except FileNotFoundError:
        _fail(path, "no such file", "check --config")
    except (OSError, UnicodeDecodeError) as error:
        raise PrunekitError(f"{path}: can't be read ({error}); check --config") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise PrunekitError(f"{path}: not valid YAML{where}; correct it there") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        _fail(path, "not a mapping of names to values", "write lines such as 'pattern: 2:4'")
    return data


def _flags(path: Path, key: str, value: Any, action: argparse.Action) -> list[str]:
    flag = action.option_strings[-1]
    if action.nargs == 0:
        if not isinstance(value, bool):
            _fail(path, f"'{key}' is {value!r}", "write true or false")
        return [flag] if value else []
    values = value if isinstance(value, list) else [value]
    # one word each, so that a value such as -1 is no flag
    return [f"{flag}={_text(path, key, one)}" for one in values]


def _text(path: Path, key: str, value: Any) -> str:
    if not isinstance(value, _SCALARS):
        _fail(path, f"'{key}' is a {type(value).__name__}", "write one value")
    return str(value)


def _fail(path: object, what: str, fix: str) -> NoReturn:
    raise PrunekitError(f"{path}: {what}; {fix}")
