"""log.jsonl in the output folder: a line of JSON for every `Log`."""

import json
from dataclasses import asdict

from dti_fast.files import write_text
from dti_fast.trainer.loggers import Log, Logger, Start


class Jsonl(Logger):
    """A resumed run keeps the lines up to the step at which it goes on; its seconds count on from theirs."""

    def start(self, start: Start) -> None:
        self.path = start.folder / "log.jsonl"
        self.lines, self.earlier_seconds = [], 0.0
        if start.first_step and self.path.is_file():
            lines = self.path.read_text(encoding="utf-8").splitlines()
            self.lines = [line for line in lines if json.loads(line)["step"] <= start.first_step]
            self.earlier_seconds = json.loads(self.lines[-1])["seconds"] if self.lines else 0.0

    def log(self, log: Log) -> None:
        self.lines.append(json.dumps(asdict(log) | {"seconds": round(self.earlier_seconds + log.seconds, 3)}))
        write_text("\n".join(self.lines) + "\n", self.path)
