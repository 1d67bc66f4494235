"""Embedding files: exact keys, and loading them into stock pipelines."""

import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from runs import ENVIRONMENT
from safetensors import safe_open

from dti_fast import load_embedding
from dti_fast.errors import UserError
from dti_fast.files import write_tensors
from dti_fast.formats import lora_paths, placeholder_stem, read_embeddings, write_embeddings, write_single_file
from dti_fast.pipelines import find_lora, load_vectors


def keys(path):
    with safe_open(path, "pt") as file:
        return {k: tuple(file.get_slice(k).get_shape()) for k in file.keys()}, file.metadata()  # noqa: SIM118


def test_one_encoder(tmp_path):
    vectors = [torch.randn(2, 32)]
    path, single = write_embeddings(tmp_path, "<x>", vectors, {"method": "dti", "steps": 3, "token": "<x>"})
    assert (path.name, single.name) == ("learned_embeds.safetensors", "x.safetensors")
    assert keys(single)[0] == {"emb_params": (2, 32)}  # A1111, ComfyUI and InvokeAI
    assert torch.equal(read_embeddings(single)[0][0], vectors[0])
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


@pytest.mark.parametrize(
    "token",
    ["<learned_embeds>", "<Learned_Embeds_2>", "<pytorch_lora_weights>", "<preview>", "<log>", "<config>", "<con>"],
)
def test_no_token_takes_the_name_of_another_file(tmp_path, token):
    vectors = [torch.randn(1, 32), torch.randn(1, 48)]
    paths = [*write_embeddings(tmp_path, token, vectors, {}), *lora_paths(tmp_path, token)]
    assert len({path.name.lower() for path in paths}) == 5
    assert placeholder_stem(token) == f"{token.strip('<>')}-concept"
    assert keys(paths[0])[0] == {token: (1, 32)}
    assert placeholder_stem("<logs>") == "logs"


def test_equal_contents_are_equal_bytes(tmp_path):
    """In processes of their own, in which the library hashes differently."""
    code = (
        "import sys, torch; from pathlib import Path; from dti_fast.formats import write_embeddings\n"
        "metadata = {f'key{i}': str(i) for i in range(20)} | {'token': '<é>'}\n"
        "write_embeddings(Path(sys.argv[1]), '<x>', [torch.arange(4.0)], metadata)"
    )
    files = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        subprocess.run([sys.executable, "-c", code, tmp_path / name], check=True, env=ENVIRONMENT)
        files.append((tmp_path / name / "learned_embeds.safetensors").read_bytes())
    assert files[0] == files[1]
    assert read_embeddings(tmp_path / "a")[1]["token"] == "<é>"


def test_a_lora_acts_only_with_the_embedding_it_was_learned_with(tmp_path):
    (tmp_path / "pytorch_lora_weights.safetensors").touch()
    for name, rank in (("with", 4), ("without", 0)):
        write_single_file(tmp_path / f"{name}.safetensors", [torch.randn(1, 32)], {"lora_rank": rank})
    write_single_file(tmp_path / "foreign.safetensors", [torch.randn(1, 32)], {})
    found = {name: find_lora(tmp_path / f"{name}.safetensors") for name in ("with", "without", "foreign")}
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    assert found == {"with": lora, "without": None, "foreign": None}
    assert find_lora(tmp_path) == lora
    assert find_lora(tmp_path / "x.pt") is None


def test_a_checkpoint_is_no_embedding(tmp_path):
    write_tensors(
        {"directions.0": torch.ones(1, 32), "directions.0/step": torch.ones(())},
        tmp_path / "checkpoint-000100.safetensors",
    )
    with pytest.raises(UserError, match="is a checkpoint, for a run to go on from"):
        read_embeddings(tmp_path / "checkpoint-000100.safetensors")


def test_a_run_that_is_not_finished_says_so(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "checkpoint-000004.safetensors").touch()
    with pytest.raises(UserError, match="is not finished: go on with --resume_from_checkpoint"):
        read_embeddings(tmp_path)


@pytest.mark.parametrize("whole", [True, False], ids=["both vectors", "the second"])
def test_a_refiner_takes_the_second_vector(tiny_pipelines, tmp_path, whole):
    base = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"])
    vectors = [torch.randn(2, 32), torch.randn(2, 48)]
    refiner = StableDiffusionXLPipeline.from_pretrained(tiny_pipelines["sdxl"], text_encoder=None, tokenizer=None)
    load_vectors(base, vectors, "<x>")
    load_vectors(refiner, vectors if whole else vectors[1:], "<x>")
    ids = [p.tokenizer_2("a <x> <x>_1 on grass", return_tensors="pt").input_ids for p in (base, refiner)]
    assert torch.equal(*ids)
    pooled = [p.text_encoder_2(i).text_embeds for p, i in zip((base, refiner), ids, strict=True)]
    assert torch.equal(*pooled)
    refiner.text_encoder_2 = None
    with pytest.raises(UserError, match="no text encoder"):
        load_vectors(refiner, vectors, "<y>")
