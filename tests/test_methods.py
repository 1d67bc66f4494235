"""The methods that DTI is compared with, and its ablations: each against a direct computation."""

import json
from pathlib import Path

import pytest
import torch
from runs import command, refused, train_arguments
from steps import GOOD, setup

from dti_fast import SphericalSGD, sphere, train
from dti_fast.backbones.load import load_backbone
from dti_fast.data.draws import draw
from dti_fast.errors import UserError
from dti_fast.files import read_tensors
from dti_fast.formats import read_embeddings
from dti_fast.loss import diffusion_loss
from dti_fast.optim import SphericalAdam
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.step import train_step

METHODS = [
    {"method": "ti"},
    {"method": "ti-rescaled"},
    {"method": "crossinit", "num_vectors": 2},
    {"optimizer": "adamw"},
    {"kappa_mode": "relative", "beta": 0.5, "num_vectors": 3},
]


def run(model: Path, pictures: Path, output: Path, **settings):
    return train(
        TrainConfig(
            pretrained_model_name_or_path=str(model), train_data_dir=pictures, output_dir=output,
            placeholder_token="<x>", initializer_token="dog", num_validation_images=0, **settings,
        )
    )  # fmt: skip


def steps(tiny_pipeline, count, **settings):
    """The learner after `count` steps, and its loss at each."""
    backbone, data, path, learner = setup(tiny_pipeline, **settings)
    losses = [train_step(backbone, data, path, [draw(data, 4, 1000, 0, i)], learner, GOOD)[0] for i in range(count)]
    return learner, torch.stack(losses)


def test_textual_inversion_is_adamw_on_the_whole_vocabulary_with_the_other_rows_put_back(tiny_pipelines):
    """What diffusers' textual_inversion.py does, with the same draws, for twenty steps."""
    learner, losses = steps(tiny_pipelines["sd15"], 20, method="ti", lr=0.02)
    backbone = load_backbone(str(tiny_pipelines["sd15"]), torch.float32, torch.device("cpu"))
    text_encoder, tokenizer = backbone.text_encoders[0], backbone.tokenizers[0]
    tokenizer.add_tokens("<x>")
    text_encoder.resize_token_embeddings(len(tokenizer))
    vocabulary, new = text_encoder.get_input_embeddings().weight, tokenizer.convert_tokens_to_ids("<x>")
    vocabulary.data[new] = vocabulary.data[tokenizer.convert_tokens_to_ids("dog</w>")]
    vocabulary.requires_grad_(True)
    start, others = vocabulary.detach().clone(), torch.arange(len(vocabulary)) != new
    optimizer = torch.optim.AdamW([vocabulary], lr=0.02, betas=(0.9, 0.999), weight_decay=1e-2, eps=1e-8)
    _, data, path, _ = setup(tiny_pipelines["sd15"])
    expected = []
    for i in range(20):
        optimizer.zero_grad()
        loss = diffusion_loss(backbone, data, path, draw(data, 4, 1000, 0, i))
        loss.backward()
        optimizer.step()
        vocabulary.data[others] = start[others]
        expected.append(loss.detach())
    ours = learner.vectors()[0][0]
    torch.testing.assert_close(losses, torch.stack(expected), rtol=1e-5, atol=0)
    # Adam divides by the root of what is left of tiny gradients: an element may differ by a thousandth of a step.
    torch.testing.assert_close(ours, vocabulary.data[new], rtol=0, atol=2e-5)
    assert ours.norm() > 2 * start[new].norm()  # nothing holds the norm


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_rescaled_files_have_the_norm_of_the_vocabulary_and_the_direction_of_textual_inversion(
    tiny_pipelines, pictures, tmp_path, family
):
    model, settings = tiny_pipelines[family], {"max_train_steps": 6, "checkpointing_steps": 3, "save_steps": 3}
    plain = run(model, pictures, tmp_path / "ti", method="ti", **settings)
    rescaled = run(model, pictures, tmp_path / "rescaled", method="ti-rescaled", **settings)
    backbone = load_backbone(str(model), torch.float32, torch.device("cpu"))
    for at in (".", "step-000003"):
        ours, metadata = read_embeddings(tmp_path / "rescaled" / at)
        theirs, _ = read_embeddings(tmp_path / "ti" / at)
        norms = [e.get_input_embeddings().weight.norm(dim=-1).mean().item() for e in backbone.text_encoders]
        assert [v.norm().item() for v in ours] == pytest.approx(norms, rel=1e-6)
        assert json.loads(metadata["magnitude"]) == pytest.approx(norms, rel=1e-6)
        trained = [v.norm().item() for v in theirs]
        assert json.loads(metadata["trained_magnitude"]) == pytest.approx(trained, rel=1e-6)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a / a.norm(), b / b.norm())
    assert metadata["method"] == "ti-rescaled"
    assert rescaled.magnitudes == pytest.approx(norms, rel=1e-6)
    last = json.loads(plain.log_path.read_text().splitlines()[-1])
    assert last["magnitude"] == pytest.approx(plain.magnitudes, rel=1e-6)
    assert plain.magnitudes != pytest.approx(norms, rel=0.1)


def test_cross_initialization_starts_from_the_text_encoders_own_output(tiny_pipelines):
    *_, learner = setup(tiny_pipelines["sdxl"], method="crossinit", initializer_token="red dog")
    stock = load_backbone(str(tiny_pipelines["sdxl"]), torch.float32, torch.device("cpu"))
    for embedding, encoder, tokenizer in zip(learner.embeddings, stock.text_encoders, stock.tokenizers, strict=True):
        ids = tokenizer("red dog", padding="max_length", max_length=77, return_tensors="pt").input_ids
        with torch.no_grad():
            hidden = encoder(ids, output_hidden_states=True).hidden_states[-1]
            hidden = getattr(encoder, "text_model", encoder).final_layer_norm(hidden)
        torch.testing.assert_close(embedding.vectors().detach(), hidden[0, 1:3], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(embedding(torch.tensor([[embedding.first_id + 1]]))[0], hidden[0, 2:3])


def test_cross_initialization_is_held_at_its_start(tiny_pipelines):
    *_, learner = setup(tiny_pipelines["sdxl"], method="crossinit", reg_lambda=0.5)
    moves = [torch.randn_like(e.rows) for e in learner.embeddings]
    for embedding, move in zip(learner.embeddings, moves, strict=True):
        embedding.rows.data += move
    expected = 0.5 * sum(move.double().square().mean() for move in moves)
    assert learner.penalty().item() == pytest.approx(expected.item(), rel=1e-5)
    _, losses = steps(tiny_pipelines["sd15"], 2, method="crossinit", reg_lambda=1e6)
    _, free = steps(tiny_pipelines["sd15"], 2, method="crossinit", reg_lambda=0)
    assert losses[0] == free[0]
    assert losses[1] > free[1] + 10  # 1e6 times the square of one step of 0.04


def test_spherical_adam_is_its_formula(tiny_pipelines):
    """In float64, over five steps; the first turns by no more than arctan(lr)."""
    generator = torch.Generator().manual_seed(0)
    start = torch.nn.functional.normalize(torch.randn(3, 64, generator=generator), dim=-1)
    mu = torch.nn.functional.normalize(torch.randn(3, 64, generator=generator), dim=-1)
    p = torch.nn.Parameter(start.clone())
    optimizer = SphericalAdam([p], lr=torch.tensor(0.04), kappa=0.01, mu=mu)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(8.0), torch.zeros(())
    x, m, v = start.double(), 0.0, 0.0
    for t in range(1, 6):
        gradient = torch.randn(3, 64, generator=generator)
        p.grad = 8 * gradient
        optimizer.step()
        g = gradient.double() - 0.01 * mu.double()
        g = g - (g * x).sum(-1, keepdim=True) * x
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        u = (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        u = u - (u * x).sum(-1, keepdim=True) * x
        before, x = x, x - 0.04 / 8 * u
        x = x / x.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(p.detach().double(), x, rtol=0, atol=1e-6)
        angle = sphere.distance(before, x)
        assert t > 1 or ((angle > 0.9 * 0.04) & (angle < 0.04)).all()
    assert (p.detach().norm(dim=-1) - 1).abs().max() < 1e-6
    optimizer.found_inf = torch.ones(())
    kept = [t.clone() for t in (p.detach(), *optimizer.state[p].values())]
    p.grad = torch.full_like(p, torch.nan)
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(kept, (p.detach(), *optimizer.state[p].values()), strict=True))


def test_rows_without_a_gradient_keep_their_bits_under_spherical_adam():
    p = torch.nn.Parameter(torch.nn.functional.normalize(torch.randn(2, 32), dim=-1) * 1.0000001)
    start = p.detach().clone()
    optimizer = SphericalAdam([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.randn(2, 32) * torch.tensor([[0.0], [1.0]])
        optimizer.step()
    assert torch.equal(p[0], start[0])
    assert sphere.distance(p.detach()[1], start[1]) > 0.1


@pytest.mark.parametrize("optimizer_class", [SphericalSGD, SphericalAdam])
def test_relative_kappa_does_not_depend_on_the_scale_of_the_loss(optimizer_class):
    generator = torch.Generator().manual_seed(0)
    start, mu = torch.nn.functional.normalize(torch.randn(2, 2, 48, generator=generator), dim=-1)
    gradients = torch.randn(5, 2, 48, generator=generator)

    def end(scale, relative, grad_scale=None, kappa=0.5):
        p = torch.nn.Parameter(start.clone())
        optimizer = optimizer_class([p], lr=0.1, kappa=kappa, mu=mu, relative=relative)
        optimizer.grad_scale = grad_scale
        for gradient in gradients:
            p.grad = scale * gradient
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(end(1000, True), end(1, True))
    torch.testing.assert_close(end(1024, True, torch.tensor(1024.0)), end(1, True))
    assert (end(1000, False) - end(1, False)).abs().max() > 0.01
    pulled, free = (sphere.distance(end(1, True, kappa=k), mu) for k in (5.0, 0.0))
    assert (pulled < free - 0.1).all()


def test_relative_kappa_adds_a_share_of_each_rows_gradient_along_the_sphere():
    p = torch.nn.Parameter(torch.tensor([[1.0, 0, 0], [0, 1.0, 0]]))
    mu = torch.tensor([[0.0, 0, 1.0], [0, 0, 1.0]])
    p.grad = torch.tensor([[9.0, 2.0, 0], [0.5, 7.0, 0]])  # along the sphere: 2 and 0.5
    SphericalSGD([p], lr=1.0, kappa=1.0, mu=mu, relative=True).step()
    half = 0.5**0.5
    moved = torch.tensor([[1.0, -half, half], [-half, 1.0, half]])
    torch.testing.assert_close(p.detach(), moved / 2**0.5)


@pytest.mark.parametrize("settings", METHODS, ids=lambda s: "-".join(map(str, s.values())))
def test_a_resumed_run_ends_with_the_same_bits(tiny_pipelines, pictures, tmp_path, settings):
    settings = {**settings, "max_train_steps": 6, "checkpointing_steps": 3, "save_steps": 3}
    model = tiny_pipelines["sd15"]
    run(model, pictures, tmp_path / "whole", **settings)
    middle = tmp_path / "whole" / "checkpoints" / "checkpoint-000003.safetensors"
    run(model, pictures, tmp_path / "resumed", resume_from_checkpoint=str(middle), **settings)
    for name in ("learned_embeds.safetensors", "checkpoints/checkpoint-000006.safetensors"):
        whole, resumed = (read_tensors(tmp_path / run / name)[0] for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    (at_three,), _ = read_embeddings(tmp_path / "whole" / "step-000003")
    (at_six,), _ = read_embeddings(tmp_path / "whole")
    assert not torch.equal(at_three, at_six)
    state, header = read_tensors(middle)
    assert header["method"] == settings.get("method", "dti")
    rows = state["directions.0" if header["method"] == "dti" else "vectors.0"]
    assert len(at_three) == len(rows) == settings.get("num_vectors", 1)
    torch.testing.assert_close(at_three / at_three.norm(), rows / rows.norm())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "ti", "kappa": 1e-4}, "--kappa does nothing with --method ti"),
        ({"method": "ti", "magnitude": "mean"}, "--magnitude does nothing with --method ti"),
        ({"method": "crossinit", "beta": 0.5}, "--beta does nothing with --method crossinit"),
        ({"method": "ti-rescaled", "reg_lambda": 1e-5}, "--reg_lambda does nothing with --method ti-rescaled"),
        ({"method": "ti", "optimizer": "rsgd"}, "--optimizer does nothing with --method ti"),
        ({"adam_weight_decay": 0.0}, "--adam_weight_decay does nothing with --method dti"),
        ({"optimizer": "adamw", "beta": 0.9}, "--beta does nothing with --method dti --optimizer adamw"),
        ({"optimizer": "adamw", "momentum": 0.9}, "--momentum does nothing with --method dti --optimizer adamw"),
        (
            {"method": "ti", "per_sample_normalisation": True},
            "--per_sample_normalisation does nothing with --method ti",
        ),
        ({"momentum": 1.0}, r"--momentum must lie in \[0, 1\)"),
        ({"method": "ti", "adam_weight_decay": -1.0}, "--adam_weight_decay must not be negative"),
        ({"method": "crossinit", "reg_lambda": float("nan")}, "--reg_lambda must be a finite number"),
        ({"save_steps": 0}, "--save_steps must be at least 1"),
    ],
)
def test_flags_that_would_do_nothing_are_errors(settings, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**settings).resolved()


def test_defaults_follow_the_method():
    def of(*names, **settings):
        config = TrainConfig(**settings).resolved()
        assert config.resolved() == config
        return tuple(getattr(config, name) for name in names)

    assert of("learning_rate", "lr_scheduler", "kappa", "beta", "magnitude") == (0.04, "cosine", 1e-4, 0.0, "mean")
    adamw = ("learning_rate", "lr_scheduler", "adam_weight_decay", "reg_lambda", "kappa", "magnitude")
    assert of(*adamw, method="ti") == (0.02, "constant", 1e-2, None, None, None)
    assert of(*adamw, method="ti-rescaled") == (0.02, "constant", 1e-2, None, None, "mean")
    assert of(*adamw, method="crossinit") == (0.02, "constant", 1e-2, 1e-5, None, None)
    assert of("momentum", "per_sample_normalisation") == (0.0, False)
    assert of("learning_rate", "kappa", kappa_mode="relative") == (0.04, 0.1)
    assert of("learning_rate", "kappa", learning_rate=0.0, kappa=0.0) == (0.0, 0.0)


def test_the_command_line_trains_by_another_method(tiny_pipelines, pictures, tmp_path):
    arguments = train_arguments(
        tiny_pipelines["sd15"], pictures, tmp_path, method="crossinit", max_train_steps=2, adam_weight_decay=0
    )
    result = command(*arguments)
    assert result.returncode == 0, result.stderr
    _, metadata = read_embeddings(tmp_path)
    assert metadata["method"] == "crossinit"
    again = command("train", "--config", tmp_path / "config.toml", "--output_dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    assert torch.equal(read_embeddings(tmp_path / "again")[0][0], read_embeddings(tmp_path)[0][0])
    refused(command(*arguments, "--kappa", 1), "--kappa does nothing with --method crossinit")
