"""The evidence harness: resumable, and honest about the text encoder's geometry."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import ENVIRONMENT

from benchmarks import _evidence_report, evidence
from dti_fast.backbones.load import load_backbone
from dti_fast.backbones.pocket import Pocket

ROOT = Path(__file__).parent.parent


def test_smoke_run_and_a_second_that_measures_nothing_again(tmp_path):
    command = [sys.executable, "-m", "benchmarks.evidence", "--work", tmp_path, "--smoke"]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert first.returncode == 0, first.stderr
    lines = (tmp_path / "units.jsonl").read_text()
    summary = json.loads((tmp_path / "benchmarks" / "results" / "evidence.json").read_text())
    assert {r["label"] for r in summary["runs"]} == {"DTI", "TI", "TI-rescaled", "CrossInit"}
    assert {p.name for p in (tmp_path / "docs" / "evidence").iterdir()} >= {"methods.png", "strip.png", "norms.png"}
    units = [json.loads(line) for line in lines.splitlines()]
    assert len({u["key"] for u in units}) == len(units)
    rescaled = [u["norm"] for u in units if u["label"] == "TI-rescaled" and "step" in u]
    assert rescaled == pytest.approx([summary["effects"]["mean_norm"]] * len(rescaled), rel=1e-5)

    (tmp_path / "units.jsonl").write_text("".join(lines.splitlines(keepends=True)[:-1]))
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=600)
    assert second.returncode == 0, second.stderr
    assert (tmp_path / "units.jsonl").read_text() == lines  # the missing one, measured again to the same numbers


def test_rotation_and_position_agree_with_the_text_encoder_itself():
    backbone = load_backbone(Pocket.name, torch.float32, torch.device("cpu"))
    encoder, tokenizer = backbone.text_encoders[0], backbone.tokenizers[0]
    ids = tokenizer(["a photo of a creature"], return_tensors="pt").input_ids
    marker = tokenizer.convert_tokens_to_ids("creature</w>")
    own = encoder.get_input_embeddings().weight[marker].detach()
    first, last, normalised = evidence.text_states(encoder, ids, own[None], marker)
    model = getattr(encoder, "text_model", encoder)
    with torch.no_grad():
        torch.testing.assert_close(model.final_layer_norm(last), encoder(ids).last_hidden_state)
        torch.testing.assert_close(model.encoder.layers[0].layer_norm1(first), normalised)
    effect = evidence.position_effect(encoder, own[None], own.norm().item())
    scale, signal = np.array(effect["scale"]), np.array(effect["signal"])
    large = scale >= 8  # Proposition: O(1/m)
    slope = np.polyfit(np.log(scale[large]), np.log(signal[large]), 1)[0]
    assert slope == pytest.approx(-1, abs=0.05)


def test_estimates_average_seeds_before_creatures():
    estimate = _evidence_report.estimate({1: [0.0, 1.0], 2: [1.0]})
    assert estimate["creatures"] == {"1": 0.5, "2": 1.0}
    assert estimate["mean"] == 0.75
    assert estimate["low"] == 0.5 and estimate["high"] == 1.0
