"""The commands: a file each, with a function of the same name, and the table of all."""

import difflib
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from dti_fast.errors import UserError

if TYPE_CHECKING:
    from cyclopts import App, CycloptsError

# In the order of the help.  A command is imported when it is called.
COMMANDS = {
    "train": "Learn a concept from pictures.",
    "generate": "Generate pictures with learned concepts.",
    "blend": "Draw what lies between two learned concepts.",
    "inspect": "Print what an embedding file holds.",
    "convert": "Write an embedding in another layout.",
    "plan": "Predict the memory of a training run.",
    "evaluate": "Measure how good learned concepts are.",
    "doctor": "Print what a bug report needs.",
}


def make_app() -> "App":
    """The command line; `--config` takes a TOML file with the same keys as the flags."""
    from typing import Annotated

    from cyclopts import App, Group, Parameter
    from cyclopts.types import ExistingFile

    from dti_fast import __version__
    from dti_fast.commands.config_file import ConfigFile, check_whole_numbers

    app = App(
        name="dti-fast",
        version=__version__,
        help_format="markdown",  # plain text keeps the line breaks of the source
        help="Teach a text-to-image model a new concept as a direction.",
        # Names as in Python; dashes for underscores are taken too.
        default_parameter=Parameter(negative="", name_transform=str, show_default=_default),
    )
    for position, (name, summary) in enumerate(COMMANDS.items()):
        app.command(f"dti_fast.commands.{name}:{name}", name=name, help=summary, sort_key=position)

    for each in (app, app.meta):
        each.suppress_keyboard_interrupt = False  # it would lose the number of the signal
    file = Group("Settings from a file", sort_key=1000)

    @app.meta.default
    def meta(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[
            ExistingFile | None,
            Parameter(group=file, help="TOML file with the same names as the flags, which override it."),
        ] = None,
    ):
        if tokens and not tokens[0].startswith("-") and tokens[0] not in COMMANDS:
            near = difflib.get_close_matches(tokens[0], COMMANDS, n=1)
            there_are = f"did you mean {near[0]}?" if near else f"there are {', '.join(COMMANDS)}"
            raise UserError(f"there is no command {tokens[0]!r}; {there_are}")
        app.config = [*([ConfigFile(config)] if config else []), check_whole_numbers]
        return app(tokens, exit_on_error=False, print_error=False)

    return app


def _default(value: object) -> str | None:
    """A default as help shows it; what is off, and what depends on other settings, is not shown."""
    if value is None or value is False:
        return None
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def describe(error: "CycloptsError") -> str:
    """What is wrong with a command line, in a line."""
    from cyclopts.exceptions import MissingArgumentError, UnknownOptionError, UnusedCliTokensError

    from dti_fast.commands.foreign_flags import explain

    train = bool(error.command_chain) and error.command_chain[0] == "train"
    if isinstance(error, UnknownOptionError):
        name = (error.token.keyword or error.token.value).partition("=")[0].lstrip("-").replace("-", "_")
        known = [known.lstrip("-") for argument in error.argument_collection for known in argument.names]
        return explain(name, known, foreign=train)
    if isinstance(error, UnusedCliTokensError):
        what = " ".join(error.unused_tokens)
        if train and Path(what).is_dir():
            return f"what is {what!r}? A folder of pictures is given as --train_data_dir {shlex.quote(what)}"
        return f"what is {what!r}? A value follows the name of its setting; a switch takes none"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        if error.keyword is None and not error.argument.tokens:
            return f"{error.argument.name} is missing"
        values = ": latest, or a checkpoint file" if error.argument.name == "--resume_from_checkpoint" else ""
        return f"{error.argument.name} needs a value{values}"
    return str(error)
