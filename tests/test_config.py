"""Settings: from flags and files, their ranges, and the configuration that starts the same run again."""

import importlib
import re
from dataclasses import fields, replace

import pytest
import torch
from runs import command, refused
from safetensors.torch import load_file

from dti_fast import train
from dti_fast.commands import make_app
from dti_fast.commands.foreign_flags import FOREIGN
from dti_fast.errors import UserError
from dti_fast.limits import LIMITS, check_limits
from dti_fast.trainer.config import Settings, TrainConfig

NAMES = [field.name for field in fields(TrainConfig)]


@pytest.fixture
def read_back(monkeypatch, tmp_path):
    """From a configuration's bytes, and flags, to what `dti-fast train --config` makes of them."""
    got = []

    def train(*, settings: TrainConfig | None = None):
        got.append(settings)

    monkeypatch.setattr(importlib.import_module("dti_fast.commands.train"), "train", train)

    def read(content: str | bytes, *flags: str) -> TrainConfig:
        file = tmp_path / "config.toml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        tokens = ["train", "--config", str(file), *flags]
        make_app().meta(tokens, exit_on_error=False, print_error=False, result_action="return_value")
        return got[-1]

    return read


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"validation_prompt": ['a "{}"\n\\ on grass', "ein {} im Schnee, süß"], "validation_steps": 5, "save_steps": 2},
        {"method": "ti-rescaled", "magnitude": 0.5, "num_vectors": 3},
        {"method": "crossinit", "lr_scheduler": "cosine", "learning_rate": 1e-7, "adam_weight_decay": 0.0},
        {"optimizer": "adamw", "kappa_mode": "relative", "magnitude": "class", "scale_lr": True},
        {"lora_rank": 4, "lora_start_step": 3, "dco_beta": 1000.0, "train_magnitude": True},
        {"gradient_checkpointing": True, "vram": 11.5, "attention": "math", "deterministic": True},
        {"mixed_precision": "fp16", "pooling": "reference", "cuda_graph": "on", "device": "cpu"},
        {"base_precision": "nf4", "quantised_cache": "cache", "resume_from_checkpoint": "latest", "overwrite": True},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_resolved_settings_come_back_from_their_file(settings, read_back, tmp_path):
    for name in {"quantised_cache"} & settings.keys():
        settings = settings | {name: tmp_path / settings[name]}
    resolved = TrainConfig(**settings).resolved()
    again = read_back(resolved.to_toml()).resolved()
    assert again == replace(resolved, resume_from_checkpoint=None, overwrite=False)
    assert type(again) is Settings
    assert again.resolved() == again


def test_a_precision_that_was_picked_comes_back(tiny_pipelines, pictures, read_back, tmp_path):
    """auto picks none on a CPU, so that the folder for quantised models has no use."""
    config = TrainConfig(
        pretrained_model_name_or_path=str(tiny_pipelines["sd15"]), train_data_dir=pictures, initializer_token="dog",
        output_dir=tmp_path / "first", max_train_steps=2, train_batch_size=1, num_validation_images=0,
        base_precision="auto", quantised_cache=tmp_path / "cache",
    )  # fmt: skip
    train(config, loggers=[])
    again = read_back((tmp_path / "first" / "config.toml").read_bytes())
    train(replace(again, output_dir=tmp_path / "second"), loggers=[])
    first, second = (load_file(tmp_path / name / "learned_embeds.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[key], second[key]) for key in first | second)


def test_settings_by_which_checkpoints_are_told_apart():
    """As the first checkpoints have them: another name here, and no earlier run could be resumed."""
    names = """adam_weight_decay base_precision beta dco_beta deterministic gradient_accumulation_steps
    initializer_token kappa kappa_mode learnable_property learning_rate lora_alpha lora_learning_rate
    lora_rank lora_start_step lr_scheduler lr_warmup_steps magnitude magnitude_learning_rate
    magnitude_prior max_train_steps method mixed_precision momentum num_vectors optimizer
    per_sample_normalisation placeholder_token pooling prediction_type reg_lambda resolution scale_lr seed
    train_batch_size train_magnitude"""
    assert sorted(TrainConfig().resolved().trajectory()) == names.split()
    later = TrainConfig(momentum=0.0, per_sample_normalisation=False).resolved().trajectory()
    assert later["momentum"] is later["per_sample_normalisation"] is None  # as in checkpoints of before
    constant = TrainConfig(lr_scheduler="constant").resolved().trajectory()
    assert sorted([*constant, "max_train_steps"]) == names.split()


def test_names_with_dashes_a_byte_order_mark_and_flags_that_override(read_back):
    config = read_back(b"\xef\xbb\xbfmax-train-steps = 7\nlr_warmup_steps = 2\nkappa = 1\n", "--max-train_steps", "9")
    assert (config.max_train_steps, config.lr_warmup_steps, config.kappa) == (9, 2, 1.0)
    assert read_back('validation_prompt = "a {}"\n').validation_prompt == ["a {}"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[train]\nmax_train_steps = 1\n", "config.toml' has a table [train]"),
        ("max_train_steps = { a = 1 }\n", "config.toml' has a table [max_train_steps]"),
        ("max_train_step = 3\n", "config.toml': there is no setting --max_train_step; did you mean --max_train_steps?"),
        ("sandwich = 3\n", "config.toml': there is no setting --sandwich"),
        ('config = "other.toml"\n', "there is no setting --config"),
        ("lr = 3\n", "config.toml': --lr: use --learning_rate"),
        ("seed = 1.5\n", "config.toml': seed must be a whole number, not 1.5"),
        ('seed = "1"\n', "config.toml': seed must be a whole number, not '1'"),
        ("seed = true\n", "config.toml': seed must be a whole number, not True"),
        ("kappa = [1.0]\n", "config.toml': kappa must be a number, not [1.0]"),
        ("output_dir = 3\n", "config.toml': output_dir must be text in quotes, not 3"),
        ('deterministic = "yes"\n', "config.toml': deterministic must be true or false"),
        ("validation_prompt = [1]\n", "config.toml': validation_prompt must be a list or text in quotes"),
        ("magnitude = true\n", "config.toml': magnitude must be a number or text in quotes"),
        ("seed = 1\nmax_train_steps = \n", "config.toml' is not TOML: Invalid value (at line 2"),
        ("seed = 1".encode("utf-16"), "config.toml' is not UTF-8 text"),
    ],
)
def test_a_file_that_cannot_be_meant_is_refused_with_its_name(content, message, read_back):
    with pytest.raises(UserError, match=re.escape(message)):
        read_back(content)


def test_a_value_that_is_no_choice_is_refused_with_its_file(tmp_path):
    (tmp_path / "c.toml").write_text('lr_scheduler = "linear"\n')
    refused(command("train", "--config", tmp_path / "c.toml"), "c.toml")


def test_help_begins_with_what_everybody_sets_and_ends_with_the_ablations(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    shown = command("train", "--help").stdout
    groups = re.findall(r"^╭─ ([^─]+) ─", shown, re.MULTILINE)
    assert groups[0] == "Essentials"
    assert groups[-2:] == ["Ablations and the methods to compare with", "Settings from a file"]
    essentials = re.findall(r"^│ --(\w+) [A-Z]", shown.split("╰")[0], re.MULTILINE)
    assert essentials == [
        "pretrained_model_name_or_path", "train_data_dir", "placeholder_token", "initializer_token", "resolution",
        "max_train_steps", "output_dir", "vram", "resume_from_checkpoint",
    ]  # fmt: skip
    assert "None" not in shown
    assert set(re.findall(r"--(\w+)", shown)) >= set(NAMES) - {"gradient_checkpointing"}


def test_every_number_has_a_limit():
    numbers = [f.name for f in fields(TrainConfig) if re.search(r"\b(int|float)\b", str(f.type))]
    assert set(numbers) <= LIMITS.keys()
    assert len(numbers) > 20


@pytest.mark.parametrize(
    ("name", "good", "bad", "message"),
    [
        ("resolution", 512, 65, "must be a multiple of 8 and at least 32, got 65"),
        ("train_batch_size", 1, 0, "must be at least 1, got 0"),
        ("vram", 0.5, 0.0, "must be positive, got 0.0"),
        ("kappa", 0.0, -1e-9, "must not be negative, got -1e-09"),
        ("beta", 0.0, 1.0, "must lie in [0, 1), got 1.0"),
        ("seed", 2**31 - 1, 2**31, "must lie in [0, 2147483648), got 2147483648"),
        ("seeds", (0, 1), (0, -1), "must lie in [0, 2147483648), got -1"),
        ("magnitude", "mean", 0.0, "must be positive, got 0.0"),
        ("num_inference_steps", 1000, 1001, "must lie between 1 and 1000, got 1001"),
        ("guidance_scale", None, float("nan"), "must be a finite number, got nan"),
    ],
)
def test_limits(name, good, bad, message):
    check_limits({name: good})
    with pytest.raises(UserError, match=re.escape(f"--{name} {message}")):
        check_limits({name: bad})


@pytest.mark.parametrize(
    "arguments",
    [
        ("train", "--resolution", "65"),
        ("plan", "--resolution", "65", "--vram", "8"),
        ("generate", "--prompt", "x", "--num_inference_steps", "0"),
        ("blend", "a", "b", "--prompt", "x", "--num_inference_steps", "0"),
        ("evaluate", "--num_inference_steps", "0"),
        ("blend", "a", "b", "--save", "1.5"),
        ("generate", "--prompt", "x", "--seed", "-1"),
    ],
    ids=" ".join,
)
def test_every_command_says_the_same_of_a_number(arguments):
    name, value = arguments[-2:] if arguments[-1] != "8" else arguments[1:3]
    refused(command(*arguments), f"{name} {LIMITS[name.lstrip('-')].words}, got {value}")


# Of diffusers' textual_inversion.py and textual_inversion_sdxl.py.
DIFFUSERS = """save_steps save_as_full_pipeline num_vectors pretrained_model_name_or_path revision variant
tokenizer_name train_data_dir placeholder_token initializer_token learnable_property repeats output_dir
seed resolution center_crop train_batch_size num_train_epochs max_train_steps gradient_accumulation_steps
gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon push_to_hub
hub_token hub_model_id logging_dir mixed_precision allow_tf32 report_to validation_prompt
num_validation_images validation_steps validation_epochs local_rank checkpointing_steps
checkpoints_total_limit resume_from_checkpoint enable_xformers_memory_efficient_attention
no_safe_serialization"""


def test_every_flag_of_diffusers_scripts_is_taken_or_answered():
    assert [name for name in DIFFUSERS.split() if name not in NAMES and name not in FOREIGN] == []


def test_advice_names_settings_that_there_are():
    assert not FOREIGN.keys() & set(NAMES)
    advised = {name for advice in FOREIGN.values() for name in re.findall(r"--(\w+)", advice)}
    assert advised <= {*NAMES, "config"}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "1e-3"], "--lr: use --learning_rate"),
        (["--report-to", "wandb"], "--report_to: not there yet; log.jsonl in the output folder has the numbers"),
        (["--snr_gamma=5"], "--snr_gamma: not there"),
        (["--use_8bit_adam"], "--use_8bit_adam: leave it out"),
        (["--resolutoin", "64"], "there is no setting --resolutoin; did you mean --resolution?"),
        (["--resume_from_checkpoint"], "--resume_from_checkpoint needs a value: latest, or a checkpoint file"),
        (["--seed", "1.5"], "--seed must be a whole number, not 1.5"),
        (["--seed", "x"], "--seed"),
        (["--scale_lr", "3"], "what is '3'? A value follows the name of its setting"),
        (["--config", "missing.toml"], '"missing.toml" does not exist'),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_be_meant(flags, message):
    refused(command("train", *flags), message)


@pytest.mark.parametrize("flag", ["--stepz", "--noise", "--weight", "--gamma", "--image_size"])
def test_no_setting_of_another_meaning_is_suggested(flag):
    run = command("train", flag, "1")
    refused(run, f"there is no setting {flag}")
    assert "did you mean" not in run.stderr


def test_commands_and_folders_out_of_place(tmp_path):
    refused(command("trian"), "there is no command 'trian'; did you mean train?")
    refused(command("sing"), "there are train, generate, blend")
    refused(command("train", tmp_path), f"A folder of pictures is given as --train_data_dir {tmp_path}")
    refused(command("generate"), "--prompt is missing")
    refused(command("generate", "--prompt", "x", "--lr", "1"), "there is no setting --lr")  # only train knows others'
