"""A session: one model for many runs, each as if it had the model to itself."""

import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from runs import ENVIRONMENT
from safetensors.torch import load_file

import dti_fast
from dti_fast import Session, TrainConfig
from dti_fast.backbones.load import load_backbone
from dti_fast.errors import UserError
from dti_fast.files import hash_tensors
from dti_fast.trainer.loggers import Logger


@pytest.fixture(autouse=True)
def one_backend(monkeypatch):
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")  # as in the fresh processes


def configuration(pictures, out, **settings):
    settings = {"initializer_token": "dog", "placeholder_token": "<toy>", "max_train_steps": 6, **settings}
    settings = {"num_validation_images": 0, "train_batch_size": 2, **settings}
    return TrainConfig(train_data_dir=pictures, output_dir=out, **settings)


def state_of(backbone) -> dict:
    """All that a run could leave behind in a model."""
    modules = [*backbone.modules()]
    return {
        "classes": [[type(m) for m in module.modules()] for module in modules],
        "names": [[name for name, _ in module.named_parameters()] for module in modules],
        "values": [hash_tensors([*module.parameters(), *module.buffers()]) for module in modules],
        "trainable": [[p.requires_grad for p in module.parameters()] for module in modules],
        "training": [[m.training for m in module.modules()] for module in modules],
        "own attributes": [[sorted(vars(m)) for m in module.modules()] for module in modules],
        "devices": [next(module.parameters()).device for module in modules],
        "words": [len(tokenizer) for tokenizer in backbone.tokenizers],
        "attention": [str(getattr(module, "attn_processors", None) and
                          {k: type(v) for k, v in module.attn_processors.items()}) for module in modules],
        "end of text": [getattr(e, "text_model", e).eos_token_id for e in backbone.text_encoders
                        if hasattr(getattr(e, "text_model", e), "eos_token_id")],
        "environment": dict(os.environ),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }  # fmt: skip


RUNS = {
    "plain": {},
    "lora": {"lora_rank": 2, "lora_learning_rate": 1e-2, "dco_beta": 1000.0, "train_magnitude": True},
    "fails": {"validation_prompt": ["a {}"], "num_validation_images": 1, "learning_rate": 0.05},
    "again": {"attention": "math", "recompute": "block", "pooling": "reference", "deterministic": True, "seed": 3},
    "ti": {"method": "ti-rescaled"},
}
SCRIPT = """
import sys
from pathlib import Path
from dti_fast import TrainConfig, train
model, pictures, out, settings = sys.argv[1:]
train(TrainConfig(pretrained_model_name_or_path=model, train_data_dir=Path(pictures), output_dir=Path(out),
                  initializer_token="dog", placeholder_token="<toy>", max_train_steps=6, num_validation_images=0,
                  train_batch_size=2, **eval(settings)), loggers=[])
"""


class Breaks(Logger):
    """Raises in the middle of a run."""

    def step(self, step):
        if step == 3:
            raise RuntimeError("broken on purpose")


def test_concepts_in_turn_equal_fresh_processes(tiny_pipelines, pictures, tmp_path):
    """One with a LoRA, one that fails in the middle, others after them; the model is stock again after each."""
    model = tiny_pipelines["sdxl"]
    with Session(str(model), device="cpu") as session:
        session.draw(["a dog"], steps=1)  # transformers marks an encoder that has computed
        before = state_of(session.backbone)
        for name, settings in RUNS.items():
            config = configuration(pictures, tmp_path / "kept" / name, **settings)
            if name == "fails":
                with pytest.raises(RuntimeError, match="on purpose"):
                    session.learn(config, loggers=[Breaks()])
            else:
                result = session.learn(config)
                assert (result.steps, result.stopped) == (6, "finished")
                assert len(result.vectors) == 2
            after = state_of(session.backbone)
            assert {key for key in before if before[key] != after[key]} == set(), name
    for name, settings in RUNS.items():
        if name == "fails":
            continue
        fresh = tmp_path / "fresh" / name
        command = [sys.executable, "-c", SCRIPT, str(model), str(pictures), str(fresh), repr(settings)]
        subprocess.run(command, env=ENVIRONMENT, check=True, capture_output=True, timeout=120)
        files = sorted(path.relative_to(fresh) for path in fresh.rglob("*.safetensors"))
        assert len(files) >= 4
        for file in files:
            kept, alone = load_file(tmp_path / "kept" / name / file), load_file(fresh / file)
            assert list(kept) == list(alone)
            assert all(torch.equal(kept[key], alone[key]) for key in alone), (name, file)


def test_the_model_is_loaded_once(pictures, tmp_path, monkeypatch):
    """When it is first needed, and for learning and drawing together."""
    loaded = []

    def load(*arguments, **settings):
        loaded.append(arguments[0])
        return load_backbone(*arguments, **settings)

    monkeypatch.setattr(dti_fast.session, "load_backbone", load)
    with Session("pocket", device="cpu") as session:
        assert loaded == []
        for name in ("first", "second"):
            session.learn(TrainConfig(output_dir=tmp_path / name, max_train_steps=1, num_validation_images=0))
        session.draw(["a photo of a creature"], steps=1)
    assert loaded == ["pocket"]


def test_draw_with_and_without_a_concept(tiny_pipelines, pictures, tmp_path):
    """A result, its folder and a stock pipeline give the same picture; the model does not keep the concept."""
    from diffusers import StableDiffusionPipeline

    with Session(str(tiny_pipelines["sd15"]), device="cpu") as session:
        session.draw(["a dog"], steps=1)
        before = state_of(session.backbone)
        config = configuration(pictures, tmp_path / "out", num_vectors=2)
        result = session.learn(config)
        settings = {"count": 2, "seed": 5, "steps": 2}
        drawn = session.draw(["a photo of {}", "a <toy>"], concept=result, **settings)
        from_folder = session.draw(["a photo of {}", "a <toy>"], concept=tmp_path / "out", **settings)
        plain = session.draw(["a photo of dog"], **settings)
        assert state_of(session.backbone) == before
    pixels = [[np.asarray(p) for p in row] for row in drawn]
    assert [len(row) for row in drawn] == [2, 2]
    np.testing.assert_array_equal(pixels, [[np.asarray(p) for p in row] for row in from_folder])
    assert not np.array_equal(pixels[0][0], np.asarray(plain[0][0]))
    stock = StableDiffusionPipeline.from_pretrained(tiny_pipelines["sd15"])
    stock.load_textual_inversion(result.embedding_paths[0])
    picture = stock("a photo of <toy>", num_inference_steps=2, generator=torch.Generator().manual_seed(6)).images[0]
    np.testing.assert_array_equal(pixels[0][1], np.asarray(picture))


def test_cancelled_run_leaves_a_checkpoint_and_goes_on(tiny_pipelines, pictures, tmp_path):
    cancel, heard = threading.Event(), []

    class Cancels(Logger):
        def step(self, step):
            if step == 3:
                cancel.set()

        def checkpoint(self, step, path):
            heard.append((step, path.is_file()))

        def end(self, result):
            heard.append(result.stopped)

    with Session(str(tiny_pipelines["sd21"]), device="cpu") as session:
        result = session.learn(configuration(pictures, tmp_path / "a"), loggers=[Cancels()], cancel=cancel)
        assert (result.steps, result.stopped, result.embedding_paths) == (3, "cancelled", [])
        assert heard == [(3, True), "cancelled"]
        assert not list((tmp_path / "a").glob("*.safetensors"))
        resumed = session.learn(configuration(pictures, tmp_path / "a", resume_from_checkpoint="latest"))
        whole = session.learn(configuration(pictures, tmp_path / "b"))
    assert resumed.steps == 6
    assert torch.equal(resumed.vectors[0], whole.vectors[0])


def test_result_says_what_happened(tiny_pipelines, pictures, tmp_path):
    logs = []

    class Collects(Logger):
        def log(self, log):
            logs.append(log)

    with Session(str(tiny_pipelines["sd15"]), device="cpu") as session:
        result = session.learn(configuration(pictures, tmp_path, logging_steps=2), loggers=[Collects()])
    assert [log.step for log in logs] == [2, 4, 6]
    assert result.loss == logs[-1].loss
    assert result.angle_degrees == logs[-1].angle_degrees
    assert result.angle_degrees[0] > 1
    assert result.seconds >= logs[-1].seconds > 0
    assert result.peak_memory is None
    assert result.vectors[0].norm(dim=-1).tolist() == pytest.approx(result.magnitudes * len(result.vectors[0]))


def test_a_session_has_one_model(tiny_pipelines, pictures, tmp_path):
    with Session(str(tiny_pipelines["sd15"]), device="cpu") as session:
        other = configuration(pictures, tmp_path, pretrained_model_name_or_path=str(tiny_pipelines["sd21"]))
        with pytest.raises(UserError, match="pretrained_model_name_or_path"):
            session.learn(other)
    with pytest.raises(UserError, match="no device"):
        Session("pocket", device="cuda:7")
    with pytest.raises(UserError, match="there is no model"):
        Session("nothing of the kind")


def test_public_names_are_listed():
    assert set(dti_fast.__all__) <= set(dir(dti_fast))
    assert {"Session", "train", "TrainConfig", "SphericalAdam"} <= set(dir(dti_fast))
