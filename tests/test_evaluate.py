"""`dti-fast evaluate`: scores against float64 by hand, masks, prompt sets, and the command line."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from runs import command, refused, write_pictures
from tiny import _tokenizer
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2Model,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
)

from dti_fast.commands.generate import generate
from dti_fast.drawing import DrawSettings
from dti_fast.errors import UserError
from dti_fast.evaluate.concepts import EvaluateConfig
from dti_fast.evaluate.protocol import read_prompts
from dti_fast.evaluate.run import evaluate
from dti_fast.evaluate.scorers import SubjectScorer, TextScorer, masked, open_picture
from dti_fast.evaluate.statistics import bootstrap
from dti_fast.formats import write_embeddings, write_single_file

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SIDE = 28


@pytest.fixture(scope="module")
def evaluators(tmp_path_factory):
    """Folders of a random DINOv2 and a random SigLIP, with processors that resize to 28 pixels."""
    folder = tmp_path_factory.mktemp("evaluators")
    torch.manual_seed(0)
    dino = Dinov2Config(
        hidden_size=24, num_hidden_layers=2, num_attention_heads=2, patch_size=7, image_size=SIDE, layerscale_value=1.0
    )
    Dinov2Model(dino).save_pretrained(folder / "dino")
    size = {"height": SIDE, "width": SIDE}
    BitImageProcessor(
        size=size, crop_size=size, do_center_crop=False, do_convert_rgb=True, image_mean=MEAN, image_std=STD
    ).save_pretrained(folder / "dino")
    tokenizer = _tokenizer(False, pad_token="!")
    text = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "vocab_size": len(tokenizer), "max_position_embeddings": 24, "projection_size": 16,
    }  # fmt: skip
    vision = {
        "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "image_size": SIDE, "patch_size": 7,
    }  # fmt: skip
    SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).save_pretrained(folder / "siglip")
    SiglipImageProcessor(size=size).save_pretrained(folder / "siglip")
    tokenizer.save_pretrained(folder / "siglip")
    return folder / "dino", folder / "siglip"


def random_pictures(count, seed=0, side=SIDE):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (side, side, 3), dtype=np.uint8)) for _ in range(count)]


def pixels(pictures, mean, std):
    """By hand, float64 `[N, 3, H, W]`."""
    values = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).double() / 255
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2)


def test_subject_score_is_the_mean_cosine_of_class_tokens(evaluators):
    scorer = SubjectScorer(str(evaluators[0]))
    pictures, references = random_pictures(3), random_pictures(2, seed=1)
    model = Dinov2Model.from_pretrained(evaluators[0]).double().eval()
    with torch.no_grad():
        tokens = [model(pixels(p, MEAN, STD)).last_hidden_state[:, 0] for p in (pictures, references)]
    expected = [np.mean([F.cosine_similarity(a, b, dim=0).item() for b in tokens[1]]) for a in tokens[0]]
    scores = scorer.score(pictures, scorer.features(references))
    assert scores.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 1e-3


def test_text_score_is_the_sigmoid_of_the_pairs_own_logit(evaluators):
    scorer = TextScorer(str(evaluators[1]))
    pictures, texts = random_pictures(3), ["a dog on a beach.", "a red cat.", "a book."]
    model = SiglipModel.from_pretrained(evaluators[1]).double().eval()
    tokenizer = _tokenizer(False, pad_token="!")
    expected = []
    for picture, text in zip(pictures, texts, strict=True):
        ids = tokenizer(text).input_ids
        padded = torch.tensor([ids + [tokenizer.pad_token_id] * (24 - len(ids))])
        with torch.no_grad():
            image = model.vision_model(pixels([picture], (0.5,) * 3, (0.5,) * 3)).pooler_output[0]
            words = model.text_model(padded).pooler_output[0]
        logit = F.cosine_similarity(image, words, dim=0) * model.logit_scale.exp() + model.logit_bias
        expected.append(1 / (1 + math.exp(-logit.item())))
    assert scorer.score(pictures, texts).tolist() == pytest.approx(expected, abs=1e-5)
    assert len(set(np.round(expected, 5))) == 3


def test_a_mask_blackens_the_background_of_a_reference(tmp_path):
    reference = random_pictures(1)[0]
    cover = np.zeros((SIDE, SIDE), dtype=np.uint8)
    cover[5:20, 3:11] = 255
    Image.fromarray(cover).save(tmp_path / "mask.png")
    result = np.asarray(masked(reference, tmp_path / "mask.png"))
    assert np.array_equal(result[5:20, 3:11], np.asarray(reference)[5:20, 3:11])
    assert not result[cover == 0].any()
    with pytest.raises(UserError, match="pixels"):
        masked(random_pictures(1, side=30)[0], tmp_path / "mask.png")


def test_prompt_sets():
    sizes = {(n, s): len(read_prompts(n, s)) for n in ("simple", "complex") for s in ("object", "live")}
    assert sizes == {
        ("simple", "object"): 41, ("simple", "live"): 41, ("complex", "object"): 32, ("complex", "live"): 32
    }  # fmt: skip
    assert len(read_prompts("style", "object")) == 40
    for name, subject in sizes:
        prompts = read_prompts(name, subject)
        assert len(set(prompts)) == len(prompts)
        assert all(p.count("{}") == 1 for p in prompts)
    with pytest.raises(UserError, match="simple, complex, style"):
        read_prompts("simpel", "object")


def test_bootstrap_covers_the_mean_at_its_rate():
    rng = np.random.default_rng(1)
    samples = rng.normal(3, 2, (200, 30))
    inside = [e.low <= 3 <= e.high for e in (bootstrap(s, 500) for s in samples)]
    assert 0.87 <= np.mean(inside) <= 0.99
    assert bootstrap([1.0, 1.0, 1.0]) == (1.0, 1.0, 1.0)
    assert math.isnan(bootstrap([1.0]).low)


def run_evaluation(tiny_pipelines, evaluators, folder, *arguments):
    return command(
        "evaluate", *arguments, "--pretrained_model_name_or_path", tiny_pipelines["sd15"], "--prompts",
        folder / "prompts.txt", "--seeds", "0", "1", "--num_inference_steps", "2", "--dino", evaluators[0],
        "--siglip", evaluators[1], "--class_word", "dog",
    )  # fmt: skip


@pytest.fixture(scope="module")
def evaluation(tiny_pipelines, evaluators, tmp_path_factory):
    """Two concepts, evaluated without masks and with them."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "prompts.txt").write_text("a photo of {} on the beach\na red {}\n")
    for i, name in enumerate(("one", "two")):
        (folder / name).mkdir()
        vectors = torch.randn(1, 32, generator=torch.Generator().manual_seed(i))
        write_embeddings(folder / name, "<toy>", [vectors], {})
        write_pictures(folder / "pictures" / name, 2)
        (folder / "masks" / name).mkdir(parents=True)
        Image.new("L", (100, 80)).save(folder / "masks" / name / "0.png")  # all black; picture 1 has none
    shared = (folder / "one", folder / "two", "--train_data_dir", folder / "pictures", "--output_dir")
    plain = run_evaluation(tiny_pipelines, evaluators, folder, *shared, folder / "plain")
    assert plain.returncode == 0, plain.stderr
    drawn = {p: p.stat().st_mtime_ns for p in (folder / "plain").rglob("pictures/*/*.png")}
    with_masks = run_evaluation(
        tiny_pipelines, evaluators, folder, *shared, folder / "plain", "--mask_dir", folder / "masks"
    )
    assert with_masks.returncode == 0, with_masks.stderr
    return folder, plain.stdout, drawn, json.loads((folder / "plain" / "results.json").read_text())


def test_the_command_line_scores_what_it_drew(evaluation, evaluators):
    folder, printed, drawn, _ = evaluation
    assert len(drawn) == 2 * 2 * 2
    scorer = TextScorer(str(evaluators[1]))
    subject = SubjectScorer(str(evaluators[0]))
    for name in ("one", "two"):
        paths = sorted((folder / "plain" / "pictures" / name).iterdir())
        pictures = [open_picture(p) for p in paths]
        texts = ["a photo of dog on the beach."] * 2 + ["a red dog."] * 2
        references = [open_picture(p) for p in sorted((folder / "pictures" / name).iterdir())]
        text = scorer.score(pictures, texts).mean().item()
        similarity = subject.score(pictures, subject.features(references)).mean().item()
        assert f"| {name} | {folder / 'prompts.txt'} | {similarity:.3f} | {text:.3f} |" in printed
    assert (folder / "plain" / "sheet.png").exists()


def test_masks_change_the_subject_score_alone_and_nothing_is_drawn_again(evaluation):
    folder, printed, drawn, results = evaluation
    assert {p: p.stat().st_mtime_ns for p in (folder / "plain").rglob("pictures/*/*.png")} == drawn
    for name, of_concept in results["concepts"].items():
        scores = of_concept[str(folder / "prompts.txt")]
        line = next(line for line in printed.splitlines() if line.startswith(f"| {name} |"))
        before = [float(cell) for cell in line.split("|")[3:5]]
        assert abs(scores["subject"] - before[0]) > 2e-3
        assert scores["text"] == pytest.approx(before[1], abs=6e-4)


def test_a_concept_is_drawn_as_it_was_taught(tiny_pipelines, evaluators, tmp_path):
    """With the model and the target that its file names, as `generate` draws it."""
    model, concept = str(tiny_pipelines["sd15"]), tmp_path / "toy.safetensors"
    vector = torch.randn(1, 32, generator=torch.Generator().manual_seed(0))
    write_single_file(concept, [vector], {"token": "<toy>", "base_model": model, "prediction_type": "v_prediction"})
    (tmp_path / "prompts.txt").write_text("a {}")
    config = EvaluateConfig(
        train_data_dir=write_pictures(tmp_path / "pictures", 1), class_word="dog", seeds=[5], num_inference_steps=2,
        prompts=[str(tmp_path / "prompts.txt")], dino=str(evaluators[0]), siglip=str(evaluators[1]),
        output_dir=tmp_path / "out",
    )  # fmt: skip
    evaluate([concept], config)
    (drawn,) = (tmp_path / "out" / "pictures" / "toy").iterdir()
    settings = DrawSettings(num_images=1, num_inference_steps=2, seed=5)
    generate(prompt=["a {}"], embedding=[concept], output=tmp_path / "same.png", settings=settings)
    assert Image.open(drawn).tobytes() == Image.open(tmp_path / "same.png").tobytes()
    settings = replace(settings, pretrained_model_name_or_path=model, prediction_type="epsilon")
    generate(prompt=["a {}"], embedding=[concept], output=tmp_path / "other.png", settings=settings)
    assert Image.open(drawn).tobytes() != Image.open(tmp_path / "other.png").tobytes()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "give --train_data_dir"),
        ({"seeds": []}, "--seeds is empty"),
        ({"num_inference_steps": 0}, "--num_inference_steps"),
        ({"train_data_dir": True, "guidance_scale": 2.0}, "--guidance_scale does nothing for concepts of the pocket"),
        ({"train_data_dir": True, "mask_dir": Path("nothing")}, "--mask_dir"),
    ],
)
def test_bad_settings(pictures, tmp_path, settings, message):
    write_embeddings(tmp_path, "<toy>", [torch.randn(1, 128)], {"base_model": "pocket"})
    if "train_data_dir" in settings:
        settings = {**settings, "train_data_dir": pictures}
    with pytest.raises(UserError, match=message):
        evaluate([tmp_path], EvaluateConfig(output_dir=tmp_path / "out", **settings))
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(tmp_path):
    run = command("evaluate", tmp_path / "nothing", "--output_dir", tmp_path / "out")
    refused(run, "there is no file", tmp_path / "out")
