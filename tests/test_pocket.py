"""The bundled world, model and example: what `dti-fast train` does with no arguments."""

import hashlib
import json
import random
import statistics

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from runs import command
from safetensors import safe_open

from dti_fast.backbones.pocket import Pocket
from dti_fast.data.folder import find_pictures
from dti_fast.pocket import bench as pocket_bench
from dti_fast.pocket import world
from dti_fast.pocket.bench import PocketBench
from dti_fast.pocket.recognise import FEATURES, PARTS, WEIGHTS, Recognition, credit, label
from tools.pocket.build import CONCEPT, build_tokenizer, draw_concept
from tools.pocket.build_recogniser import draw_scene

DIGESTS = ["b53e52451cb0", "bdc4831c75c9", "08603df10206"]  # of prompts, training pictures, recogniser


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableDiffusionPipeline.from_pretrained(Pocket.folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_every_word_and_name_is_one_token(tmp_path):
    tokenizer = build_tokenizer(tmp_path)
    words = [*world.vocabulary(), *world.names()]
    ids = tokenizer(words, add_special_tokens=False).input_ids
    assert all(len(i) == 1 for i in ids)
    assert len({i[0] for i in ids}) == len(words)


def test_renderings_are_recognised():
    rng = random.Random(3)
    scenes = [draw_scene(rng) for _ in range(300)]
    seen = Recognition(np.stack([world.render(scene, rng) for scene in scenes]))
    photos = np.array([scene.style == "photo" for scene in scenes])
    for part in PARTS:
        right = [seen.shows(part, getattr(scene, part))[i] for i, scene in enumerate(scenes)]
        assert np.mean(right) >= 0.98, part
    for feature in FEATURES:  # colours do not show in sketches, nor the markings of plain creatures
        right = np.array([seen.shows(feature, getattr(s.creature, feature))[i] for i, s in enumerate(scenes)])
        assert right[photos].mean() >= (0.85 if feature == "marking" else 0.95), feature


def test_hue_is_a_circle_to_the_recogniser():
    near_zero, above, below = (credit("hue", value) for value in (0.0, 0.04, 0.96))
    assert near_zero[0] == near_zero[11] == 1
    assert near_zero[2:10].max() == 0
    assert above.argmax() == 0 and below.argmax() == 11
    assert credit("shape", "tall").tolist() == [0, 0, 0, 1]


def test_the_bundled_pictures_are_of_a_creature_without_a_name(tmp_path):
    draw_concept(tmp_path, world.unseen(CONCEPT))
    assert [p.name for p in sorted(tmp_path.iterdir())] == [p.path.name for p in find_pictures(Pocket.concept)]
    for path in tmp_path.iterdir():
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(Pocket.concept / path.name)))
    creature = world.unseen(CONCEPT)
    twins = [c for c in world.named_creatures() if c.features()[:18].tolist() == creature.features()[:18].tolist()]
    assert all(abs(c.hue - creature.hue) > 0.002 or abs(c.lightness - creature.lightness) > 0.002 for c in twins)


def test_the_model_is_small_and_in_the_classic_layout():
    assert sum(p.stat().st_size for p in Pocket.folder.rglob("*") if p.is_file()) < 25e6
    with safe_open(Pocket.folder / "text_encoder" / "model.safetensors", "pt") as file:
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


def test_pocket_bench_is_frozen(tmp_path):
    """Whoever changes what a score depends on changes VERSION, and these digests with it."""
    prompts = [c.prompt("x") for clauses in pocket_bench.PROMPTS.values() for c in clauses]
    pictures = hashlib.sha256()
    for number in pocket_bench.CREATURES:
        for name in pocket_bench.TRAINING_SETS:
            folder = pocket_bench.write_training_set(tmp_path / f"{number}-{name}", number, name)
            for path in sorted(folder.iterdir()):
                pictures.update(np.asarray(Image.open(path)).tobytes())
    digests = [
        hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12],
        pictures.hexdigest()[:12],
        hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()[:12],
    ]
    assert (pocket_bench.VERSION, len(prompts), digests) == (1, 30, DIGESTS)
    assert not {c.place for clauses in pocket_bench.PROMPTS.values() for c in clauses} & set(
        pocket_bench.TRAINING_PLACES
    )


def test_the_scale_runs_from_strangers_to_the_creature():
    creature, clauses = world.unseen(pocket_bench.CREATURES[3]), pocket_bench.PROMPTS["complex"]
    scale, rng = pocket_bench.Scale(creature, clauses), random.Random(17)

    def renderings(who):
        return np.stack([world.render(world.Scene(who(), c.accessory, c.place, c.style), rng) for c in clauses * 20])

    assert scale.similarity(renderings(lambda: creature)) == pytest.approx(1, abs=0.05)
    assert scale.similarity(renderings(lambda: world.Creature.draw(rng))) == pytest.approx(0, abs=0.12)
    pictures = renderings(lambda: creature)
    assert pocket_bench.prompt_fidelity(pictures, clauses * 20) > 0.98
    shuffled = [pocket_bench.Clauses("on the moon", "a crown", "blueprint")] * len(pictures)
    shares = [
        np.mean([c.place == "on the moon" for c in clauses]),
        np.mean([c.accessory == "a crown" for c in clauses]),
    ]
    expected = np.mean([*shares, 0.25])
    assert pocket_bench.prompt_fidelity(pictures, shuffled) == pytest.approx(expected, abs=0.02)


def test_the_model_draws_what_names_and_prompts_say(pipeline):
    """The gates of docs/pocket.md, on two of the names that stand behind its figures."""
    names, creatures = world.names(), world.named_creatures()
    for who in (77, 5):
        bench = PocketBench(pipeline, creatures[who])
        scores = bench.scores(bench.pictures(names[who]))
        assert all(s["fidelity"] >= 0.95 for s in scores.values())
        assert statistics.mean(s["similarity"] for s in scores.values()) >= 0.6


def test_the_main_job_learns_the_creature(tmp_path):
    """No arguments but fewer previews: the learned word draws the creature far better than the initial word."""
    run = command("train", "--output_dir", tmp_path, "--num_validation_images", "0")
    assert run.returncode == 0, run.stderr
    measured = command("evaluate", tmp_path, "--output_dir", tmp_path / "evaluation")
    assert measured.returncode == 0, measured.stderr
    scores = json.loads((tmp_path / "evaluation" / "results.json").read_text())["concepts"][tmp_path.name]
    for of_set in scores.values():
        assert of_set["similarity"] >= 0.4  # the initial word has about 0
        assert of_set["fidelity"] >= 0.75


def test_the_creature_is_recognised_in_its_pictures():
    pictures = np.stack([np.asarray(Image.open(p.path)) for p in find_pictures(Pocket.concept)])
    shown, true = Recognition(pictures).creature(), world.unseen(CONCEPT)
    for field in FEATURES:
        assert credit(field, getattr(true, field))[label(field, getattr(shown, field))] > 0.5, field
