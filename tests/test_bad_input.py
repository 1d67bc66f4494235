"""Bad input: one clear line, exit code 2, nothing half-written."""

import json
import subprocess
import sys

import pytest
import torch
from runs import command, refused, train_arguments, write_pictures

from dti_fast.trainer import step


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train_data_dir": "nowhere"}, "/nowhere'; --train_data_dir takes a folder"),
        ({"pretrained_model_name_or_path": "no such model"}, "there is no model 'no such model'"),
        ({"initializer_token": " "}, "--initializer_token is empty"),
        ({"placeholder_token": "two words"}, "must be one word"),
        ({"max_train_steps": 0}, "--max_train_steps must be at least 1"),
        ({"kappa": -1}, "--kappa must not be negative"),
        ({"kappa": "nan"}, "--kappa must be a finite number"),
        ({"learning_rate": "inf"}, "--learning_rate must be a finite number"),
        ({"num_vectors": 0}, "--num_vectors must be at least 1"),
        ({"seed": 5000000000}, "--seed must lie in"),
        ({"beta": 1}, "--beta must lie in [0, 1)"),
        ({"resolution": 65}, "multiple of 8"),
        ({"learning_rate": "fast"}, 'unable to convert "fast"'),
        ({"lr_scheduler": "linear"}, "cosine"),
        ({"base_precision": "int4"}, "nf4"),
        ({"base_precision": "fp16"}, "nf4"),
        ({"quantised_cache": "cache"}, "is for --base_precision int8 or nf4"),
        ({"base_precision": "nf4", "quantised_cache": "/proc/version/cache"}, "cannot be written"),
        ({"gradient_checkpointing": True, "recompute": "geglu"}, "it contradicts --recompute geglu"),
        ({"attention": "xformers"}, "use --attention sdpa"),
        ({"learning_rat": 1}, "did you mean --learning_rate?"),
        ({"initializer_token": "<toy>"}, "--initializer_token is the same as --placeholder_token"),
        ({"output_dir": "/proc/version/out"}, "cannot be written"),
    ],
)
def test_settings(tiny_pipelines, pictures, tmp_path, settings, message):
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", **settings)
    refused(command(*arguments), message, tmp_path / "out")


def test_missing_settings(tiny_pipelines, pictures):
    model = tiny_pipelines["sd15"]
    refused(command("train", "--pretrained_model_name_or_path", model), "--train_data_dir is missing")
    refused(command("train", "--train_data_dir", pictures), "--initializer_token is missing")


def test_pictures(tiny_pipelines, tmp_path):
    folder, out = tmp_path / "pictures", tmp_path / "out"
    folder.mkdir()
    (folder / ".hidden.png").write_bytes(b"x")
    arguments = train_arguments(tiny_pipelines["sd15"], folder, out, max_train_steps=2)
    refused(command(*arguments), "holds no pictures", out)
    (folder / "zero.png").touch()
    (folder / "corrupt.jpg").write_bytes(b"\xff\xd8\xff broken")
    refused(command(*arguments), "broken: corrupt.jpg, zero.png", out)
    write_pictures(folder, 1)
    run = command(*arguments)
    assert run.returncode == 0, run.stderr
    assert "warning: skipping zero.png" in run.stderr
    assert "warning: skipping corrupt.jpg" in run.stderr


def test_captions_without_the_token(tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    (folder / "0.txt").write_text("a dog on grass")
    arguments = train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out")
    refused(command(*arguments), "no '<toy>' in 0.txt", tmp_path / "out")


def test_caption_whose_token_is_cut_off(tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    (folder / "0.txt").write_text("dog " * 90 + "{}")
    run = command(*train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out"))
    refused(run, "beyond the 77 tokens", tmp_path / "out")
    (folder / "0.txt").write_text("{}" + " dog" * 90)
    run = command(*train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out", max_train_steps=2))
    assert run.returncode == 0, run.stderr
    assert "warning: cut off after the 77 tokens that the text encoder sees: '<toy> dog dog" in run.stderr


def test_more_vectors_than_a_prompt_has_room_for(tiny_pipelines, pictures, tmp_path):
    run = command(*train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", num_vectors=80))
    refused(run, "the placeholder's 80 vectors reach beyond the 77 tokens that the text encoder sees", tmp_path / "out")
    assert "take fewer --num_vectors" in run.stderr


def test_placeholder_that_is_a_word(tiny_pipelines, pictures, tmp_path):
    arguments = train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out", placeholder_token="cat")
    refused(command(*arguments), "'cat' is a word of this model already", tmp_path / "out")


def test_models(tiny_pipelines, pictures, tmp_path):
    def run(model):
        return command(*train_arguments(model, pictures, tmp_path / "out"))

    folder = tmp_path / "model"
    folder.mkdir()
    refused(run(folder), "has no model_index.json", tmp_path / "out")
    (folder / "model_index.json").write_text("{")
    refused(run(folder), "is damaged", tmp_path / "out")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    refused(run(folder), "is a FluxPipeline", tmp_path / "out")
    (folder / "model_index.json").write_text((tiny_pipelines["sd15"] / "model_index.json").read_text())
    refused(run(folder), "holds no .safetensors weights", tmp_path / "out")
    (tmp_path / "model.ckpt").write_bytes(b"x")
    refused(run(tmp_path / "model.ckpt"), "not a .safetensors file", tmp_path / "out")
    (tmp_path / "model.safetensors").write_bytes(b"x")
    refused(run(tmp_path / "model.safetensors"), "model.safetensors", tmp_path / "out")
    refused(run("some/model"), "not on this machine", tmp_path / "out")


def test_nan_stops_and_keeps_the_last_good_state(tiny_pipelines, pictures, tmp_path, monkeypatch):
    original, calls = step.diffusion_loss, []

    def loss(*arguments):
        calls.append(arguments)
        return original(*arguments) * (torch.nan if len(calls) == 13 else 1)

    monkeypatch.setattr(step, "diffusion_loss", loss)
    run = command(*train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / "out"))
    refused(run, "the loss or its gradient was not finite at step 13; the state before it is kept")
    assert [p.name for p in (tmp_path / "out" / "checkpoints").iterdir()] == ["checkpoint-000012.safetensors"]
    assert not list((tmp_path / "out").glob("learned*"))


def test_generate(tiny_pipelines, tmp_path):
    refused(command("generate", "--embedding", tmp_path / "none.safetensors", "--prompt", "x"), "there is no file")
    (tmp_path / "bad.safetensors").write_bytes(b"x" * 64)
    refused(command("generate", "--embedding", tmp_path / "bad.safetensors", "--prompt", "x"), "not a safetensors file")


def test_without_the_training_packages(tmp_path):
    """`dti-fast` on the base install says what to install."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'diffusers' else find(name, *a)\n"
        "sys.argv = ['dti-fast', 'train']\n"
        "from dti_fast.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refused(run, "pip install 'dti-fast[train]'")


def test_bad_settings_are_found_before_diffusers_is_imported(pictures, tmp_path):
    code = (
        "import sys; sys.argv = ['dti-fast', 'train', '--train_data_dir', 'nowhere', '--initializer_token', 'dog']\n"
        "from dti_fast.cli import main\n"
        "try: main()\n"
        "finally: print(*sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    refused(run, "there is no folder")
    assert not {"diffusers", "transformers"} & set(run.stdout.split())
