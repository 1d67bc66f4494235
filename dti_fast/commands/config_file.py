"""`--config`: a TOML file with the same names as the flags, which override it."""

import tomllib
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from cyclopts import App
from cyclopts.argument import ArgumentCollection
from cyclopts.config import Dict

from dti_fast.commands.foreign_flags import explain
from dti_fast.errors import UserError

_WORDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text in quotes", list: "a list"}


class ConfigFile:
    """What cyclopts asks for settings that the command line does not give.

    Raises:
        UserError: names the file, and the line or the key, for a file that is no TOML, holds a table, a key that the
            command does not have, or a value of another type.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self.values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
        except UnicodeDecodeError:
            raise UserError(f"{str(path)!r} is not UTF-8 text; save it as such") from None
        except tomllib.TOMLDecodeError as error:
            raise UserError(f"{str(path)!r} is not TOML: {error}") from None

    def __call__(self, app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
        hints = {
            _plain(name): argument.hint
            for argument in arguments
            if argument.parse
            for name in argument.names
            if name.startswith("--")
        }
        for key, value in self.values.items():
            if isinstance(value, dict):
                raise UserError(f"{str(self.path)!r} has a table [{key}]; write its lines at the top, without tables")
            if _plain(key) not in hints:
                raise UserError(f"{str(self.path)!r}: {explain(_plain(key), hints, 'train' in commands)}")
            wanted = _types(hints[_plain(key)])
            if not _fits(value, wanted):
                words = " or ".join(dict.fromkeys(_WORDS[kind] for kind in wanted))
                raise UserError(f"{str(self.path)!r}: {key} must be {words}, not {value!r}")
        Dict(self.values, source=str(self.path), use_commands_as_keys=False)(app, commands, arguments)


def check_whole_numbers(app: App, commands: tuple[str, ...], arguments: ArgumentCollection) -> None:
    """Raise a UserError for a number with a fraction where a whole one is asked for: cyclopts would round it."""
    for argument in arguments:
        kinds = _types(argument.hint)
        if int not in kinds or float in kinds:
            continue
        for token in argument.tokens:
            with suppress(ValueError):
                if not float(token.value).is_integer():
                    raise UserError(f"{argument.name} must be a whole number, not {token.value}")


def _plain(name: str) -> str:
    return name.lstrip("-").replace("-", "_")


def _types(hint: Any) -> list[type]:
    """The kinds of TOML value that a setting of type `hint` takes, of `_WORDS`."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _types(arguments[0])
    if origin in (Union, UnionType):
        return [kind for argument in arguments if argument is not type(None) for kind in _types(argument)]
    if origin is list:
        return [list, *_types(arguments[0])]
    if origin is Literal or hint is Path:
        return [str]
    return [hint]


def _fits(value: object, wanted: Collection[type]) -> bool:
    if isinstance(value, list):
        return list in wanted and all(_fits(item, [kind for kind in wanted if kind is not list]) for item in value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int in wanted or float in wanted
    return type(value) in wanted
