"""The console: a moving bar on a terminal, a plain line every few seconds elsewhere."""

import time

from rich.console import Console as RichConsole
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dti_fast.progress import INTERVAL
from dti_fast.trainer.loggers import Log, Logger, Start


class Console(Logger):
    def __init__(self):
        self.console = RichConsole(stderr=True, highlight=False)
        self.status = self.progress = self.run = None
        self.printed = 0.0

    def phase(self, what: str) -> None:
        if self.status is not None:
            self.status.stop()
            self.status = None
        if what and self.console.is_terminal:
            self.status = self.console.status(what)
            self.status.start()
        elif what:
            self.message(what)

    def message(self, line: str) -> None:
        self.console.print(line, markup=False, soft_wrap=True)

    def start(self, start: Start) -> None:
        self.phase("")
        self.run = start
        if self.console.is_terminal:
            self.progress = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[state]}"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task = self.progress.add_task("learning", total=start.steps, completed=start.first_step, state="")
            self.progress.start()

    def step(self, step: int) -> None:
        if self.progress is not None:
            self.progress.update(self.task, completed=step)

    def log(self, log: Log) -> None:
        rate = (log.step - self.run.first_step) * self.run.samples_per_step / max(log.seconds, 1e-9)
        state = f"loss {log.loss:.4f}  moved {max(log.angle_degrees):.1f}°  {rate:.1f} images/s"
        if self.progress is not None:
            self.progress.update(self.task, state=state)
        elif log.step == self.run.steps or time.monotonic() - self.printed >= INTERVAL:
            self.printed = time.monotonic()
            self.message(f"step {log.step} of {self.run.steps}: {state}")

    def end(self, result) -> None:
        self.phase("")
        if self.progress is not None:
            self.progress.stop()
            self.progress = None
