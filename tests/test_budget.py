"""Training within a card's memory: the plan changes no sample, and running out of memory costs no step."""

import json
from dataclasses import replace

import pytest
import torch
from dti_fast.frozen.plan import GIB, MARGIN
from dti_fast.trainer.budget import OutOfMemory, Survey
from dti_fast.trainer.loop import train
from runs import dti_fast, train_arguments
from torch._subclasses.fake_tensor import FakeTensor

from dti_fast.backbones.stable_diffusion import StableDiffusion
from dti_fast.data.draws import Draws
from dti_fast.trainer import budget
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.preview import decode_in_tiles

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
    from safetensors.torch import load_file

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
    """Runs out of memory from one call of the denoiser on, as long as `small_enough(unet, batch)` is false."""

    def __init__(self, monkeypatch, first_call, small_enough, backward=False):
        self.calls, self.failures, denoise = 0, 0, StableDiffusion.denoise

        def limited(backbone, noisy, timesteps, condition):
            out = denoise(backbone, noisy, timesteps, condition)
            if isinstance(noisy, FakeTensor):  # only planned
                return out
            self.calls += 1
            if self.calls >= first_call and not small_enough(backbone.unet, len(noisy)):
                if not backward:
                    self.fail()
                out.register_hook(self.fail)
            return out

        monkeypatch.setattr(StableDiffusion, "denoise", limited)

    def fail(self, *_):
        self.failures += 1
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")


def recomputes(unet, batch) -> bool:
    return any(getattr(module, "recompute", "none") != "none" for module in unet.modules())


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
            card = Card(patch, first_call, lambda unet, batch: batch == 1)
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
        Card(patch, 4, lambda unet, batch: False)
        with pytest.raises(OutOfMemory, match=r"out of memory with recompute block.*smaller --resolution"):
            train(config)
    assert [path.name for path in sorted((config.output_dir / "checkpoints").glob("*"))] == [
        "checkpoint-000003.safetensors"
    ]
    paths = train(replace(config, resume_from_checkpoint="latest")).embedding_paths
    from safetensors.torch import load_file

    assert all(
        torch.equal(tensor, expected)
        for tensor, expected in zip([t for p in paths for t in load_file(p).values()], stock, strict=False)
    )


def test_vram_picks_passes_and_changes_only_rounding(config, capsys):
    config = replace(config, recompute="none")
    stock = learned(config)
    survey = Survey(config, torch.float32, ("none",))
    whole = survey.plan("fp32", "none", 4).within(0)
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
    whole = Survey(config, torch.float32).plan("fp32", "none", 1)
    half = Survey(config, dtype).plan(precision, "none", 1)
    assert half.step.saved < 0.75 * whole.step.saved


def test_an_explicit_recompute_wins(config):
    assert {plan.recompute for plan in Survey(config, torch.float32, ("block",)).plans("fp32")} == {"block"}
    many = Survey(config, torch.float32).plans("fp32")
    assert len({plan.recompute for plan in many}) > 1


def test_lora_is_counted(config):
    """Its layers keep their inputs."""
    plain = Survey(config, torch.float32, ("none",)).plan("fp32", "none", 4)
    lora = Survey(replace(config, lora_rank=4, lora_alpha=4.0), torch.float32, ("none",)).plan("fp32", "none", 4)
    assert lora.step.saved > 1.02 * plain.step.saved


@pytest.mark.parametrize("mode", ["none", "block"])
def test_a_forward_pass_without_gradients_is_counted(config, mode):
    """DCO's reference: a third forward pass in FLOPs, nothing that stays alive but a prediction."""
    lora = replace(config, lora_rank=4, lora_alpha=4.0)
    plain = Survey(lora, torch.float32, (mode,)).plan("fp32", mode, 4)
    dco = Survey(replace(lora, dco_beta=1000.0), torch.float32, (mode,)).plan("fp32", mode, 4)
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
    run = dti_fast(*train_arguments(tiny_pipelines["sd15"], pictures, out, vram=0.5, train_batch_size=1))
    assert run.returncode == 2
    assert "does not fit 0.5 GiB; the smallest plan (recompute" in run.stderr.splitlines()[-1]
    assert not out.exists()


def test_draws_split_into_equal_parts():
    draws = Draws(*(torch.arange(4) for _ in range(3)), *torch.randn(2, 4, 1, 2, 2))
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


def test_a_card_for_which_no_plan_is_predicted_to_fit_is_tried(config, monkeypatch, capsys):
    from rich.console import Console

    monkeypatch.setattr(budget, "free_memory", lambda device: GIB // 2)
    tried = budget.Budget(config, torch.float32, torch.device("cuda"), Console(stderr=True))
    smallest = tried._survey.smallest(["fp32"])
    assert tried._plan == smallest
    assert tried.base_precision is None  # nobody allowed another
    assert "trying that" in capsys.readouterr().err
