"""The bundled world, model and example: what `dti-fast train` does with no arguments."""

import random
import statistics

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import dti_fast
from safetensors import safe_open

from dti_fast.backbones.load import POCKET_FOLDER
from dti_fast.data.folder import find_pictures
from dti_fast.pocket import world
from dti_fast.pocket.build import CONCEPT, build_tokenizer, draw_concept
from dti_fast.pocket.recognise import recognise
from dti_fast.trainer.config import POCKET_CONCEPT


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_FOLDER, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, prompts):
    generator = torch.Generator().manual_seed(0)
    output = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generator, output_type="np")
    return (output.images * 255).round().astype(np.uint8)


def test_every_word_and_name_is_one_token(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    words = [*world.vocabulary(), *world.names()]
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert all(len(i) == 1 for i in ids)
    assert len({i[0] for i in ids}) == len(words)


def test_renderings_are_recognised():
    rng = random.Random(3)
    results = []
    for i in range(8):
        style = "photo" if i % 2 == 0 else world.STYLES[1 + i // 2]
        scene = world.Scene(world.Creature.draw(rng), rng.choice(world.ACCESSORIES), rng.choice(world.PLACES), style)
        results.append(recognise(world.render(scene, rng), scene))
    for part, least in (("place", 1), ("style", 1), ("accessory", 1), ("identity", 0.95), ("features", 0.8)):
        assert statistics.mean(r[part] for r in results) >= least, part


def test_the_bundled_pictures_are_of_a_creature_without_a_name(tmp_path):
    draw_concept(tmp_path, world.unseen(CONCEPT))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [p.path.name for p in find_pictures(POCKET_CONCEPT)]
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(POCKET_CONCEPT / path.name)))
    creature = world.unseen(CONCEPT)
    twins = [c for c in world.named_creatures() if c.features()[:18].tolist() == creature.features()[:18].tolist()]
    assert all(abs(c.hue - creature.hue) > 0.002 or abs(c.lightness - creature.lightness) > 0.002 for c in twins)


def test_the_model_is_small_and_in_the_classic_layout():
    assert sum(p.stat().st_size for p in POCKET_FOLDER.rglob("*") if p.is_file()) < 25e6
    with safe_open(POCKET_FOLDER / "text_encoder" / "model.safetensors", "pt") as file:
        assert all(key.startswith("text_model.") for key in file.keys())  # noqa: SIM118


def test_the_autoencoder_keeps_what_matters(pipeline):
    rng = random.Random(5)
    renders = np.stack([world.render(world.draw_scene(world.Creature.draw(rng), rng), rng) for _ in range(32)])
    pixels = torch.from_numpy(renders).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
        error = (pipeline.vae.decode(posterior.mean).sample - pixels).square().mean((1, 2, 3))
    assert (10 * torch.log10(4 / error)).mean() > 24  # dB
    assert posterior.mean.std((0, 2, 3)).sub(1).abs().max() < 0.2  # the denoiser's scale, in every channel


def test_places_and_styles_are_drawn_as_asked(pipeline):
    names, creatures = world.names(), world.named_creatures()
    scenes = [world.Scene(creatures[i], place=place) for i, place in enumerate(world.PLACES)]
    scenes += [world.Scene(creatures[i + 8], place=world.PLACES[i], style=s) for i, s in enumerate(world.STYLES[1:])]
    templates = [world.style_template(s.style, random.Random(0)) for s in scenes]
    prompts = [world.prompt(t, n, place=s.place) for t, n, s in zip(templates, names, scenes, strict=False)]
    results = [recognise(p, s) for p, s in zip(draw(pipeline, prompts), scenes, strict=True)]
    assert statistics.mean(r["place"] for r in results) >= 0.9
    assert statistics.mean(r["style"] for r in results) >= 0.9
    assert statistics.mean(r["identity"] for r in results) >= 0.7  # 0.5 is chance


def test_the_main_job_learns_the_creature(tmp_path):
    """No arguments but fewer previews: the learned word draws the creature far better than the initial word."""
    run = dti_fast("train", "--output_dir", tmp_path, "--num_validation_images", "0", timeout=300)
    assert run.returncode == 0, run.stderr
    pipeline = StableDiffusionPipeline.from_pretrained(POCKET_FOLDER, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    creature, identity = world.unseen(CONCEPT), {}
    for subject in ("creature", "<concept>"):
        scenes = [world.Scene(creature, place=place) for place in world.PLACES]
        pictures = draw(pipeline, [world.prompt("a photo of a {}", subject, place=s.place) for s in scenes])
        results = [recognise(p, s) for p, s in zip(pictures, scenes, strict=True)]
        identity[subject] = statistics.mean(r["identity"] for r in results)
        assert statistics.mean(r["place"] for r in results) >= 0.75  # the prompt is still obeyed
    assert identity["<concept>"] > identity["creature"] + 0.2
