"""Training within a card's memory: the plan changes no sample, and running out of memory costs no step."""

import json
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from runs import command, train_arguments
from safetensors.torch import load_file
from torch._subclasses.fake_tensor import FakeTensor

from dti_fast import train
from dti_fast.backbones.base import decode_in_tiles
from dti_fast.backbones.stable_diffusion import StableDiffusion
from dti_fast.data.draws import Draws
from dti_fast.errors import UserError
from dti_fast.memory.budget import Budget, OutOfMemory
from dti_fast.memory.plan import GIB, MARGIN
from dti_fast.session import estimator_of
from dti_fast.trainer.config import TrainConfig

STEPS = 5


@pytest.fixture
def config(tiny_pipelines, pictures, tmp_path):
    return TrainConfig(
        pretrained_model_name_or_path=str(tiny_pipelines["sdxl"]), train_data_dir=pictures, initializer_token="dog",
        output_dir=tmp_path / "run", max_train_steps=STEPS, train_batch_size=4, num_validation_images=0, beta=0.5,
        logging_steps=1, checkpointing_steps=1, checkpoints_total_limit=99,
    )  # fmt: skip


def learned(config: TrainConfig) -> list[torch.Tensor]:
    """Train; the learned vectors and the loss of every step."""
    paths = train(config).embedding_paths
    lines = [json.loads(line) for line in (config.output_dir / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = torch.tensor([line["loss"] for line in lines])
    return [*(tensor for path in paths for tensor in load_file(path).values()), losses]


def equal(a, b) -> bool:
    return len(a) == len(b) > 1 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def close(a, b) -> bool:
    return all(torch.allclose(x, y, rtol=1e-4, atol=1e-5) for x, y in zip(a, b, strict=True))


class Card:
    """Runs out of memory from one call of the denoiser on, as long as `small_enough(denoiser, batch)` is false."""

    def __init__(self, monkeypatch, first_call, small_enough, backward=False):
        self.calls, self.failures, denoise = 0, 0, StableDiffusion.denoise

        def limited(backbone, noisy, timesteps, condition):
            out = denoise(backbone, noisy, timesteps, condition)
            if isinstance(noisy, FakeTensor):  # only planned
                return out
            self.calls += 1
            if self.calls >= first_call and not small_enough(backbone.denoiser, len(noisy)):
                if not backward:
                    self.fail()
                out.register_hook(self.fail)
            return out

        monkeypatch.setattr(StableDiffusion, "denoise", limited)

    def fail(self, *_):
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def recomputes(denoiser, batch) -> bool:
    return any(getattr(module, "recompute", "none") != "none" for module in denoiser.modules())


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_stepping_down_to_recomputation_loses_nothing(config, monkeypatch, capsys, backward):
    config = replace(config, train_batch_size=1)
    stock = learned(config)
    results = []
    for first_call in (1, 3):
        with monkeypatch.context() as patch:
            card = Card(patch, first_call, recomputes, backward)
            results.append(learned(replace(config, output_dir=config.output_dir / str(first_call))))
        assert card.failures == 1
        assert card.calls == STEPS + 1
    assert equal(results[0], stock)
    assert equal(results[1], stock)
    assert capsys.readouterr().err.count("out of memory: the step is repeated with recompute") == 2


def test_stepping_down_to_smaller_passes_loses_nothing(config, monkeypatch, capsys):
    """Two passes of four become eight of one in the middle of the third step, whose first half was already done."""
    config = replace(config, recompute="none", gradient_accumulation_steps=2)
    stock = learned(config)
    results = []
    for first_call in (1, 6):
        with monkeypatch.context() as patch:
            card = Card(patch, first_call, lambda denoiser, batch: batch == 1)
            results.append(learned(replace(config, output_dir=config.output_dir / str(first_call))))
        assert card.failures == 2  # with passes of four, then of two
    assert close(results[0], stock)
    assert close(results[1], stock)
    assert torch.equal(results[1][-1][:2], stock[-1][:2])  # the losses before
    assert "2 passes of 2" in (err := capsys.readouterr().err)
    assert "4 passes of 1" in err


def test_without_a_lower_plan_the_last_step_is_kept(config, monkeypatch):
    config = replace(config, train_batch_size=1, recompute="block", checkpointing_steps=100)
    stock = learned(replace(config, output_dir=config.output_dir / "stock"))
    with monkeypatch.context() as patch:
        Card(patch, 4, lambda denoiser, batch: False)
        with pytest.raises(OutOfMemory, match=r"out of memory with recompute block.*smaller --resolution"):
            train(config)
    assert [path.name for path in sorted((config.output_dir / "checkpoints").glob("*"))] == [
        "checkpoint-000003.safetensors"
    ]
    paths = train(replace(config, resume_from_checkpoint="latest")).embedding_paths
    assert all(
        torch.equal(tensor, expected)
        for tensor, expected in zip([t for p in paths for t in load_file(p).values()], stock, strict=False)
    )


def test_vram_picks_passes_and_changes_only_rounding(config, capsys):
    config = replace(config, recompute="none")
    stock = learned(config)
    whole = estimator_of(config, torch.float32).plan("fp32", "none", 4).within(0)
    vram = (whole.total + MARGIN - 1) / GIB
    assert close(learned(replace(config, vram=vram, output_dir=config.output_dir / "planned")), stock)
    assert "recompute none, weights fp32, 2 passes of 2" in capsys.readouterr().err
    plenty = learned(replace(config, vram=12, output_dir=config.output_dir / "plenty"))
    assert equal(plenty, stock)
    assert "12.0 GiB: recompute none, weights fp32;" in capsys.readouterr().err


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_model_is_counted_in_the_dtype_of_the_run(config, precision):
    """Whatever dtype its files name; these say float32."""
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    whole = estimator_of(config, torch.float32).plan("fp32", "none", 1)
    half = estimator_of(config, dtype).plan(precision, "none", 1)
    assert half.step.saved < 0.75 * whole.step.saved


def test_an_explicit_recompute_wins(config):
    assert {
        plan.recompute for plan in estimator_of(replace(config, recompute="block"), torch.float32).plans("fp32")
    } == {"block"}
    many = estimator_of(config, torch.float32).plans("fp32")
    assert len({plan.recompute for plan in many}) > 1


def test_lora_is_counted(config):
    """Its layers keep their inputs."""
    plain, lora = (
        estimator_of(replace(config, recompute="none", **settings), torch.float32).plan("fp32", "none", 4)
        for settings in ({}, {"lora_rank": 4, "lora_alpha": 4.0})
    )
    assert lora.step.saved > 1.02 * plain.step.saved


@pytest.mark.parametrize("mode", ["none", "block"])
def test_a_forward_pass_without_gradients_is_counted(config, mode):
    """DCO's reference: a third forward pass in FLOPs, nothing that stays alive but a prediction."""
    lora = replace(config, recompute=mode, lora_rank=4, lora_alpha=4.0)
    plain, dco = (
        estimator_of(replace(lora, dco_beta=beta), torch.float32).plan("fp32", mode, 4) for beta in (0.0, 1000.0)
    )
    assert 1.25 < dco.step.flops / plain.step.flops < 1.5
    assert plain.step.saved <= dco.step.saved < 1.02 * plain.step.saved


@pytest.mark.parametrize(
    "settings", [{"train_magnitude": True}, {"lora_rank": 2, "dco_beta": 1000.0, "train_magnitude": True}]
)
def test_a_plan_for_everything_that_may_learn_changes_nothing(config, settings):
    config = replace(config, recompute="none", **settings)
    stock = learned(config)
    assert equal(learned(replace(config, vram=12, output_dir=config.output_dir / "planned")), stock)


def test_too_little_memory_is_one_clear_line(tiny_pipelines, pictures, tmp_path):
    out = tmp_path / "out"
    run = command(*train_arguments(tiny_pipelines["sd15"], pictures, out, vram=0.5, train_batch_size=1))
    assert run.returncode == 2
    assert "does not fit 0.5 GiB; the smallest plan (recompute" in run.stderr.splitlines()[-1]
    assert not out.exists()


def four_draws() -> Draws:
    return Draws(*(torch.arange(4) for _ in range(3)), *torch.randn(2, 4, 1, 2, 2))


class Placed:
    """A module that is nothing but where it is: the further devices that a CPU lacks."""

    def __init__(self, device: str):
        self.device = torch.device(device)

    def parameters(self):
        yield self

    def to(self, device):
        self.device = torch.device(device)


@pytest.mark.parametrize("fails", [False, True], ids=["well", "with an error"])
@pytest.mark.parametrize("alone", [True, False], ids=["alone", "beside the others"])
def test_every_module_is_back_on_its_device_after_encoding(alone, fails):
    plan = SimpleNamespace(encode_alone=alone, tiled_decoding=False, total=0, describe=str)
    budget = Budget(SimpleNamespace(choose=lambda *_: plan), ["fp32"], "auto", GIB, binding=True, say=str)
    denoiser, vae, first, second = modules = [Placed(name) for name in ("cuda:0", "cuda:0", "cuda:1", "cpu")]
    backbone = SimpleNamespace(vae=vae, modules=lambda: modules)

    def places():
        return [str(module.device) for module in (denoiser, first, second, vae)]

    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), budget.encoding(backbone):
        assert places() == (["cpu", "cpu", "cpu", "cuda:0"] if alone else ["cuda:0", "cuda:1", "cpu", "cuda:0"])
        assert 1 / (not fails)
    assert places() == ["cuda:0", "cuda:1", "cpu", "cpu"]  # the VAE waits until it draws


def test_draws_split_into_equal_parts():
    draws = four_draws()
    parts = draws.split(2)
    assert len(parts) == 2
    for name, tensor in vars(draws).items():
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), tensor)


def test_decoding_in_tiles_is_undone(tiny_pipelines):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(tiny_pipelines["sd15"], subfolder="vae")
    latents = torch.randn(1, 4, 12, 12)
    with torch.no_grad():
        whole = vae.decode(latents).sample
        with decode_in_tiles(vae, 64):
            tiles = vae.decode(latents).sample
        assert tiles.shape == whole.shape
        assert not torch.equal(tiles, whole)
        assert torch.equal(vae.decode(latents).sample, whole)


def test_a_card_for_which_no_plan_is_predicted_to_fit_is_tried(config):
    said, estimator, limit = [], estimator_of(config, torch.float32), GIB // 2
    tried = Budget(estimator, ["fp32"], "auto", limit, binding=False, say=said.append)
    smallest = estimator.smallest(["fp32"])
    assert "trying that" in said[0]
    assert smallest.describe() in said[1]
    assert tried.base_precision is None  # nobody allowed another
    assert tried.tiled_decoding
    sizes = tried.attempt(None, lambda passes: [len(draws.noise) for draws in passes], [four_draws()])
    assert sizes == [smallest.micro_batch] * smallest.passes
    with pytest.raises(UserError, match=r"does not fit 0\.5 GiB"):
        Budget(estimator, ["fp32"], "auto", limit, binding=True, say=said.append)
