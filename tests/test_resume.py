"""Killed, interrupted, out of disk: the run goes on, the embedding is the same bit for bit, and nothing is lost."""

import json
import random
import shlex
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from runs import ENVIRONMENT, command, refused, train_arguments, write_pictures
from safetensors.torch import load_file

from dti_fast import TrainConfig
from dti_fast.files import read_tensors, write_tensors
from dti_fast.trainer import output
from dti_fast.trainer.step import learning_rates

STEPS = 50
SETTINGS = {
    "max_train_steps": STEPS,
    "checkpointing_steps": 1,
    "logging_steps": 7,
    "beta": 0.5,
    "lr_scheduler": "cosine",
}
DIES_WHILE_WRITING = """
import os, signal, dti_fast.files as files
write = files.save_file
def save_half(tensors, path, metadata):
    write(tensors, path, metadata=metadata)
    if "checkpoint-000017" in str(path):
        os.truncate(path, 100)
        os.kill(os.getpid(), signal.SIGKILL)
files.save_file = save_half
from dti_fast.cli import main
main()
"""
DISK_IS_FULL = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)), resource.RLIM_INFINITY))
from dti_fast.cli import main
main()
"""


@pytest.fixture(scope="module")
def unbroken(tiny_pipelines, pictures, tmp_path_factory):
    """Output folders of runs that nobody killed, one for each family."""
    folders = {}
    for family in ("sd15", "sdxl"):
        folders[family] = tmp_path_factory.mktemp("unbroken")
        run = command(*train_arguments(tiny_pipelines[family], pictures, folders[family], **SETTINGS))
        assert run.returncode == 0, run.stderr
    return folders


def assert_same(out, unbroken):
    files = sorted(unbroken.glob("*.safetensors"))
    assert files
    for file in files:
        ours, theirs = load_file(out / file.name), load_file(file)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (out, unbroken)]
    assert [line["step"] for line in logs[0]] == [line["step"] for line in logs[1]]
    seconds = [line["seconds"] for line in logs[0]]
    assert seconds == sorted(seconds)  # they go on where the killed run had come to
    assert not list(out.rglob("*.tmp"))


def start(*arguments, code: str | None = None) -> subprocess.Popen:
    program = ["-m", "dti_fast.cli"] if code is None else ["-c", code]
    return subprocess.Popen(
        [sys.executable, *program, *map(str, arguments)], env=ENVIRONMENT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a job in the background ignores
    )  # fmt: skip


def wait_for_checkpoint(process, out, after=()):
    while process.poll() is None and sorted((out / "checkpoints").glob("*.safetensors")) == list(after):
        time.sleep(0.01)


def test_killed_at_random_moments(tiny_pipelines, pictures, tmp_path, unbroken):
    arguments = train_arguments(tiny_pipelines["sdxl"], pictures, tmp_path, **SETTINGS)
    rng = random.Random("sdxl")
    for kill in range(2):
        before = sorted((tmp_path / "checkpoints").glob("*.safetensors"))
        process = start(*arguments, *(["--resume_from_checkpoint", "latest"] if kill else []))
        wait_for_checkpoint(process, tmp_path, before)
        time.sleep(rng.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL  # it had not come to its end
    run = command(*arguments, "--resume_from_checkpoint", "latest")
    assert run.returncode == 0, run.stderr
    assert "resuming after step" in run.stderr
    assert_same(tmp_path, unbroken["sdxl"])


def test_killed_while_writing_a_checkpoint(tiny_pipelines, pictures, tmp_path, unbroken):
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path, **SETTINGS)
    process = start(*arguments, code=DIES_WHILE_WRITING)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    names = sorted(p.name for p in (tmp_path / "checkpoints").iterdir())
    assert names == [f"checkpoint-0000{i}.safetensors" for i in (14, 15, 16)] + ["checkpoint-000017.safetensors.tmp"]
    assert all(p.stat().st_size < 16_384 for p in (tmp_path / "checkpoints").iterdir())
    run = command(*arguments, "--resume_from_checkpoint", "latest")
    assert run.returncode == 0, run.stderr
    assert "resuming after step 16" in run.stderr
    assert_same(tmp_path, unbroken["sd15"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_saves_a_checkpoint_and_says_how_to_go_on(tiny_pipelines, pictures, tmp_path, unbroken, number):
    out = tmp_path / "my run"
    settings = {**SETTINGS, "checkpointing_steps": 1000}
    process = start(*train_arguments(tiny_pipelines["sd15"], pictures, out, **settings))
    while process.poll() is None and not (out / "log.jsonl").is_file():  # so that steps are being made
        time.sleep(0.01)
    process.send_signal(number)
    told, errors = process.communicate()
    assert process.returncode == 128 + number, errors
    assert "stopping after this step" in errors
    assert "Traceback" not in errors
    (checkpoint,) = (out / "checkpoints").iterdir()
    step = int(read_tensors(checkpoint)[1]["step"])
    assert 7 <= step < STEPS
    assert f"Stopped after step {step}. To go on: " in told
    go_on = told.partition("To go on: ")[2].strip()
    again = command(*shlex.split(go_on)[1:])
    assert again.returncode == 0, again.stderr
    assert f"resuming after step {step}" in again.stderr
    assert_same(out, unbroken["sd15"])


WAITS = """
import sys, time
import {module} as module
def wait(*arguments, **settings):
    print("waiting", file=sys.stderr, flush=True)
    time.sleep(600)
module.{name} = wait
from dti_fast.cli import main
main()
"""


@pytest.mark.parametrize(
    ("module", "name", "left"),
    [
        ("dti_fast.session", "load_backbone", False),
        ("dti_fast.trainer.run", "save_preview", True),  # after the last step
    ],
    ids=["loading", "drawing"],
)
def test_a_signal_while_no_step_is_made_ends_the_run_at_once(tiny_pipelines, pictures, tmp_path, module, name, left):
    out = tmp_path / "out"
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, out, max_train_steps=3, num_validation_images=1)
    process = start(*arguments, code=WAITS.format(module=module, name=name))
    while "waiting" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    told, errors = process.communicate(timeout=120)  # the wait is longer
    assert process.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in errors
    assert out.exists() == left
    if left:  # nothing but the preview is missing
        assert "To go on from the last checkpoint: dti-fast train --config" in told
        assert (out / "learned_embeds.safetensors").is_file()


def test_a_full_disk_is_one_line_and_loses_nothing(tiny_pipelines, pictures, tmp_path):
    arguments = train_arguments(tiny_pipelines["sdxl"], pictures, tmp_path, checkpointing_steps=2, logging_steps=100)
    first = command(*arguments, "--max_train_steps", 3, "--num_vectors", 16)
    assert first.returncode == 0, first.stderr
    before = {path: path.read_bytes() for path in sorted(tmp_path.rglob("*.*")) if path.is_file()}
    resume = [*arguments, "--max_train_steps", 6, "--num_vectors", 16, "--resume_from_checkpoint", "latest"]
    process = start(4000, *resume, code=DISK_IS_FULL)
    _, errors = process.communicate()
    assert process.returncode == 2, errors
    assert "Traceback" not in errors
    assert errors.splitlines()[-1].startswith("error: ")
    assert "checkpoint-000004.safetensors" in errors.splitlines()[-1]
    assert not list(tmp_path.rglob("*.tmp"))
    for path, content in before.items():
        if path.name not in ("config.toml", "log.jsonl"):
            assert path.read_bytes() == content
    again = command(*resume)
    assert again.returncode == 0, again.stderr


def test_two_runs_in_one_folder(tiny_pipelines, pictures, tmp_path):
    """The second is refused while the first is at work, and also if it has come and gone in the meantime."""
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", **SETTINGS)
    process = start(*arguments)
    wait_for_checkpoint(process, tmp_path / "out")
    refused(command(*arguments), "holds a run already: go on with it by --resume_from_checkpoint latest")
    busy = command(*arguments, "--overwrite")
    refused(busy, "another run is writing to")
    assert "torchrun" not in busy.stderr
    process.send_signal(signal.SIGTERM)
    assert process.wait() == 128 + signal.SIGTERM


def test_a_run_that_came_and_went_while_the_model_was_loading_is_kept(tiny_pipelines, pictures, tmp_path, monkeypatch):
    from dti_fast import session

    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", max_train_steps=2)
    load, others = session.load_backbone, []

    def load_slowly(*args, **settings):
        monkeypatch.setattr(session, "load_backbone", load)
        others.append(command(*arguments))
        return load(*args, **settings)

    monkeypatch.setattr(session, "load_backbone", load_slowly)
    refused(command(*arguments), "holds a run already")
    assert others[0].returncode == 0, others[0].stderr
    assert (tmp_path / "out" / "learned_embeds.safetensors").is_file()


def test_two_ranks_of_a_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    held, end = threading.Event(), threading.Event()

    def hold():
        with output.locked(tmp_path):
            held.set()
            end.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    held.wait(60)
    try:
        with pytest.raises(output.UserError, match="started 2 times: a run uses one device, leave out torchrun"):
            output.locked(tmp_path).__enter__()
    finally:
        end.set()
        other.join()


def test_locked_makes_the_folder_clears_it_up_and_leaves_none_that_came_to_nothing(tmp_path):
    with output.locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b").is_dir()
    assert not (tmp_path / "a" / "b").exists()
    leftovers = [tmp_path / "log.jsonl.tmp", tmp_path / "checkpoints" / "checkpoint-000017.safetensors.tmp"]
    leftovers[1].parent.mkdir()
    for path in leftovers:
        path.touch()
    with output.locked(tmp_path):
        assert not any(path.exists() for path in leftovers)


def test_a_run_is_replaced_only_if_asked_for(tiny_pipelines, pictures, tmp_path):
    model, out = tiny_pipelines["sd15"], tmp_path / "out"

    def run(**settings):
        settings = {"max_train_steps": 4, "checkpointing_steps": 4, **settings}
        return command(*train_arguments(model, pictures, out, **settings))

    sdxl = train_arguments(tiny_pipelines["sdxl"], pictures, out, max_train_steps=6, save_steps=3)
    assert command(*sdxl).returncode == 0
    before = {path: path.read_bytes() for path in out.rglob("*.safetensors")}
    refused(run(), "holds a run already")
    elsewhere = write_tensors({"x": torch.zeros(1)}, tmp_path / "x.safetensors") or tmp_path / "x.safetensors"
    refused(run(resume_from_checkpoint=elsewhere), "holds a run already")  # it goes on with another folder's run
    assert {path: path.read_bytes() for path in out.rglob("*.safetensors")} == before
    assert run(overwrite=True).returncode == 0
    left = sorted(str(path.relative_to(out)) for path in out.rglob("*.safetensors"))
    assert left == ["checkpoints/checkpoint-000004.safetensors", "learned_embeds.safetensors", "toy.safetensors"]


def test_nothing_to_resume(tiny_pipelines, pictures, tmp_path):
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", resume_from_checkpoint="latest")
    refused(command(*arguments), "nothing to resume in", tmp_path / "out")


@pytest.mark.parametrize("scheduler", ["constant", "cosine"])
def test_a_finished_run_is_prolonged(tiny_pipelines, pictures, tmp_path, scheduler):
    """The further steps have the learning rates of the longer run, and the first ones those that they had."""

    def run(out, steps, **settings):
        settings = {"lr_scheduler": scheduler, "logging_steps": 1, "max_train_steps": steps, **settings}
        made = command(*train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / out, **settings))
        assert made.returncode == 0, made.stderr
        lines = (tmp_path / out / "log.jsonl").read_text().splitlines()
        return made.stderr, [json.loads(line)["learning_rate"] for line in lines]

    run("a", 4)
    told, rates = run("a", 8, resume_from_checkpoint="latest")
    expected = [learning_rates(TrainConfig(lr_scheduler=scheduler, max_train_steps=n).resolved()) for n in (4, 8)]
    assert rates == pytest.approx([*expected[0].tolist(), *expected[1].tolist()[4:]])
    line = (
        "prolonged from 4 to 8 steps: the learning rate of the further ones follows the cosine schedule of the longer"
    )
    assert (line in told) == (scheduler == "cosine")
    if scheduler == "constant":  # as if it had been asked for at once
        run("b", 8)
        one, other = (load_file(tmp_path / out / "learned_embeds.safetensors") for out in ("a", "b"))
        assert torch.equal(one["<toy>"], other["<toy>"])
    told, _ = run("a", 8, resume_from_checkpoint="latest")
    assert "all 8 steps are made already; a larger --max_train_steps would prolong the run" in told


@pytest.mark.parametrize(
    ("model", "settings", "message"),
    [
        ("sdxl", {"seed": 1}, "other settings: seed (was 42)"),
        ("sd15", {}, "made with another model"),
        ("sdxl", {"resume_from_checkpoint": "missing.safetensors"}, "no checkpoint 'missing.safetensors'"),
        ("sdxl", {"resume_from_checkpoint": "learned_embeds.safetensors"}, "is no checkpoint of a dti-fast run"),
        ("sdxl", {"max_train_steps": 9}, "is past --max_train_steps 9"),
    ],
)
def test_foreign_checkpoints_are_refused(tiny_pipelines, pictures, tmp_path, unbroken, model, settings, message):
    source = unbroken["sdxl"] / "checkpoints" / f"checkpoint-{STEPS:06d}.safetensors"
    settings = {"resume_from_checkpoint": source, **SETTINGS, **settings}
    if settings["resume_from_checkpoint"] == "learned_embeds.safetensors":
        settings["resume_from_checkpoint"] = unbroken["sdxl"] / "learned_embeds.safetensors"
    run = command(*train_arguments(tiny_pipelines[model], pictures, tmp_path / "out", **settings))
    refused(run, message, tmp_path / "out")


def _without(key):
    return lambda tensors, header: tensors.pop(key)


def _poison(tensors, header):
    tensors["directions.1"][0, 0] = torch.nan


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda tensors, header: header.update(method="ti"), "a checkpoint of the method 'ti'"),
        (lambda tensors, header: header.update(step="-5"), "is damaged (the step)"),
        (lambda tensors, header: header.pop("scaler"), "is no checkpoint of a dti-fast run"),
        (_without("directions.0"), "is damaged (directions.0)"),
        (_poison, "is damaged (directions.1)"),
        (lambda tensors, header: tensors["directions.1"][0].zero_(), "is damaged (directions.1)"),
    ],
    ids=["method", "step", "header", "missing", "nan", "zero"],
)
def test_damaged_checkpoints_are_refused(tiny_pipelines, pictures, tmp_path, unbroken, damage, message):
    tensors, header = read_tensors(unbroken["sdxl"] / "checkpoints" / f"checkpoint-{STEPS:06d}.safetensors")
    damage(tensors, header)
    write_tensors(tensors, tmp_path / "damaged.safetensors", header)
    settings = {"resume_from_checkpoint": tmp_path / "damaged.safetensors", **SETTINGS}
    run = command(*train_arguments(tiny_pipelines["sdxl"], pictures, tmp_path / "out", **settings))
    refused(run, message, tmp_path / "out")


def test_a_truncated_checkpoint_says_what_to_do(tiny_pipelines, pictures, tmp_path, unbroken):
    content = (unbroken["sdxl"] / "checkpoints" / f"checkpoint-{STEPS:06d}.safetensors").read_bytes()
    (tmp_path / "half.safetensors").write_bytes(content[: len(content) // 2])
    settings = {"resume_from_checkpoint": tmp_path / "half.safetensors", **SETTINGS}
    run = command(*train_arguments(tiny_pipelines["sdxl"], pictures, tmp_path / "out", **settings))
    refused(run, "delete it to go on from the checkpoint before it", tmp_path / "out")


def test_other_pictures_are_refused(tiny_pipelines, tmp_path):
    model, out = tiny_pipelines["sd15"], tmp_path / "out"
    pictures, fewer = write_pictures(tmp_path / "three"), write_pictures(tmp_path / "two", 2)
    assert command(*train_arguments(model, pictures, out, max_train_steps=2)).returncode == 0
    resumed = command(*train_arguments(model, fewer, out, max_train_steps=2, resume_from_checkpoint="latest"))
    refused(resumed, "made with other pictures or captions")
