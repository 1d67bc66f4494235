"""Embedding files: exact keys, and loading them into stock pipelines."""

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

from dti_fast import load_embedding
from dti_fast.errors import UserError
from dti_fast.formats import read_embeddings, write_embeddings


def keys(path):
    with safe_open(path, "pt") as file:
        return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, file.metadata()  # noqa: SIM118


def test_one_encoder(tmp_path):
    vectors = [torch.randn(2, 32)]
    (path,) = write_embeddings(tmp_path, "<x>", vectors, {"method": "dti", "steps": 3, "token": "<x>"})
    assert path.name == "learned_embeds.safetensors"
    assert keys(path) == ({"<x>": (2, 32)}, {"format": "pt", "method": "dti", "steps": "3", "token": "<x>"})
    assert torch.equal(read_embeddings(tmp_path)[0][0], vectors[0])
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "ordinary").touch()
    assert path.stat().st_mode == (tmp_path / "ordinary").stat().st_mode  # others may read it if they may read that


def test_two_encoders(tmp_path):
    vectors = [torch.randn(1, 32), torch.randn(1, 48)]
    paths = write_embeddings(tmp_path, "<my-dog>", vectors, {"token": "<my-dog>"})
    assert [p.name for p in paths] == [
        "learned_embeds.safetensors",
        "learned_embeds_2.safetensors",
        "my-dog.safetensors",
    ]
    assert [keys(p)[0] for p in paths] == [
        {"<my-dog>": (1, 32)}, {"<my-dog>": (1, 48)}, {"clip_l": (1, 32), "clip_g": (1, 48)}
    ]  # fmt: skip
    for source in (tmp_path, paths[0], paths[2]):
        read, metadata = read_embeddings(source)
        assert all(torch.equal(a, b) for a, b in zip(read, vectors, strict=True))
        assert metadata["token"] == "<my-dog>"


@pytest.mark.parametrize("vectors", [1, 3])
def test_load_embedding_equals_stock_loading(tiny_pipelines, tmp_path, vectors):
    write_embeddings(tmp_path, "<x>", [torch.randn(vectors, 32)], {})
    ours = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    assert load_embedding(ours, tmp_path) == "<x>"
    stock.load_textual_inversion(tmp_path / "learned_embeds.safetensors")
    states = [p.encode_prompt("a <x> on grass", "cpu", 1, False)[0] for p in (ours, stock)]
    assert torch.equal(*states)


@pytest.mark.parametrize("pooling", ["eos", "reference"])
def test_sdxl_pooling_after_loading(tiny_pipelines, tmp_path, pooling):
    write_embeddings(tmp_path, "<x>", [torch.randn(2, 32), torch.randn(2, 48)], {"token": "<x>"})
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"])
    load_embedding(pipeline, tmp_path / "x.safetensors", pooling=pooling)
    pooled = [
        pipeline.encode_prompt(f"a <x> on {place}", device="cpu", do_classifier_free_guidance=False)[2]
        for place in ("grass", "beach")
    ]
    assert torch.equal(*pooled) == (pooling == "reference")


def test_a_pipeline_without_its_first_text_encoder_takes_the_second_vectors(tiny_pipelines, tmp_path):
    """SDXL's refiner."""
    vectors = [torch.randn(1, 32), torch.randn(1, 48)]
    write_embeddings(tmp_path, "<x>", vectors, {"token": "<x>"})
    pipeline = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"])
    pipeline.text_encoder = pipeline.tokenizer = None
    load_embedding(pipeline, tmp_path / "x.safetensors")
    loaded = pipeline.text_encoder_2.get_input_embeddings().weight[pipeline.tokenizer_2.convert_tokens_to_ids("<x>")]
    assert torch.equal(loaded, vectors[1][0])
    write_embeddings(tmp_path, "<y>", vectors[:1], {"token": "<y>"})
    with pytest.raises(UserError, match="another kind of model"):
        load_embedding(pipeline, tmp_path)


def test_foreign_files_are_one_clear_line(tiny_pipelines, tmp_path):
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    write_embeddings(tmp_path, "<x>", [torch.randn(1, 48)], {})
    with pytest.raises(UserError, match="another kind of model"):
        load_embedding(pipeline, tmp_path)
    with pytest.raises(UserError, match="no file"):
        read_embeddings(tmp_path / "missing.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"not one")
    with pytest.raises(UserError, match="not a safetensors file"):
        read_embeddings(tmp_path / "bad.safetensors")
