"""The commands: a file each, with a function of the same name, and the table of all."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cyclopts import App

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

    from cyclopts import App, Parameter
    from cyclopts.config import Toml
    from cyclopts.types import ExistingFile

    from dti_fast import __version__

    app = App(
        name="dti-fast",
        version=__version__,
        help_format="markdown",  # plain text keeps the line breaks of the source
        help="Teach a text-to-image model a new concept as a direction.",
        default_parameter=Parameter(negative=""),
    )
    for position, (name, summary) in enumerate(COMMANDS.items()):
        app.command(f"dti_fast.commands.{name}:{name}", name=name, help=summary, sort_key=position)

    @app.meta.default
    def meta(
        *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        config: Annotated[ExistingFile | None, Parameter(help="TOML file with the same keys as the flags.")] = None,
    ):
        if config is not None:
            app.config = Toml(config, use_commands_as_keys=False)
        return app(tokens, exit_on_error=False, print_error=False)

    return app
