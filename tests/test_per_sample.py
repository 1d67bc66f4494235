"""Per-sample normalised gradients and momentum on the sphere: from the prompts of a batch to the step."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from runs import command, train_arguments
from safetensors.torch import load_file
from steps import GOOD, setup

from dti_fast import SphericalSGD, TokenEmbedding, sphere
from dti_fast.data.draws import draw
from dti_fast.loss import diffusion_loss
from dti_fast.trainer.step import train_step

OPTIONS = {"momentum": 0.9, "per_sample_normalisation": True}


def directions(learner):
    return torch.cat([e.directions.detach().double().flatten() for e in learner.embeddings])


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_the_step_of_the_formula(tiny_pipelines, family):
    """Against gradients of one sample at a time and the update in float64, which share no code with the fused ones."""
    kappa, lr, momentum = 0.1, 0.1, 0.7
    settings = {"kappa": kappa, "num_vectors": 2, "lr": lr, "momentum": momentum, "per_sample_normalisation": True}
    settings["prompts"] = ("a photo of <x> <x>_1", "<x> <x>_1 on grass")
    backbone, data, path, learner = setup(tiny_pipelines[family], **settings)
    rows = [e.rows for e in learner.embeddings]
    mean = [torch.zeros(p.shape, dtype=torch.float64) for p in rows]
    for step in range(3):
        draws = draw(data, 3, 1000, 0, step)
        counts = [(e, e.counts) for e in learner.embeddings]
        units = [torch.zeros(p.shape, dtype=torch.float64) for p in rows]
        for e, _ in counts:
            e.counts = None  # ordinary gradients
        for sample in draws.split(1):
            gradients = torch.autograd.grad(diffusion_loss(backbone, data, path, sample), rows)
            for unit, p, g in zip(units, rows, gradients, strict=True):
                unit += F.normalize(sphere.tangent(p.detach().double(), g.double()), dim=-1) / 3
        for e, own in counts:
            e.counts = own
        expected = []
        for i, e in enumerate(learner.embeddings):
            v = rows[i].detach().double()
            mean[i] = sphere.tangent(v, momentum * mean[i] + (1 - momentum) * (units[i] - kappa * e.mu.double()))
            expected.append(sphere.retract(v, -lr * F.normalize(mean[i], dim=-1)))
        train_step(backbone, data, path, [draws], learner, GOOD)
        assert (directions(learner) - torch.cat([v.flatten() for v in expected])).abs().max() < 1e-5
        assert all(e.counts.grad.eq(3).all() for e in learner.embeddings)


def after(folder, sizes, factor=1.0, scaler=None, steps=3, monkeypatch=None, **settings):
    """Directions after steps of four pictures, taken in passes of these sizes."""
    backbone, data, path, learner = setup(folder, scaler=scaler, lr=0.2, **OPTIONS, **settings)
    if factor != 1:
        monkeypatch.setattr("dti_fast.trainer.step.diffusion_loss", lambda *a: factor * diffusion_loss(*a))
    for step in range(steps):
        parts = torch.tensor(range(4)).split(sizes)
        draws = draw(data, 4, 1000, 0, step)
        passes = [type(draws)(*(t[part] for t in vars(draws).values())) for part in parts]
        train_step(backbone, data, path, passes, learner, GOOD)
    return directions(learner)


def test_passes_of_any_size_are_one_batch(tiny_pipelines):
    whole = after(tiny_pipelines["sd15"], [4], kappa=0.1)
    for sizes in ([1, 1, 1, 1], [3, 1]):
        assert (after(tiny_pipelines["sd15"], sizes, kappa=0.1) - whole).abs().max() < 1e-5


@pytest.mark.parametrize("kappa", [0.0, 0.1])
def test_the_scale_of_the_loss_changes_nothing(tiny_pipelines, monkeypatch, kappa):
    plain = after(tiny_pipelines["sd15"], [4], kappa=kappa)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    assert torch.equal(after(tiny_pipelines["sd15"], [4], scaler=scaler, kappa=kappa), plain)
    scaled = after(tiny_pipelines["sd15"], [4], 1e3, kappa=kappa, monkeypatch=monkeypatch)
    assert (scaled - plain).abs().max() < 1e-6


def test_an_overflow_of_one_sample_skips_exactly(tiny_pipelines):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    backbone, data, path, learner = setup(tiny_pipelines["sd15"], scaler=scaler, **OPTIONS)
    for step in range(4):
        before = {key: value.clone() for key, value in learner.state().items()}
        handle = None
        if step == 2:

            def overflow(module, ids, out):
                factor = torch.ones(len(out), 1, 1)
                factor[1] = torch.inf
                out.register_hook(lambda g: g * factor)

            handle = learner.embeddings[0].register_forward_hook(overflow)
        train_step(backbone, data, path, [draw(data, 2, 1000, 0, step)], learner, GOOD)
        same = [torch.equal(before[key], value) for key, value in learner.state().items() if key in before]
        assert all(same) if handle else not all(same) or not before
        if handle:
            handle.remove()
    assert scaler.get_scale() == 2.0**9
    assert learner.state()["directions.0/step"].item() == 3


def problem(kappa=0.3, **options):
    """A concept of two vectors in a loop of one's own, its optimizer, and a loss of prompts."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = torch.nn.Embedding.from_pretrained(torch.randn(20, 16, generator=generator))
    concept = TokenEmbedding(
        vocabulary, torch.randn(2, 16, generator=generator), torch.ones(2, 1), 20, ["<x>", "<x>_1"]
    )
    pulls = torch.randn(4, 6, 16, generator=generator)

    def loss(ids, factor=1.0):
        return factor * (concept(ids).square() * pulls[: len(ids)]).sum()

    params = [concept.rows, concept.per_sample()]
    return (
        concept,
        SphericalSGD(params, lr=0.1, kappa=kappa, mu=concept.mu.roll(1, 0), per_sample=True, **options),
        loss,
    )


BOTH = torch.tensor([[1, 20, 21, 3, 4, 5], [2, 7, 20, 21, 4, 5], [2, 2, 2, 20, 21, 2]])
NEITHER = torch.tensor([[1, 2, 3, 4, 5, 6]])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_row_that_no_sample_shows_stays_with_its_state(beta, relative):
    concept, optimizer, loss = problem(momentum=0.9, beta=beta, relative=relative)
    loss(BOTH).backward()
    optimizer.step()
    optimizer.zero_grad()
    state = optimizer.state[concept.rows]
    before = {key: value.clone() for key, value in state.items()}
    rows = concept.rows.detach().clone()
    loss(torch.where(BOTH == 20, 0, BOTH)).backward()  # the second vector alone
    optimizer.step()
    assert concept.counts.grad.flatten().tolist() == [0, 3]
    assert (concept.rows != rows).any(-1).tolist() == [False, True]
    assert (state["momentum_buffer"] != before["momentum_buffer"]).any(-1).tolist() == [False, True]
    if beta:
        assert torch.equal(state["second_moment"][0], before["second_moment"][0])
        assert state["step"].flatten().tolist() == [1, 2]


def test_prompts_without_the_concept_have_no_share():
    """Neither in the mean nor, by that, in the weight of the prior."""
    results = []
    for ids in (BOTH, torch.cat([BOTH, NEITHER])):
        concept, optimizer, loss = problem()
        loss(ids).backward()
        optimizer.step()
        results.append(concept.rows.detach())
    assert torch.equal(*results)


def test_one_factor_on_both_gradients_changes_nothing():
    """As clipping, unscaling and averaging over processes have it."""
    results = []
    for factor in (1.0, 2.0**-16):
        concept, optimizer, loss = problem(momentum=0.9)
        for _ in range(3):
            loss(BOTH).backward()
            concept.rows.grad *= factor
            concept.counts.grad *= factor
            optimizer.step()
            optimizer.zero_grad()
        results.append(concept.rows.detach())
    assert torch.equal(*results)


def test_a_scaler_that_unscales_first_changes_nothing():
    results = []
    for scale in (None, 2.0**10):
        concept, optimizer, loss = problem()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 1.0, enabled=scale is not None)
        scaler.scale(loss(BOTH)).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(concept.parameters(), 1e-3)
        scaler.step(optimizer)
        results.append(concept.rows.detach())
    torch.testing.assert_close(*results, rtol=0, atol=1e-6)


def test_magnitudes_learn_from_the_gradient_itself():
    gradients = []
    for normalised in (False, True):
        concept, _, loss = problem()
        if not normalised:
            concept.counts = None
        scales = concept.train_magnitude()
        loss(BOTH).backward()
        gradients.append(scales.grad)
    torch.testing.assert_close(*gradients)
    assert gradients[0].abs().min() > 1e-3


def test_two_concepts_in_one_prompt():
    concept, _, _ = problem()
    other = TokenEmbedding(concept, torch.eye(1, 16), torch.ones(1, 1), 30, ["<y>"])
    other.per_sample()
    (other(torch.tensor([[30, 20, 21], [30, 1, 2]])) * torch.randn(2, 3, 16)).sum().backward()
    assert other.counts.grad.tolist() == [[2]] and concept.counts.grad.tolist() == [[1], [1]]
    assert other.rows.grad.norm() > 0.1 and concept.rows.grad.norm(dim=-1).sub(1).abs().max() < 1e-5


def test_counts_are_no_part_of_a_model():
    concept, _, _ = problem()
    assert "counts" not in concept.state_dict() and concept.per_sample() is concept.counts
    concept.bfloat16()
    assert concept.counts.dtype == torch.float32
    with torch.no_grad():
        assert torch.equal(concept(BOTH[0]), concept(BOTH)[0])  # any shape of ids
    free = TokenEmbedding(torch.nn.Embedding(5, 16), torch.randn(1, 16), None, 5, ["<x>"])
    with pytest.raises(ValueError, match="give the embedding a magnitude"):
        free.per_sample()


def test_a_saved_optimizer_goes_on_as_if_nothing_had_happened():
    rows = []
    for interrupted in (False, True):
        concept, optimizer, loss = problem(momentum=0.9, beta=0.5)
        for step in range(4):
            if interrupted and step == 2:
                state, start = optimizer.state_dict(), concept.rows.detach()
                concept, optimizer, loss = problem(momentum=0.9, beta=0.5)
                concept.rows.data.copy_(start)
                optimizer.load_state_dict(state)
            optimizer.zero_grad()
            loss(BOTH, 1.0 + step).backward()
            optimizer.step()
        rows.append(concept.rows.detach())
    assert torch.equal(*rows)


def test_a_state_of_an_earlier_version_is_taken():
    p = torch.nn.Parameter(torch.eye(2, 8))
    optimizer = SphericalSGD([p], lr=0.1)
    state = optimizer.state_dict()
    for name in ("momentum", "per_sample"):
        del state["param_groups"][0][name]
    optimizer.load_state_dict(state)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(p, torch.eye(2, 8))


def test_wrong_use_is_told():
    concept, optimizer, _ = problem()
    for params in ([concept.rows], [concept.rows, concept.mu]):
        with pytest.raises(ValueError, match=r"per_sample needs the counts of a parameter, \[2, 1\], after it"):
            SphericalSGD(params, lr=0.1, per_sample=True)
    with pytest.raises(ValueError, match=r"momentum must lie in \[0, 1\)"):
        SphericalSGD([concept.rows], lr=0.1, momentum=1.0)
    concept.rows.grad = torch.ones_like(concept.rows)
    with pytest.raises(RuntimeError, match="gradient without counts"):
        optimizer.step()


def test_a_run_that_stopped_is_resumed_bit_for_bit(tiny_pipelines, pictures, tmp_path):
    """From the command, out of the checkpoint that a killed run would have left."""
    settings = {"max_train_steps": 5, "checkpointing_steps": 1, "checkpoints_total_limit": 9, "resolution": 64}
    settings |= {"train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 0.16, **OPTIONS}
    model, whole, rest = tiny_pipelines["sd15"], tmp_path / "whole", tmp_path / "rest"
    run = command(*train_arguments(model, pictures, whole, **settings))
    assert run.returncode == 0, run.stderr
    (rest / "checkpoints").mkdir(parents=True)
    shutil.copy(whole / "checkpoints" / "checkpoint-000002.safetensors", rest / "checkpoints")
    settings["resume_from_checkpoint"] = "latest"
    run = command(*train_arguments(model, pictures, rest, **settings))
    assert run.returncode == 0 and "resuming after step 2" in run.stderr, run.stderr
    ours, theirs = (load_file(folder / "learned_embeds.safetensors")["<toy>"] for folder in (rest, whole))
    assert torch.equal(ours, theirs)
    last = load_file(rest / "checkpoints" / "checkpoint-000005.safetensors")
    assert last["directions.0/momentum_buffer"].norm() > 0.01
    run = command(*train_arguments(model, pictures, rest, **settings | {"momentum": 0.0}))
    assert run.returncode == 2 and "momentum (was 0.9)" in run.stderr


def test_compiles_to_one_graph():
    from torch._dynamo.testing import CompileCounterWithBackend

    concept, _, loss = problem()
    counter = CompileCounterWithBackend("aot_eager")
    torch.compile(loss, fullgraph=True, backend=counter)(BOTH).backward()
    ours = [concept.rows.grad, concept.counts.grad]
    concept.rows.grad = concept.counts.grad = None
    loss(BOTH).backward()
    assert counter.frame_count == 1
    torch.testing.assert_close(ours, [concept.rows.grad, concept.counts.grad])
