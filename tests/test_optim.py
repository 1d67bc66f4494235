"""The optimizers in the loops of others: whole embedding matrices, other dtypes, frozen parameters, wrong input."""

import copy
import importlib
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parameter import Parameter

import dti_fast
from dti_fast import DirectionSGD, SphericalAdam, SphericalSGD, TokenEmbedding, sphere

UNIT = {"SphericalSGD": SphericalSGD, "SphericalAdam": SphericalAdam}


def unit(*shape, seed=0, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=-1)


def gradients(steps, *shape, seed=1):
    return torch.randn(steps, *shape, generator=torch.Generator().manual_seed(seed))


def everything(optimizer):
    """Every tensor that the optimizer may change, as bytes."""
    tensors = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    tensors += [t for state in optimizer.state.values() for t in state.values()]
    return [t.clone().reshape(-1).view(torch.uint8) for t in tensors]


# Rows without a gradient


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize(
    "name", ["SphericalSGD", "SphericalSGD beta", "SphericalSGD momentum", "SphericalAdam", "DirectionSGD", "rows"]
)
def test_a_row_without_a_loss_gradient_stays_with_its_state(name, relative):
    """After steps that gave it momentum, and under a prior that pulls elsewhere."""
    p, mu = Parameter(unit(3, 40)), unit(3, 40, seed=5)
    prior = {"kappa": 0.5, "relative": relative}
    optimizer = {
        "SphericalSGD": lambda: SphericalSGD([p], lr=0.1, mu=mu, **prior),
        "SphericalSGD beta": lambda: SphericalSGD([p], lr=0.1, mu=mu, beta=0.9, **prior),
        "SphericalSGD momentum": lambda: SphericalSGD([p], lr=0.1, mu=mu, momentum=0.9, **prior),
        "SphericalAdam": lambda: SphericalAdam([p], lr=0.1, mu=mu, **prior),
        "DirectionSGD": lambda: DirectionSGD([p], lr=0.1, beta=0.9, **prior),
        "rows": lambda: DirectionSGD([p], lr=0.1, beta=0.9, rows=2, **prior),
    }[name]()

    def row():
        return [t[1].clone() for t in (p.detach(), *optimizer.state[p].values()) if len(t.shape) and len(t) == 3]

    for step, gradient in enumerate(gradients(6, 3, 40)):
        p.grad = gradient
        before = row()
        if step >= 3:
            p.grad[1] = 0
        optimizer.step()
        if step >= 3:
            assert all(map(torch.equal, before, row()))
        assert not torch.equal(before[0], p[1]) or step >= 3
        assert not torch.equal(before[0], p[2])


@pytest.mark.parametrize("name", ["SphericalSGD", "SphericalAdam", "DirectionSGD"])
def test_a_row_that_joins_later_goes_as_if_it_had_just_begun(name):
    """The corrections of the running means count a row's own steps."""

    def optimizer(p):
        if name == "DirectionSGD":
            return DirectionSGD([p], lr=0.1, beta=0.9)
        return SphericalSGD([p], lr=0.1, beta=0.9) if name == "SphericalSGD" else SphericalAdam([p], lr=0.1)

    p, alone = Parameter(unit(2, 40)), Parameter(unit(2, 40)[1:].clone())
    together, single = optimizer(p), optimizer(alone)
    for step, gradient in enumerate(gradients(8, 2, 40)):
        p.grad = gradient
        if step < 5:
            p.grad[1] = 0
        else:
            alone.grad = gradient[1:].clone()
            single.step()
        together.step()
    torch.testing.assert_close(p[1:].detach(), alone.detach())


def test_concepts_that_take_turns_both_learn(tiny_pipelines):
    """With a prior the one that a batch does not show once went back to its initial word: 0.5 and 2.8 degrees."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_pipelines["sd15"]
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    concepts = [
        TokenEmbedding.install(encoder, tokenizer, t, init=w) for t, w in (("<a>", "dog"), ("<b>", "cat"))
    ]  # fmt: skip
    optimizer = SphericalSGD([{"params": [c.rows], "mu": c.mu} for c in concepts], lr=0.04, kappa=1e-4)
    target = torch.randn(1, 77, 32, generator=torch.Generator().manual_seed(0))
    ids = [
        tokenizer(f"a photo of {c.placeholder}", padding="max_length", return_tensors="pt").input_ids for c in concepts
    ]
    for step in range(100):
        optimizer.zero_grad()
        F.mse_loss(encoder(ids[step % 2]).last_hidden_state, target).backward()
        optimizer.step()
    assert all(sphere.distance(c.rows, c.mu).rad2deg() > 60 for c in concepts)


# Input


@pytest.mark.parametrize("name", UNIT)
def test_unit_rows_are_asked_for(name):
    optimizer = UNIT[name]
    for wrong in (2 * unit(2, 8), 0 * unit(2, 8), torch.full((2, 8), torch.nan)):
        with pytest.raises(ValueError, match=r"moves unit rows.*DirectionSGD keeps every row at its own norm; got"):
            optimizer([Parameter(wrong)], lr=0.1)
    with pytest.raises(ValueError, match=r"mu holds unit rows.* is 2 away from 1"):
        optimizer([Parameter(unit(2, 8))], lr=0.1, kappa=1, mu=3 * unit(2, 8))
    with pytest.raises(ValueError, match="kappa needs mu"):
        optimizer([Parameter(unit(2, 8))], lr=0.1, kappa=1)
    p = Parameter(unit(2, 8))
    later = optimizer([p], lr=0.1)
    p.data *= 3
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="moves unit rows"):
        later.step()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"lr": -1.0}, "lr must be a number that is not negative, got -1"),
        ({"lr": torch.tensor(math.nan)}, "lr must be a number that is not negative, got nan"),
        ({"kappa": -1}, "kappa must be"),
        ({"kappa": math.nan}, "kappa must be"),
        ({"beta": 1.0}, "beta must lie in"),
        ({"rows": 0}, "rows must lie between 1 and 9"),
        ({"rows": 10}, "rows must lie between 1 and 9"),
    ],
    ids=str,
)
def test_settings_out_of_range(wrong, message):
    with pytest.raises(ValueError, match=message):
        DirectionSGD([Parameter(torch.randn(9, 8))], **{"lr": 0.1} | wrong)


def test_betas_out_of_range():
    with pytest.raises(ValueError, match="betas must lie in"):
        SphericalAdam([Parameter(unit(2, 8))], lr=0.1, betas=(0.9, 1.0))


@pytest.mark.parametrize("optimizer", [*UNIT.values(), DirectionSGD])
def test_learning_rates_of_every_kind(optimizer):
    kinds = [0.5, np.float32(0.5), np.float64(0.5), torch.tensor(0.5), torch.tensor([0.5]), torch.tensor(0.5).double()]
    ends = []
    for lr in kinds:
        p = Parameter(unit(2, 8))
        one = optimizer([p], lr=lr)
        p.grad = torch.ones_like(p)
        one.step()
        ends.append(p.detach())
    assert all(torch.equal(end, ends[0]) for end in ends) and not torch.equal(ends[0], unit(2, 8))
    p = Parameter(unit(2, 8))
    assert optimizer([p], lr=1).param_groups[0]["lr"] == 1


def test_a_learning_rate_of_another_method_is_told():
    with pytest.warns(UserWarning, match=r"0\.00011 degrees a step at lr 2e-06.* 0\.04 is a good start"):
        DirectionSGD([Parameter(torch.randn(9, 8))], lr=2e-6)


@pytest.mark.parametrize("momentum", [0.0, 0.8])
@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_float64_parameters(beta, momentum):
    """Against the formula in float64; float32 would be off by 1e-8."""
    p, mu = Parameter(unit(2, 40, dtype=torch.float64)), unit(2, 40, seed=5)
    optimizer = SphericalSGD([p], lr=0.04, kappa=0.3, mu=mu, beta=beta, momentum=momentum)
    v, nu, mean = p.detach().clone(), 0.0, torch.zeros(2, 40, dtype=torch.float64)
    for t, gradient in enumerate(gradients(20, 2, 40), 1):
        p.grad = gradient.double()
        optimizer.step()
        g = sphere.tangent(v, gradient.double() - 0.3 * mu.double())
        g = mean = momentum * sphere.tangent(v, mean) + (1 - momentum) * g
        nu = beta * nu + (1 - beta) * g.square().sum(-1, keepdim=True)
        v = sphere.retract(v, -0.04 * g / (nu / (1 - beta**t)).sqrt())
    assert (p.detach() - v).abs().max() < 1e-9 and (optimizer.state[p]["step"] == 20).all()
    q = Parameter(3 * unit(2, 40, dtype=torch.float64))
    other = DirectionSGD([q], lr=0.04)
    q.grad = torch.ones_like(q)
    other.step()
    assert (q.detach().norm(dim=-1) - 3).abs().max() < 1e-14


@pytest.mark.parametrize("optimizer", [*UNIT.values(), DirectionSGD])
def test_a_parameter_that_was_frozen_is_told(optimizer):
    """As `get_peft_model` freezes everything that it finds."""
    p = Parameter(unit(2, 8))
    one = optimizer([p], lr=0.1)
    p.requires_grad_(False)
    with pytest.warns(UserWarning, match="no longer requires a gradient, so it does not learn"):
        one.step()


def test_rows_that_peft_froze_are_told_and_rows_put_into_a_wrapped_encoder_learn(tiny_pipelines):
    peft = pytest.importorskip("peft")
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_pipelines["sd15"]

    def wrap(encoder):
        return peft.get_peft_model(encoder, peft.LoraConfig(r=2, target_modules=["q_proj"]))

    for first in (True, False):
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        encoder = wrap(encoder) if first else encoder
        concept = TokenEmbedding.install(encoder, tokenizer, "<x>", init="dog")
        optimizer = SphericalSGD([concept.rows], lr=0.04)
        wrapped = encoder if first else wrap(encoder)
        before = concept.rows.detach().clone()
        hidden = wrapped(input_ids=tokenizer("a <x>", return_tensors="pt").input_ids).last_hidden_state
        (hidden * torch.arange(32)).sum().backward()
        if first:
            optimizer.step()
        else:
            with pytest.warns(UserWarning, match="before TokenEmbedding.install"):
                optimizer.step()
        assert torch.equal(concept.rows, before) != first


def test_exports():
    assert set(dti_fast.__all__) <= set(dir(dti_fast))
    assert {"DirectionSGD", "SphericalAdam", "train", "load_embedding"} <= set(dti_fast.__all__)
    assert importlib.import_module("dti_fast").DirectionSGD is DirectionSGD


# DirectionSGD


@pytest.fixture(params=["sd15", "sd21"])
def stock(request, tiny_pipelines):
    """A text encoder whose vocabulary was extended by two tokens that start as `dog` and `cat`, as trainers do it."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = tiny_pipelines[request.param]

    def make():
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder").requires_grad_(False)
        return encoder, CLIPTokenizer.from_pretrained(folder / "tokenizer")

    return make


def extend(encoder, tokenizer):
    initial = tokenizer("dog cat", add_special_tokens=False).input_ids
    tokenizer.add_tokens(["<x>", "<x>_1"])
    encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    weight = encoder.get_input_embeddings().weight
    weight.data[-2:] = weight.data[initial]
    return weight.requires_grad_(True)


def train(encoder, tokenizer, optimizer, restore=lambda: None, steps=12, scaler=None):
    """A loop that shows the concept in different prompts; returns the losses."""
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    width = encoder.config.hidden_size
    target = torch.randn(2, 77, width, generator=torch.Generator().manual_seed(0))
    prompts = (["a photo of <x> <x>_1", "the <x> <x>_1 on grass"], ["a red <x> <x>_1 in snow", "a dog and a cat"])
    losses = []
    for step in range(steps):
        ids = tokenizer(prompts[step % 2], padding="max_length", max_length=77, return_tensors="pt").input_ids
        loss = F.mse_loss(encoder(ids).last_hidden_state.float(), target)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        restore()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("settings", [{}, {"beta": 0.9}, {"kappa": 0.1, "relative": True}, {"kappa": 0.0}], ids=str)
@pytest.mark.parametrize("rows", [None, 2])
def test_a_whole_matrix_learns_what_a_token_embedding_learns(stock, rows, settings, scaled):
    """A trainer that trains the whole vocabulary and restores all other words after every step."""
    encoder, tokenizer = stock()
    settings = {"lr": 0.04, "kappa": 1e-3, **settings}
    concept = TokenEmbedding.install(encoder, tokenizer, "<x>", init="dog cat", magnitude="class")
    first = concept.vectors().detach().clone()
    train(encoder, tokenizer, SphericalSGD([concept.rows], mu=concept.mu, **settings))
    expected = concept.vectors().detach()

    encoder, tokenizer = stock()
    weight = extend(encoder, tokenizer)
    words = weight.detach()[:-2].clone()
    optimizer = DirectionSGD(encoder.get_input_embeddings().parameters(), rows=rows, **settings)

    def restore():
        assert rows is None or torch.equal(weight[:-2], words)
        weight.data[:-2] = words

    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if scaled else None
    train(encoder, tokenizer, optimizer, restore, scaler=scaler)
    learned = weight.detach()[-2:]
    angles = sphere.distance(F.normalize(learned, dim=-1), F.normalize(expected, dim=-1)).rad2deg()
    assert (angles < 1e-3).all()
    assert (sphere.distance(F.normalize(learned, dim=-1), F.normalize(first, dim=-1)).rad2deg() > 5).all()
    torch.testing.assert_close(learned.norm(dim=-1), first.norm(dim=-1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_coarse_matrices_have_fine_masters_of_the_learned_rows(dtype):
    """A step of 0.002 moves most numbers by less than half a unit in their last place."""
    start = (0.4 * unit(50, 64)).to(dtype)
    coarse, fine = Parameter(start.clone()), Parameter(start.float())
    settings = {"lr": 0.002, "kappa": 1e-2, "rows": 2}
    one, other = DirectionSGD([coarse], **settings), DirectionSGD([fine], **settings)
    direction = torch.randn(50, 64, generator=torch.Generator().manual_seed(3)).to(dtype)
    for _ in range(100):
        coarse.grad, fine.grad = direction.clone(), direction.float()
        one.step(), other.step()
    assert torch.equal(coarse.detach(), fine.detach().to(dtype))
    assert torch.equal(coarse[:-2], start[:-2]) and not torch.equal(coarse[-2:], start[-2:])
    assert (F.cosine_similarity(fine.detach()[-2:], start[-2:].float()) < math.cos(0.1)).all()
    state = one.state[coarse]
    assert state["masters"].dtype == torch.float32 and sum(t.numel() for t in state.values()) < 5 * 2 * 64
    assert torch.equal(state["masters"], fine.detach()[-2:])


def test_coarse_matrices_need_rows_to_be_named():
    with pytest.raises(ValueError, match=r"bfloat16 is too coarse .* give rows"):
        DirectionSGD([Parameter(torch.randn(9, 8).bfloat16())])
    p = Parameter(torch.randn(9, 8))
    optimizer = DirectionSGD([p])
    p.data = p.data.half()  # trainers cast their models after they have made the optimizer
    p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="float16 is too coarse"):
        optimizer.step()


def test_a_row_that_somebody_else_wrote_is_taken_over():
    p = Parameter((0.4 * unit(9, 64)).bfloat16())
    optimizer = DirectionSGD([p], lr=0.04, rows=2)
    for gradient in gradients(3, 9, 64):
        p.grad = gradient.bfloat16()
        optimizer.step()
    p.data[-1] = (0.7 * unit(64, seed=9)).bfloat16()
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert p[-1].float().norm().item() == pytest.approx(0.7, rel=1e-2)
    assert sphere.distance(F.normalize(p[-1].float(), dim=-1), unit(64, seed=9)).item() == pytest.approx(0.04, rel=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_state_goes_on_as_if_nothing_had_happened(dtype):
    def make(start):
        p = Parameter(start.clone())
        return p, DirectionSGD([p], lr=0.04, kappa=0.1, beta=0.9, rows=3)

    start, steps = (0.4 * unit(9, 64)).to(dtype), gradients(8, 9, 64).to(dtype)
    p, optimizer = make(start)
    for step, gradient in enumerate(steps):
        if step == 4:
            saved, state = p.detach().clone(), optimizer.state_dict()
            q, other = make(saved)
            other.load_state_dict(copy.deepcopy(state))
        p.grad = gradient.clone()
        optimizer.step()
        if step >= 4:
            q.grad = gradient.clone()
            other.step()
    assert all(map(torch.equal, everything(optimizer), everything(other)))
    assert {t.dtype for t in other.state[q].values()} == {torch.float32}


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_overflow_skips_exactly(dtype, rows):
    if dtype == torch.bfloat16 and rows is None:
        pytest.skip("needs rows")
    p = Parameter((0.4 * unit(9, 64)).to(dtype))
    optimizer = DirectionSGD([p], lr=0.04, kappa=0.1, beta=0.9, rows=rows)
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = everything(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.zeros(()))
    p.grad[-1, 5] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert all(map(torch.equal, before, everything(optimizer))) and scaler.get_scale() == 2.0


def test_norms_do_not_drift():
    p = Parameter(torch.tensor([[0.01], [0.4], [30.0]]) * unit(3, 768))
    optimizer = DirectionSGD([p], lr=0.04)
    for gradient in gradients(1000, 3, 768):
        p.grad = gradient
        optimizer.step()
    torch.testing.assert_close(p.detach().norm(dim=-1), torch.tensor([0.01, 0.4, 30.0]), rtol=1e-5, atol=0)


def test_a_row_of_zeros_stays():
    p = Parameter(unit(2, 8) * torch.tensor([[0.0], [1.0]]))
    optimizer = DirectionSGD([p], lr=0.1)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not p[0].any() and p.isfinite().all()


def test_sparse_gradients_are_refused():
    embedding = nn.Embedding(9, 8, sparse=True)
    optimizer = DirectionSGD(embedding.parameters())
    embedding(torch.tensor([3])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


@pytest.mark.parametrize(("dtype", "rows"), [(torch.float32, None), (torch.float32, 2), (torch.bfloat16, 2)])
def test_no_step_reads_the_device(dtype, rows):
    """On the meta device, where reading a number raises."""
    p = Parameter(torch.empty(9, 8, dtype=dtype, device="meta"))
    optimizer = DirectionSGD([p], lr=torch.tensor(0.04, device="meta"), kappa=0.1, beta=0.9, rows=rows)
    optimizer.grad_scale, optimizer.found_inf = torch.ones((), device="meta"), torch.zeros((), device="meta")
    for relative in (False, True):
        optimizer.param_groups[0]["relative"] = relative
        p.grad = torch.empty_like(p)
        optimizer.step()


@pytest.mark.parametrize("name", UNIT)
def test_no_step_of_unit_rows_reads_the_device(name):
    p = Parameter(torch.empty(3, 8, device="meta"))
    optimizer = UNIT[name]([p], lr=torch.tensor(0.04, device="meta"), kappa=0.1, mu=torch.empty(3, 8, device="meta"))
    optimizer.found_inf = torch.zeros((), device="meta")
    p.grad = torch.empty_like(p)
    optimizer.step()
