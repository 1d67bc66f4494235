"""How a run tells what happens: `Logger`, a file for each kind, and the table of all."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dti_fast.trainer.result import Result

LOGGERS = {
    "console": "dti_fast.trainer.loggers.console:Console",
    "jsonl": "dti_fast.trainer.loggers.jsonl:Jsonl",
}


@dataclass(frozen=True)
class Start:
    """What is known when the first step is about to be made.

    Attributes:
        folder: the run's output folder, which exists.
        settings: names and values, as config.toml has them.
        first_step: steps that an earlier run made already.
        steps: of the whole run.
        samples_per_step: pictures.
    """

    folder: Path
    settings: dict
    first_step: int
    steps: int
    samples_per_step: int


@dataclass(frozen=True)
class Log:
    """What is read from the device every `logging_steps`.

    Attributes:
        step: steps made, an earlier run's included.
        loss: mean since the last of these.
        learning_rate: of the last step.
        angle_degrees: for each text encoder the mean angle between directions and initial directions.
        magnitude: for each text encoder the mean norm of the vectors.
        seconds: since the start of this process's first step.
    """

    step: int
    loss: float
    learning_rate: float
    angle_degrees: list[float]
    magnitude: list[float]
    seconds: float


class Logger:
    """Takes what a run says; a subclass overrides what it cares for.  Nothing here may wait for the device."""

    def phase(self, what: str) -> None:
        """Before the first step, and around previews: what takes the time now; an empty string when that is over."""

    def message(self, line: str) -> None:
        """A line for the person who waits."""

    def start(self, start: Start) -> None:
        """Before the first step."""

    def step(self, step: int) -> None:
        """After every step, which a GPU may not have carried out yet; `step` of them are made."""

    def log(self, log: Log) -> None:
        """Every `logging_steps`, and after the last step."""

    def checkpoint(self, step: int, path: Path) -> None:
        """After a checkpoint was written."""

    def preview(self, step: int, path: Path) -> None:
        """After pictures were drawn."""

    def end(self, result: Result | None) -> None:
        """At the end, always; None if the run failed."""


class Loggers:
    """Several loggers as one: has the methods of `Logger`."""

    def __init__(self, loggers: Sequence[Logger]):
        self.loggers = list(loggers)

    def __getattr__(self, event: str) -> Callable[..., None]:
        def tell(*arguments) -> None:
            for logger in self.loggers:
                getattr(logger, event)(*arguments)

        return tell


def make_logger(name: str) -> Logger:
    """The logger that `LOGGERS` has under `name`."""
    module, _, attribute = LOGGERS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)()
