"""What a run says and warns of before its first step, and that nothing of other libraries is heard."""

import logging
import subprocess
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
from runs import ENVIRONMENT, command, train_arguments, write_pictures

from dti_fast.data.folder import find_pictures
from dti_fast.quiet import quiet_libraries
from dti_fast.trainer.config import TrainConfig
from dti_fast.trainer.summary import summarise


class Backbone:
    """As many weights as asked for, which take no memory."""

    def __init__(self, weights: int, device: str):
        # What lies on a CPU is told by the first parameter.
        parameters = [torch.empty(0, device=device), torch.empty(weights, device="meta")]
        self.denoiser = torch.nn.ParameterList(map(torch.nn.Parameter, parameters))

    def modules(self):
        return [self.denoiser]


@pytest.fixture
def told(tmp_path):
    """Summary and warnings of a run with some settings, by default without anything to warn of."""
    write_pictures(tmp_path / "pictures")  # of 100 x 80 pixels

    def tell(weights=1_000_000, device="cpu", side=64, vectors=1, captions=False, **settings):
        config = TrainConfig(
            pretrained_model_name_or_path="pocket", train_data_dir=tmp_path / "pictures", output_dir=tmp_path / "out",
            **{"max_train_steps": 100, **settings},
        ).resolved()  # fmt: skip
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pictures = find_pictures(tmp_path / "pictures")
            caught.clear()
            sizes = torch.tensor([[80, 100, 0, 0, side, side]] * len(pictures))
            embeddings = [SimpleNamespace(tokens=["<x>"] * vectors)] * 2
            lines = summarise(config, Backbone(weights, device), embeddings, pictures, captions, sizes)
        return lines, [str(warning.message) for warning in caught]

    return tell


def test_a_summary_names_what_is_used_and_what_is_not(told, tmp_path):
    folder = tmp_path / "pictures"
    (folder / "0.txt").write_text("a {}")
    (folder / "b.jpg").write_bytes(b"broken")
    (folder / "notes.md").touch()
    (folder / ".hidden").touch()
    lines, found = told(captions=True, vectors=3, device="meta", train_batch_size=2, lr_scheduler="constant")
    assert found == []
    for line in (
        "model: pocket, 1 million weights in auto on meta",
        f"pictures: 3 of {folder}, 64 x 64 pixels",
        "prompts: the captions; a template for 1.png, 2.png",
        "concept: <concept> from 'creature', 3 vectors in each of 2 text encoders",
        "steps: 100 of 2 pictures, method dti, learning rate 0.04, constant",
    ):
        assert line in lines.splitlines()
    (unused,) = (line for line in lines.splitlines() if line.startswith("not used: "))
    assert "b.jpg (" in unused
    assert "notes.md (" in unused
    assert "hidden" not in unused
    assert "0.txt" not in unused


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"weights": 860_000_000}, "a model of 0.9 billion weights on the CPU"),
        ({"side": 96}, "0.png (100 x 80), 1.png (100 x 80), 2.png (100 x 80)"),
        ({"learning_rate": 5e-4}, "100 steps turn a vector by about 1.4 degrees at most"),  # half of 100 arctan(5e-4)
        ({"max_train_steps": 4, "lr_scheduler": "constant"}, "4 steps turn a vector by about 9.2 degrees at most"),
        ({"learning_rate": 1.5}, "every step turns a vector by more than 45 degrees"),
        ({"lr_warmup_steps": 100}, "--lr_warmup_steps 100 is no shorter than the run of 100 steps"),
        ({"validation_prompt": ["a {}", "a <concept>", "a dog"]}, "--validation_prompt 'a dog' has no {}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_can_hardly_be_meant_is_warned_of(told, settings, message):
    _, found = told(**settings)
    assert len([warning for warning in found if message in warning]) == 1, found
    assert len(found) == 1, found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"weights": 860_000_000, "device": "meta"},
        {"side": 80},
        {"max_train_steps": 5, "lr_scheduler": "constant"},  # 11.5 degrees
        {"method": "ti", "learning_rate": 5e-4},
        {"validation_prompt": ["a dog"], "num_validation_images": 0},
    ],
    ids=lambda settings: " ".join(settings),
)
def test_what_may_be_meant_is_not(told, settings):
    assert told(**settings)[1] == []


def test_quiet_libraries_leaves_everything_as_it_was():
    import diffusers
    import huggingface_hub
    import transformers

    def state():
        return (
            logging.root.manager.disable, list(warnings.filters), transformers.logging.get_verbosity(),
            transformers.utils.logging.is_progress_bar_enabled(), diffusers.utils.logging.is_progress_bar_enabled(),
            huggingface_hub.utils.are_progress_bars_disabled(),
        )  # fmt: skip

    before = state()
    with pytest.raises(KeyError), quiet_libraries():
        assert state() != before
        raise KeyError
    assert state() == before


def test_a_caller_of_the_library_hears_no_other(tmp_path):
    code = (
        "import sys, warnings; from pathlib import Path; from dti_fast import TrainConfig, train\n"
        "warnings.filterwarnings('ignore', module='dti_fast')\n"
        "train(TrainConfig(max_train_steps=5, lr_scheduler='constant', base_precision='int8', num_validation_images=0, "
        "output_dir=Path(sys.argv[1])), loggers=[])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")


def test_a_run_that_learned_nothing_is_told(tiny_pipelines, tmp_path):
    folder = write_pictures(tmp_path / "pictures", 1)
    run = command(*train_arguments(tiny_pipelines["sd15"], folder, tmp_path / "out", max_train_steps=10, kappa=1e9))
    assert run.returncode == 0, run.stderr
    assert "degrees from the initial word, so hardly anything was learned" in run.stderr
    assert "a smaller --kappa" in run.stderr
