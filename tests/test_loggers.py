"""What a run tells: plain lines where there is no terminal, and a log that a resumed run goes on with."""

import json
from pathlib import Path

import pytest

from dti_fast.trainer.loggers import LOGGERS, Log, Logger, Loggers, Start, console, make_logger
from dti_fast.trainer.loggers.jsonl import Jsonl


def log(step: int, seconds: float, loss: float = 0.5) -> Log:
    return Log(step, loss, 0.04, [1.25, 2.5], [0.4, 0.3], seconds)


def start(folder=Path("unused"), first_step=0) -> Start:
    return Start(folder, {}, first_step, steps=30, samples_per_step=4)


def test_every_logger_in_the_table_can_be_made():
    assert all(isinstance(make_logger(name), Logger) for name in LOGGERS)


def test_several_loggers_hear_the_same_in_order():
    heard = []

    class Hears(Logger):
        def __init__(self, name):
            self.name = name

        def step(self, step):
            heard.append((self.name, step))

    told = Loggers([Hears("a"), Hears("b")])
    told.step(3)
    told.message("nobody overrides this")
    assert heard == [("a", 3), ("b", 3)]


def test_the_console_prints_plain_lines_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(console, "INTERVAL", 0.0)
    logger = make_logger("console")
    logger.phase("loading the model")
    logger.phase("")
    logger.start(start(first_step=10))
    for step in range(11, 31):
        logger.step(step)
        if step % 10 == 0:
            logger.log(log(step, seconds=(step - 10) / 5))
    logger.message("a [line] of any length is one line: " + "x" * 200)
    logger.end(None)
    out, err = capsys.readouterr()
    assert not out
    assert err.splitlines() == [
        "loading the model",
        "step 20 of 30: loss 0.5000  moved 2.5°  20.0 images/s",
        "step 30 of 30: loss 0.5000  moved 2.5°  20.0 images/s",
        "a [line] of any length is one line: " + "x" * 200,
    ]


def test_the_console_prints_the_last_line_and_no_more_than_one_in_an_interval(capsys, monkeypatch):
    monkeypatch.setattr(console.time, "monotonic", lambda: now)
    logger, now = make_logger("console"), 100.0
    logger.start(start())
    for step, now in ((10, 100.0), (20, 104.9), (25, 105.0), (30, 105.1)):  # noqa: B007, what the clock says
        logger.log(log(step, seconds=1.0))
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["10", "25", "30"]


def read(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_a_resumed_log_keeps_the_lines_up_to_its_first_step(tmp_path):
    first = Jsonl()
    first.start(start(tmp_path))
    for step in (10, 20, 25):
        first.log(log(step, seconds=step / 10, loss=float(step)))
    resumed = Jsonl()
    resumed.start(start(tmp_path, first_step=20))
    assert [line["step"] for line in read(tmp_path)] == [10, 20, 25]  # until there is something to say
    resumed.log(log(30, seconds=0.75, loss=0.0))
    assert [(line["step"], line["loss"], line["seconds"]) for line in read(tmp_path)] == [
        (10, 10.0, 1.0), (20, 20.0, 2.0), (30, 0.0, 2.75),
    ]  # fmt: skip
    assert read(tmp_path)[-1].keys() == vars(log(1, 1.0)).keys()
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_a_new_run_begins_a_new_log(tmp_path):
    for first_step, expected in ((0, [10]), (0, [10]), (10, [10, 20])):
        logger = Jsonl()
        logger.start(start(tmp_path, first_step))
        logger.log(log(first_step + 10, seconds=1.0))
        assert [line["step"] for line in read(tmp_path)] == expected


def test_a_resumed_run_without_a_log_begins_one(tmp_path):
    logger = Jsonl()
    logger.start(start(tmp_path, first_step=20))
    logger.log(log(30, seconds=1.0))
    assert [(line["step"], line["seconds"]) for line in read(tmp_path)] == [(30, pytest.approx(1.0))]
