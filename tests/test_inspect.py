"""`dti-fast inspect`: norms, percentiles, angles and nearest words against a model's own vocabulary."""

import pytest
import torch
from diffusers import StableDiffusionXLPipeline
from runs import dti_fast
from safetensors.torch import save_file
from tiny import save_tiny_pipeline, save_tiny_single_file

from dti_fast.backbones.vocabulary import load_vocabularies
from dti_fast.commands.inspect import inspect, measure
from dti_fast.errors import UserError
from dti_fast.formats import read_embedding_file, write_single_file


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with CLIP's real vocabulary, in which "stuffed animal" is two words."""
    return save_tiny_pipeline("sdxl", tmp_path_factory.mktemp("model"), real_vocabulary=True)


def word_rows(model, phrase):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model)
    ids = pipeline.tokenizer(phrase, add_special_tokens=False).input_ids
    encoders = (pipeline.text_encoder, pipeline.text_encoder_2)
    return [encoder.get_input_embeddings().weight.detach()[ids] for encoder in encoders]


def test_words_are_nearest_to_themselves(model, tmp_path):
    rows = word_rows(model, "stuffed animal")
    metadata = {"initializer_token": "stuffed animal"}
    write_single_file(tmp_path / "x.safetensors", [3 * row for row in rows], metadata)
    vocabularies = load_vocabularies(str(model))
    reports = measure(read_embedding_file(tmp_path / "x.safetensors"), vocabularies)
    assert [(r.encoder, r.index) for r in reports] == [("clip_l", 0), ("clip_l", 1), ("clip_g", 0), ("clip_g", 1)]
    for report, word, row in zip(
        reports, ("stuffed", "animal") * 2, torch.cat([*rows[0], *rows[1]]).split([32, 32, 48, 48]), strict=True
    ):
        (nearest, cosine), (_, runner_up) = report.nearest[:2]
        assert nearest == word
        assert cosine == pytest.approx(1, abs=1e-6)
        assert runner_up < 0.9
        assert report.angle == pytest.approx(0, abs=0.05)
        assert report.norm == pytest.approx(3 * row.norm().item(), rel=1e-6)
        assert report.percentile == 100  # three times a word's norm lies above all of these


def test_percentiles_count_the_words_below(model, tmp_path):
    (vocabulary, _) = vocabularies = load_vocabularies(str(model))
    norms = vocabulary.norms.sort().values
    direction = torch.nn.functional.normalize(torch.randn(3, 32), dim=-1)
    chosen = [(norms[i] + norms[i + 1]) / 2 for i in (0, len(norms) // 4, len(norms) - 2)]
    vectors = [torch.stack(chosen)[:, None] * direction, torch.randn(3, 48)]
    write_single_file(tmp_path / "x.safetensors", vectors, {})
    reports = measure(read_embedding_file(tmp_path / "x.safetensors"), vocabularies)[:3]
    expected = [100 * (i + 1) / len(norms) for i in (0, len(norms) // 4, len(norms) - 2)]
    assert [r.percentile for r in reports] == pytest.approx(expected, abs=0.01)
    assert all(r.angle is None for r in reports)


@pytest.mark.parametrize("family", ["sd15", "sd21", "sdxl"])
def test_a_single_file_has_the_folder_s_words(tmp_path, family):
    single = save_tiny_single_file(family, tmp_path / "model.safetensors", real_vocabulary=True)
    folder = save_tiny_pipeline(family, tmp_path / "model", real_vocabulary=True)
    pairs = list(zip(*(load_vocabularies(str(source)) for source in (single, folder)), strict=True))
    assert len(pairs) == (2 if family == "sdxl" else 1)
    for a, b in pairs:
        assert torch.equal(a.weight, b.weight)
        assert a.ids("a stuffed animal") == b.ids("a stuffed animal")


def test_another_model_s_words(tiny_pipelines, tmp_path):
    write_single_file(tmp_path / "x.safetensors", [torch.randn(1, 48)], {})
    with pytest.raises(UserError, match="is \\[48\\] wide, but this model's words are \\[32\\]"):
        measure(read_embedding_file(tmp_path / "x.safetensors"), load_vocabularies(str(tiny_pipelines["sd15"])))


def test_command_line(tiny_pipelines, tmp_path):
    path, model = tmp_path / "dog.safetensors", tiny_pipelines["sdxl"]
    rows = word_rows(model, "dog")
    save_file({"clip_l": 9 * rows[0], "clip_g": rows[1], "clip_l_out": rows[0]}, path)
    run = dti_fast("inspect", path, "--pretrained_model_name_or_path", model)
    assert run.returncode == 0, run.stderr
    for part in ("SDXL in one file (clip_l and clip_g)", "clip_l: 1 vector of 32, float32", "token: <dog>",
                 "ignored, no input embeddings: clip_l_out", "dog 1.00", "100.0", "--renorm mean"):  # fmt: skip
        assert part in run.stdout


def test_a_file_for_another_model_is_told_without_one(tmp_path, capsys):
    save_file({"t5xxl": torch.randn(4, 96), "clip_l": torch.randn(4, 32)}, tmp_path / "x.safetensors")
    inspect(tmp_path / "x.safetensors")
    text = capsys.readouterr().out
    assert "t5xxl: 4 vectors of 96" in text
    assert "Give --pretrained_model_name_or_path" in text
