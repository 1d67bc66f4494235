"""Plans: what is counted by parts is what a whole step needs, and the pick is the cheapest that fits."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from runs import command, refused
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bench_memory import measure
from dti_fast import TokenEmbedding
from dti_fast.backbones.skeleton import skeleton
from dti_fast.backbones.stable_diffusion import StableDiffusion
from dti_fast.data.draws import Dataset, Draws
from dti_fast.errors import UserError
from dti_fast.loss import diffusion_loss
from dti_fast.memory.count import TEXT, Step, compose, count_step, ladder, uniform
from dti_fast.memory.estimator import Estimator, micro_batches
from dti_fast.memory.live_bytes import LiveBytes
from dti_fast.memory.plan import GIB, MARGIN, MODES, Model, Plan, choose


@pytest.fixture(scope="module")
def sd15():
    return Estimator("sd15", torch.bfloat16, batch=2, resolution=512)


class FakeStep:
    """The pass of one picture that `sd15` counts, put together by hand."""

    def __init__(self):
        self.fake = FakeTensorMode()
        with self.fake:
            self.backbone = skeleton("sd15", torch.bfloat16)
            (encoder,), (tokenizer,) = self.backbone.text_encoders, self.backbone.tokenizers
            TokenEmbedding.install(encoder, tokenizer, "<x>", init=torch.empty(1, 768))
            latents, row, ids = torch.empty(1, 4, 64, 64), torch.zeros(1, dtype=torch.int64), torch.ones(1, 77).long()
            self.data = Dataset(latents, latents, torch.empty(1, 6), [(ids, ids)], False)
            self.draws = Draws(row, row, row, latents, latents)

    def condition(self) -> dict:
        return self.backbone.condition(self.data.tokens, self.data.sizes)

    def loss(self) -> torch.Tensor:
        return diffusion_loss(self.backbone, self.data, self.backbone.path(), self.draws)


@pytest.fixture(scope="module")
def step():
    return FakeStep()


@pytest.fixture(scope="module")
def counts(sd15):
    return {mode: sd15.count(mode, 1) for mode in MODES}


def test_a_mixture_is_the_sum_of_its_parts(step, counts):
    modes = uniform(counts, "none") | {
        TEXT: "block", "down_blocks.0": "geglu", "down_blocks.1": "block", "mid_block": "block",
        "up_blocks.2": "block", "up_blocks.3": "geglu",
    }  # fmt: skip
    composed = compose(counts, modes)
    step.backbone.optimize_frozen(modes, "auto")
    with step.fake:
        counted = {"mixed": count_step(step.backbone.denoiser, step.backbone.blocks(), step.loss)}
    whole = compose(counted, uniform(counted, "mixed"))
    assert composed.flops == whole.flops
    assert composed.saved == pytest.approx(whole.saved, rel=1e-3)
    assert composed.peak == pytest.approx(whole.peak, rel=1e-2)
    assert whole.saved < 0.8 * compose(counts, uniform(counts, "none")).saved


@pytest.mark.parametrize("mode", MODES)
def test_the_unets_share_is_what_the_benchmark_of_memory_counts(step, counts, mode):
    step.backbone.optimize_frozen(mode, "auto")
    with step.fake, LiveBytes() as counter:
        condition = step.condition()
        text = counter.live
        del condition
    kinds, peak = measure("sd15", 512, 1, mode)
    counted = compose(counts, uniform(counts, mode))
    assert counted.saved - text == pytest.approx(sum(kinds.values()), rel=2e-3)
    assert counted.peak - text == pytest.approx(peak, rel=0.02)


def test_the_peak_is_that_of_the_step_as_a_whole(step, counts):
    """Segments only cut it up."""
    step.backbone.optimize_frozen("none", "auto")
    with step.fake, LiveBytes() as counter:
        loss = step.backbone.denoise(step.data.mean, torch.zeros(1), step.condition())
        live = counter.live
        loss.square().mean().backward()
    counted = compose(counts, uniform(counts, "none"))
    assert counted.saved == pytest.approx(live, rel=0.01)
    assert counted.peak == pytest.approx(counter.peak, rel=0.01)


def test_more_recomputation_keeps_less_and_computes_more(counts):
    none, geglu, block = (compose(counts, uniform(counts, mode)) for mode in MODES)
    assert block.saved < geglu.saved < none.saved
    assert block.peak < geglu.peak < none.peak
    assert none.flops < geglu.flops < block.flops
    forward = sum(s.flops for s in counts["none"].segments[: counts["none"].forward])
    assert none.flops + 0.7 * forward < block.flops <= none.flops + forward


def test_the_ladder_descends_and_gets_dearer(counts):
    steps = [compose(counts, modes) for modes in ladder(counts)]
    assert steps[0] == compose(counts, uniform(counts, "none"))
    assert all(a.peak > b.peak and a.flops < b.flops for a, b in pairwise(steps))
    assert steps[-1].peak <= compose(counts, uniform(counts, "block")).peak
    assert len(steps) > 4


def test_a_batch_in_passes_needs_less(sd15):
    whole, halves = sd15.plan("bf16", "none", 2), sd15.plan("bf16", "none", 1)
    assert (whole.passes, halves.passes) == (1, 2)
    assert halves.step.peak < 0.6 * whole.step.peak
    assert whole.cost < halves.cost < 1.3 * whole.cost


def test_sdxl_at_1024_fits_12_gib_without_recomputation():
    plan = Estimator("sdxl", torch.bfloat16, batch=1, resolution=1024).choose(["bf16"], 12 * GIB)
    assert plan.fits(12 * GIB)
    assert set(plan.modes.values()) == {"none"}
    assert (plan.precision, plan.encode_alone, plan.tiled_decoding) == ("bf16", False, False)


MODEL = Model(
    weights={"bf16": 4 * GIB, "nf4": GIB}, text_encoders={"bf16": GIB, "nf4": GIB},
    vae=GIB // 8, encode=GIB, guidance=GIB // 4, decode=2 * GIB, decode_tiled=GIB // 4,
)  # fmt: skip


def a_plan(saved: float, flops: float, **settings) -> Plan:
    step = Step(int(saved * GIB), int(saved * GIB) + GIB // 8, int(flops))
    return replace(Plan(MODEL, "bf16", {TEXT: "none"}, 4, 1, step), **settings)


def test_the_cheapest_that_fits_is_chosen():
    plans = [a_plan(0.5, 3e15), a_plan(4, 1e15), a_plan(2, 2e15)]
    assert choose(plans, 24 * GIB) == plans[1]
    assert choose(plans, 9 * GIB) == plans[2]
    assert choose(plans, 6 * GIB) is None
    assert plans[1].fits(plans[1].total + MARGIN)
    assert not plans[1].fits(plans[1].total + MARGIN - 1)


def test_thrifts_outside_of_the_step_only_where_they_are_needed():
    plan = a_plan(0.5, 1)
    assert (plan.within(24 * GIB).encode_alone, plan.within(24 * GIB).tiled_decoding) == (False, False)
    assert (plan.within(7 * GIB).encode_alone, plan.within(7 * GIB).tiled_decoding) == (False, True)
    assert (plan.within(6.5 * GIB).encode_alone, plan.within(6.5 * GIB).tiled_decoding) == (True, True)
    assert plan.within(6.5 * GIB).total < plan.within(7 * GIB).total < plan.total
    assert a_plan(0.5, 1, previews=False).within(7 * GIB).tiled_decoding is False


def test_micro_batches_are_equal_parts():
    assert micro_batches(1) == [1]
    assert micro_batches(4) == [4, 2, 1]
    assert micro_batches(6) == [6, 3, 1]
    assert micro_batches(7) == [7, 1]


def test_quantised_weights_are_the_last_resort(sd15):
    def pick(vram):
        return sd15.choose(["bf16", "int8", "nf4"], vram * GIB)

    assert pick(8).precision == "bf16"
    smallest = min(plan.within(0).total for plan in sd15.plans("bf16")) + MARGIN
    assert sd15.choose(["bf16"], smallest).precision == "bf16"
    assert pick((smallest - 1) / GIB).precision != "bf16"
    with pytest.raises(UserError, match=r"sd15 at 512 pixels does not fit 1\.0 GiB; the smallest plan .* needs"):
        pick(1)


def plan(model, *arguments):
    return command("plan", "--pretrained-model-name-or-path", model, "--train_batch_size", "1", *arguments)


def test_plan_on_the_command_line():
    run = plan("pocket", "--vram", "4", "--resolution", "64")
    assert run.returncode == 0, run.stderr
    assert "pocket at 64 pixels, batch 1, 4.0 GiB" in run.stdout
    assert "Pick: recompute none, weights bf16" in run.stdout
    for word in ("saved", "transient", "VAE encode", "context", "geglu", "int8", "nf4", "1 x 1", "unconfirmed"):
        assert word in run.stdout


def test_plan_says_what_would_fit(tiny_pipelines):
    model = tiny_pipelines["sd15"]
    run = plan(model, "--vram", "0.5")
    refused(run, f"error: training {model} at 64 pixels does not fit 0.5 GiB; the smallest plan")
    assert "geglu" in run.stdout


def test_a_preview_is_counted_without_the_encoding_of_pictures(monkeypatch):
    def model(encode):
        monkeypatch.setattr(StableDiffusion, "encode", encode)
        estimator = Estimator("pocket", torch.float32, batch=1)
        estimator._key = None  # counted anew
        return estimator.model

    def wasteful(self, pixels):
        torch.empty(1 << 30)
        return stock(self, pixels)

    stock = StableDiffusion.encode
    usual, other = model(stock), model(wasteful)
    assert other.encode >= 4 << 30 > usual.encode
    assert (other.guidance, other.decode, other.decode_tiled) == (usual.guidance, usual.decode, usual.decode_tiled)
