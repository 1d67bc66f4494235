"""The training step: its formula, its draws, and that it never waits for the device."""

import math
import sys
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from steps import GOOD, setup

from dti_fast import sphere
from dti_fast.data.draws import Dataset, draw
from dti_fast.errors import UserError
from dti_fast.loss import diffusion_loss
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.monitor import GRADIENT_DEADLINE, Monitor
from dti_fast.trainer.step import learning_rates, train_step


@pytest.fixture
def meta_adamw(monkeypatch):
    """Let torch's fused AdamW run on the meta device: it has no such kernel, and checks the device by name."""
    module = sys.modules[torch.optim.Optimizer.__module__]
    devices = module._get_fused_kernels_supported_devices
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: [*devices(), "meta"])
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("_fused_adamw_.tensor_lr", lambda *arguments, **keywords: None, "Meta")
        yield


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("sd15", {}),
        ("sd21", {}),
        ("sdxl", {}),
        ("sd15", {"kappa_mode": "relative"}),
        ("sdxl", {"momentum": 0.9, "per_sample_normalisation": True}),
        ("sd15", {"optimizer": "adamw"}),
        ("sd15", {"method": "ti"}),
        ("sdxl", {"method": "ti-rescaled"}),
        ("sdxl", {"method": "crossinit"}),
    ],
)
def test_a_step_never_waits_for_the_device(tiny_pipelines, meta_adamw, family, settings):
    """On the meta device `.item()` and `bool(tensor)` raise."""
    backbone, data, path, learner = setup(tiny_pipelines[family], "meta", **settings)
    passes = [draw(data, 4, 1000, 0, i) for i in range(2)]
    failed = torch.zeros((), device="meta")
    arguments = (backbone, data, path, passes, learner)
    monitor = Monitor(learner.embeddings, 0, 100)
    for _ in range(2):
        loss, failed = train_step(*arguments, failed)
        monitor.record(loss, failed)
    assert loss.device.type == failed.device.type == "meta"
    assert all(e.rows.grad.shape == e.rows.shape for e in learner.embeddings)


def test_meta_device_would_catch_a_wait():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.zeros(1, device="meta").item()


@pytest.mark.parametrize("family", ["sd15", "sd21"])
def test_loss_agrees_with_the_diffusers_scheduler(tiny_pipelines, family):
    from diffusers import DDPMScheduler

    backbone, data, path, _ = setup(tiny_pipelines[family])
    assert backbone.metadata()["prediction_type"] == {"sd15": "epsilon", "sd21": "v_prediction"}[family]
    draws = draw(data, 4, 1000, 3, 8)
    scheduler = DDPMScheduler.from_config(backbone.pipeline.scheduler.config)
    latents = data.mean[draws.picture] + data.std[draws.picture] * draws.posterior_noise
    noisy = scheduler.add_noise(latents, draws.noise, draws.timestep)
    target = draws.noise if family == "sd15" else scheduler.get_velocity(latents, draws.noise, draws.timestep)
    hidden = backbone.text_encoders[0](data.tokens[0][0][draws.prompt])[0]
    expected = F.mse_loss(backbone.denoiser(noisy, draws.timestep, hidden).sample, target)
    torch.testing.assert_close(diffusion_loss(backbone, data, path, draws), expected)


def test_sdxl_conditions_equal_the_stock_pipelines(tiny_pipelines):
    backbone, data, _, _ = setup(tiny_pipelines["sdxl"], prompts=("a photo of <x> on grass",))
    ours = backbone.condition([(ids[:1], mask[:1]) for ids, mask in data.tokens], data.sizes[:1])
    hidden, _, pooled, _ = backbone.pipeline.encode_prompt(
        "a photo of <x> on grass", device="cpu", do_classifier_free_guidance=False
    )
    torch.testing.assert_close(ours["encoder_hidden_states"], hidden)
    torch.testing.assert_close(ours["added_cond_kwargs"]["text_embeds"], pooled)


def test_pooling_at_the_end_sees_words_after_the_placeholder(tiny_pipelines):
    backbone, data, _, _ = setup(tiny_pipelines["sdxl"], prompts=("a <x> on grass", "a <x> on beach"))

    def pooled():
        return backbone.condition(data.tokens, data.sizes[:2])["added_cond_kwargs"]["text_embeds"]

    reference = pooled()
    assert torch.equal(reference[0], reference[1])  # pooled at the placeholder: blind to what follows
    backbone.set_pooling("reference")
    assert torch.equal(pooled(), reference)
    backbone.set_pooling("eos")
    at_end = pooled()
    assert (at_end[0] - at_end[1]).abs().max() > 1e-3


def test_accumulation_is_the_mean_over_the_larger_batch(tiny_pipelines):
    backbone, data, path, learner = setup(tiny_pipelines["sd15"])
    passes = [draw(data, 4, 1000, 0, i) for i in range(2)]
    losses = torch.stack([diffusion_loss(backbone, data, path, d) for d in passes])
    losses.mean().backward()
    expected = learner.embeddings[0].directions.grad.clone()
    learner.embeddings[0].directions.grad = None
    total, _ = train_step(backbone, data, path, passes, learner, GOOD)
    torch.testing.assert_close(total, losses.mean().detach())
    torch.testing.assert_close(learner.embeddings[0].directions.grad, expected)


def test_a_step_turns_by_arctan_of_the_rate_and_keeps_the_norm(tiny_pipelines):
    backbone, data, path, learner = setup(tiny_pipelines["sdxl"], lr=0.04)
    for step in range(3):
        before = [e.directions.detach().double().clone() for e in learner.embeddings]
        train_step(backbone, data, path, [draw(data, 2, 1000, 0, step)], learner, GOOD)
        for e, v in zip(learner.embeddings, before, strict=True):
            angle = sphere.distance(v, e.directions.detach().double()).item()
            assert angle == pytest.approx(math.atan(0.04), rel=1e-3)
            assert e.directions.norm().item() == pytest.approx(1, abs=1e-6)
            assert e.vectors().norm().item() == pytest.approx(e.magnitudes.item(), rel=1e-5)


@pytest.mark.parametrize("scaling", [False, True])
def test_nan_loss_moves_nothing_from_then_on(tiny_pipelines, scaling):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=scaling)
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], scaler=scaler)
    monitor, failed, moved = Monitor(learner.embeddings, 0, 100), GOOD, []
    for step in range(1, 5):
        latents = data.mean[0].clone()
        if step == 2:
            data.mean[0] = torch.nan
        before = learner.embeddings[0].directions.detach().clone()
        every_picture = draw(data, 5, 1000, 0, step)
        loss, failed = train_step(backbone, data, path, [every_picture], learner, failed)
        monitor.record(loss, failed)
        moved.append(not torch.equal(before, learner.embeddings[0].directions))
        data.mean[0] = latents
    assert moved == [True, False, False, False]
    assert monitor.last_good_step(4) == 1
    assert learner.state()["directions.0/step"].item() == 1


def test_overflow_under_a_scaler_skips_exactly_one_update(tiny_pipelines):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], scaler=scaler)
    handle, moved = None, []
    for step in range(4):
        if step == 2:
            handle = learner.embeddings[0].directions.register_hook(lambda g: g * torch.inf)
        before = learner.embeddings[0].directions.detach().clone()
        train_step(backbone, data, path, [draw(data, 2, 1000, 0, step)], learner, GOOD)
        moved.append(not torch.equal(before, learner.embeddings[0].directions))
        if step == 2:
            handle.remove()
    assert moved == [True, True, False, True]
    assert scaler.get_scale() == 2.0**9
    assert learner.state()["directions.0/step"].item() == 3


def test_zero_gradient_is_an_error_at_the_deadline(tiny_pipelines):
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], prompts=("a photo of dog",))
    monitor, passes = Monitor(learner.embeddings, 0, 100), [draw(data, 2, 1000, 0, 0)]
    loss, failed = train_step(backbone, data, path, passes, learner, GOOD)
    for _ in range(GRADIENT_DEADLINE):
        monitor.record(loss, failed)
    monitor.read(10, 0.04)
    with pytest.raises(UserError, match="no gradient"):
        monitor.read(GRADIENT_DEADLINE, 0.04)


def test_draws_are_a_function_of_position_and_epochs_are_permutations(tiny_pipelines):
    data = Dataset(
        torch.zeros(5, 4, 8, 8), torch.zeros(5, 4, 8, 8), torch.zeros(5, 6), [(torch.zeros(99, 77),) * 2], False
    )
    first, again, other = draw(data, 4, 1000, 1, 7), draw(data, 4, 1000, 1, 7), draw(data, 4, 1000, 1, 8)
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(again).values(), strict=True))
    for stranger in (other, draw(data, 4, 1000, 2, 7)):  # another position, another seed
        for field in ("prompt", "timestep", "posterior_noise", "noise"):
            assert not torch.equal(getattr(first, field), getattr(stranger, field)), field
    seen = torch.cat([draw(data, 4, 1000, 1, i).picture for i in range(5)])
    assert all(sorted(epoch.tolist()) == [0, 1, 2, 3, 4] for epoch in seen.split(5))
    with_captions = Dataset(data.mean, data.std, data.sizes, [(torch.zeros(5, 77),) * 2], True)
    captioned = draw(with_captions, 4, 1000, 1, 3)
    assert torch.equal(captioned.prompt, captioned.picture)


def test_learning_rates():
    def rates(**settings):
        settings = {"lr_scheduler": "constant", **settings}
        return learning_rates(TrainConfig(max_train_steps=10, **settings).resolved()).tolist()

    assert rates() == pytest.approx([0.04] * 10)
    assert rates(learning_rate=0.01, scale_lr=True) == pytest.approx([0.04] * 10)
    assert rates(lr_warmup_steps=3)[:4] == pytest.approx([0.01, 0.02, 0.03, 0.04])
    cosine = rates(lr_scheduler="cosine")
    assert cosine[0] == pytest.approx(0.04)
    assert cosine[5] == pytest.approx(0.02)
    assert all(a > b for a, b in pairwise(cosine))


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_gradient_checkpointing_saves_less_and_changes_nothing(tiny_pipelines, family):
    """Of the UNet and of the text encoders, each on its own, since it is easily ignored by one of them."""

    def run(checkpointing):
        backbone, data, path, learner = setup(tiny_pipelines[family])
        if checkpointing:
            backbone.optimize_frozen("block", "auto")
        saved = []

        def pack(tensor):
            saved.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            backbone.condition([(ids[:1], mask[:1]) for ids, mask in data.tokens], data.sizes[:1])
        text = sum(saved)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = diffusion_loss(backbone, data, path, draw(data, 1, 1000, 0, 0))
        loss.backward()
        return text, sum(saved) - 2 * text, [e.directions.grad for e in learner.embeddings]

    text, unet, gradients = run(False)
    less_text, less_unet, same_gradients = run(True)
    assert less_text < 0.6 * text
    assert less_unet < 0.6 * unet
    for a, b in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(a, b)
