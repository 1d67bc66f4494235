"""LoRA and magnitudes in the training step, and through kill and resume."""

import math
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from runs import ENVIRONMENT, command, train_arguments
from safetensors.torch import load_file
from steps import GOOD, setup

import dti_fast.trainer.config as config_module
from dti_fast import train
from dti_fast.backbones.pocket import Pocket
from dti_fast.data.draws import draw
from dti_fast.errors import UserError
from dti_fast.loss import diffusion_loss
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.step import train_step

BOTH = {"lora_rank": 4, "lora_learning_rate": 1e-2, "train_magnitude": True}


def run(steps, folder, on_step=None, *, failed=GOOD, **settings):
    """A few steps on random data; yields the learner's state after each, the loss, and whether it failed."""
    backbone, data, path, learner = setup(folder, **settings)
    for step in range(steps):
        undo = on_step(step, learner, data) if on_step else None
        learner.begin(step, 1.0)
        passes = [draw(data, 5, 1000, 0, step)]
        loss, failed = train_step(backbone, data, path, passes, learner, failed)
        if undo:
            undo()
        yield {name: t.clone() for name, t in learner.state().items()}, loss.item(), failed.item()


def changed(before, after):
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_everything_moves(tiny_pipelines):
    states = [state for state, _, _ in run(3, tiny_pipelines["sdxl"], **BOTH)]
    moved = changed(states[1], states[2])
    assert {"directions.0", "directions.1", "log_scales.0", "log_scales.1"} < moved
    weights = {n for n in states[0] if n.startswith("lora.") and "/" not in n}
    assert weights
    assert weights < moved


def test_only_the_ancillary_update_waits_for_the_device(tiny_pipelines):
    """On the meta device `.item()` raises; everything of a step but that one reading runs there."""
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], "meta", dco_beta=1000.0, **BOTH)
    learner.begin(0, 1.0)
    arguments = (backbone, data, path, [draw(data, 2, 1000, 0, 0)], learner)
    with pytest.raises(RuntimeError, match="meta"):
        train_step(*arguments, torch.zeros((), device="meta"))
    learner.ancillary.optimizer.step = lambda: None
    loss, failed = train_step(*arguments, torch.zeros((), device="meta"))
    assert loss.device.type == failed.device.type == "meta"


@pytest.mark.parametrize("scaling", [False, True])
def test_nan_loss_moves_nothing_from_then_on(tiny_pipelines, scaling):
    def spoil(step, learner, data):
        if step != 2:
            return None
        latents = data.mean[0].clone()
        data.mean[0] = torch.nan
        return lambda: data.mean[0].copy_(latents)

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaling)
    results = list(run(5, tiny_pipelines["sd15"], spoil, scaler=scaler, **BOTH))
    assert [failed for _, _, failed in results] == [0, 0, 1, 1, 1]
    assert changed(results[0][0], results[1][0])
    assert not changed(results[1][0], results[4][0])  # weights, moments, scales and step counts


@pytest.mark.parametrize("where", ["directions.0", "log_scales.0", "lora"])
def test_overflow_anywhere_skips_exactly_one_update_of_everything(tiny_pipelines, where):
    def overflow(step, learner, data):
        parameters = {name: p for part in learner.parts for name, p in part.parameters.items()}
        p = next(p for name, p in parameters.items() if name.startswith(where))
        return p.register_hook(lambda g: g * torch.inf).remove if step == 2 else None

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    results = list(run(4, tiny_pipelines["sd15"], overflow, scaler=scaler, **BOTH))
    states = [state for state, _, _ in results]
    assert not any(failed for _, _, failed in results)
    assert not changed(states[1], states[2])
    assert "directions.0" in changed(states[2], states[3])
    assert {int(t) for name, t in states[3].items() if name.endswith("/step")} == {3}
    assert scaler.get_scale() == 2.0**9


def test_a_gradient_that_is_not_finite_is_a_failure_wherever_it_is(tiny_pipelines):
    def spoil(step, learner, data):
        p = list(learner.ancillary.lora.parameters.values())[-1]
        return p.register_hook(lambda g: g * torch.nan).remove if step == 1 else None

    results = list(run(3, tiny_pipelines["sd15"], spoil, **BOTH))
    assert [failed for _, _, failed in results] == [0, 1, 1]
    assert not changed(results[0][0], results[2][0])


def test_a_loss_scale_changes_no_bit(tiny_pipelines):
    """The prior's gradient is scaled with the others, and everything unscaled before it counts."""
    settings = {**BOTH, "magnitude_prior": 0.1}
    *_, (plain, _, _) = run(3, tiny_pipelines["sd15"], **settings)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    *_, (scaled, _, _) = run(3, tiny_pipelines["sd15"], scaler=scaler, **settings)
    assert not changed(plain, scaled)


def test_inert_before_its_first_step(tiny_pipelines):
    settings = {"lora_rank": 4, "lora_learning_rate": 1e-2, "lora_start_step": 3}
    with_lora = list(run(4, tiny_pipelines["sd15"], **settings))
    without = list(run(4, tiny_pipelines["sd15"]))
    for i in (0, 1):  # steps 1 and 2
        assert torch.equal(with_lora[i][0]["directions.0"], without[i][0]["directions.0"])
        assert with_lora[i][1] == without[i][1]
    assert not {n for n in changed(with_lora[0][0], with_lora[1][0]) if n.startswith("lora.")}
    learning = changed(with_lora[1][0], with_lora[2][0])
    assert any(n.startswith("lora.") for n in learning)
    assert {int(t) for n, t in with_lora[3][0].items() if n.startswith("lora.") and n.endswith("/step")} == {2}


def test_rates_follow_the_schedule(tiny_pipelines):
    *_, learner = setup(tiny_pipelines["sd15"], **BOTH)
    learner.begin(0, 0.25)
    assert [group["lr"] for group in learner.ancillary.optimizer.param_groups] == [0.25e-2, 0.25e-3]


def test_dco_starts_at_log_2_with_the_gradient_of_the_squared_error(tiny_pipelines):
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], lora_rank=4, dco_beta=100.0)
    learner.begin(0, 1.0)
    draws = draw(data, 4, 1000, 0, 0)
    v = learner.embeddings[0].directions
    loss = diffusion_loss(backbone, data, path, draws, learner.consistency)
    assert loss.item() == pytest.approx(math.log(2))
    (dco,) = torch.autograd.grad(loss, v)
    (plain,) = torch.autograd.grad(diffusion_loss(backbone, data, path, draws), v)
    torch.testing.assert_close(dco, 50 * plain, rtol=1e-4, atol=1e-6)


def test_dco_holds_the_lora_back(tiny_pipelines):
    """The same steps end nearer the base model with DCO's loss, whose gradient fades, than with the squared error."""
    settings = {"lora_rank": 4, "lora_learning_rate": 1e-2}
    norms = []
    for dco in ({}, {"dco_beta": 1e4}):
        *_, (state, _, _) = run(12, tiny_pipelines["sd15"], **settings, **dco)
        norms.append(sum(t.norm() ** 2 for n, t in state.items() if n.endswith("lora_B.weight")).item())
    assert norms[1] < norms[0]


def test_bad_settings(monkeypatch):
    for settings, message in [
        ({"dco_beta": 1000.0}, "--dco_beta does nothing without --lora_rank"),
        ({"magnitude_prior": 1.0}, "--magnitude_prior does nothing without --train_magnitude"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, "must be positive"),
        ({"lora_rank": -1}, "must not be negative"),
        ({"train_magnitude": True, "cuda_graph": "on"}, "drop --cuda_graph"),
        ({"lora_rank": 4, "lora_start_step": 500}, "past --max_train_steps"),
    ]:
        with pytest.raises(UserError, match=message):
            TrainConfig(**settings).resolved()
    assert TrainConfig(lora_rank=4).resolved().lora_alpha == 4
    monkeypatch.setattr(config_module, "find_spec", lambda name: None)
    for settings in ({"lora_rank": 4}, {"train_magnitude": True}):
        with pytest.raises(UserError, match="pip install bitsandbytes"):
            TrainConfig(**settings).resolved()
    TrainConfig().resolved()


SETTINGS = {
    "max_train_steps": 12, "checkpointing_steps": 2, "lora_rank": 4, "lora_start_step": 4, "dco_beta": 1000.0,
    "lora_learning_rate": 1e-3, "train_magnitude": True, "train_batch_size": 2, "lora_alpha": 8.0,
    "num_validation_images": 0,
}  # fmt: skip
DIES_AFTER_A_CHECKPOINT = """
import os, signal, dti_fast.files as files
replace = os.replace
def replace_and_die(source, target):
    replace(source, target)
    if "checkpoint-000006" in str(target):
        os.kill(os.getpid(), signal.SIGKILL)
files.os.replace = replace_and_die
from dti_fast.cli import main
main()
"""


def assert_same_run(whole, broken):
    for name in ("learned_embeds", "pytorch_lora_weights", "toy_lora", "checkpoints/checkpoint-000012"):
        a, b = (load_file(out / f"{name}.safetensors") for out in (whole, broken))
        assert set(a) == set(b)
        assert all(torch.equal(a[key], b[key]) for key in a), name


def test_six_steps_and_six_more_are_twelve(tiny_pipelines, pictures, tmp_path):
    common = {
        "pretrained_model_name_or_path": str(tiny_pipelines["sd15"]), "train_data_dir": pictures,
        "placeholder_token": "<toy>", "initializer_token": "dog", **SETTINGS,
    }  # fmt: skip
    train(TrainConfig(output_dir=tmp_path / "whole", **common))
    (tmp_path / "broken/checkpoints").mkdir(parents=True)
    checkpoint = "checkpoints/checkpoint-000006.safetensors"
    train(TrainConfig(output_dir=tmp_path / "other", **common | {"checkpoints_total_limit": 9}))
    shutil.copy(tmp_path / "other" / checkpoint, tmp_path / "broken" / checkpoint)
    train(TrainConfig(output_dir=tmp_path / "broken", resume_from_checkpoint="latest", **common))
    assert_same_run(tmp_path / "whole", tmp_path / "broken")


def test_pocket_run_killed_and_resumed_and_loaded_by_a_stock_pipeline(pictures, tmp_path):
    """12 steps, and 6 + SIGKILL + 6 with the LoRA starting at step 4: every file bit for bit."""
    settings = {**SETTINGS, "train_magnitude": True, "initializer_token": "creature"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    first = command(*train_arguments(Pocket.folder, pictures, whole, **settings))
    assert first.returncode == 0, first.stderr
    assert "% of them 8-bit" in first.stderr
    arguments = train_arguments(Pocket.folder, pictures, broken, **settings)
    python = [sys.executable, "-c", DIES_AFTER_A_CHECKPOINT, *map(str, arguments)]
    killed = subprocess.run(python, env=ENVIRONMENT, capture_output=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert not (broken / "learned_embeds.safetensors").exists()
    resumed = command(*arguments, "--resume_from_checkpoint", "latest")
    assert "resuming after step 6" in resumed.stderr
    assert_same_run(whole, broken)

    stock = StableDiffusionPipeline.from_pretrained(Pocket.folder)
    stock.load_textual_inversion(whole / "learned_embeds.safetensors")
    stock.load_lora_weights(whole)
    weights = load_file(whole / "checkpoints/checkpoint-000012.safetensors")
    name, layer = next((n, m) for n, m in stock.unet.named_modules() if n.endswith("attn2.to_v"))
    assert torch.equal(layer.lora_B["default_0"].weight, weights[f"lora.{name}.lora_B.weight"])
    assert layer.lora_B["default_0"].weight.abs().max() > 0
    assert layer.scaling["default_0"] == 2
