"""The GPU suite's own machinery, tried on the CPU."""

import json
import subprocess
import sys

import pytest
from runs import ENVIRONMENT

from benchmarks import gpu_suite
from dti_fast.ops import _build


def test_smoke_and_a_failing_stage_that_stops_no_other(tmp_path):
    try:
        _build.torch_directory(), _build.host_compiler()
    except _build.BuildError as error:
        pytest.skip(str(error))
    command = [sys.executable, "-m", "benchmarks.gpu_suite", "--out", tmp_path, "--smoke"]
    environment = ENVIRONMENT | {"PYTEST_ADDOPTS": "--no-such-option"}  # else the suite would run these tests
    run = subprocess.run(
        command, capture_output=True, text=True, cwd=gpu_suite.ROOT, env=environment, timeout=900
    )  # fmt: skip
    assert run.returncode == 1, run.stderr
    assert "no GPU measurements" in run.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "results.json", "environment.txt", "tests.txt", "ops.csv", "ops.txt", "train.json", "log.txt", "job.png"
    }  # fmt: skip
    results = json.loads((tmp_path / "results.json").read_text())
    assert "no GPU measurements" in results["kind"]
    assert {"device", "torch", "triton", "commit", "started"} <= set(results)
    stages = results["stages"]
    assert {name: stage["status"] for name, stage in stages.items()} == {
        "environment": "ok", "tests": "failed", "ceilings": "ok", "ops": "ok", "train": "ok", "graph": "ok",
        "pocket": "ok", "memory": "ok", "cards": "ok", "job": "ok",
    }, stages  # fmt: skip
    assert "pytest ended with code 4" in stages["tests"]["error"][-1]
    rates = stages["ceilings"]["results"]
    assert [name.split(",")[0] for name in rates] == ["copy GB/s", "bf16 TFLOP/s", "int8 TOP/s"]
    assert all(rate > 0 for rate in rates.values())
    (case,) = json.loads((tmp_path / "train.json").read_text())["cases"]
    assert case["breakdown"]["sum_over_whole"] == pytest.approx(1)  # of two samples the medians are means
    check_train(case)
    (graph,) = stages["graph"]["results"].values()
    assert graph["captured differs by"] == 0 and graph["largest loss"] > 0
    for row in stages["memory"]["results"].values():
        assert row["counted on real tensors"] == pytest.approx(row["counted"], rel=0.01)
    assert stages["job"]["results"]["last line of the log"]["step"] == 2
    assert "learned_embeds.safetensors" in stages["job"]["results"]["files"]
    results = stages["ops"]["results"]
    assert set(results) == {path.stem for path in (gpu_suite.ROOT / "dti_fast" / "ops").glob("[a-z]*.py")}
    rows = results["sphere_step"]["rows"]
    assert {row["implementation"] for row in rows} >= {"eager", "native"}
    assert all(row["us_median"] > 0 for row in rows)


def check_train(case):
    rows = {row["contender"]: row for row in case["rows"]}
    ours, diffusers, official = rows["dti-fast"], rows["diffusers TI"], rows["official DTI"]
    assert ours["times_ours"] == 1
    assert diffusers["tflop"] == official["tflop"] > ours["tflop"]  # they encode the pictures in every step
    assert rows["official DTI, checkpointing"]["live_gib"] < 0.3 * official["live_gib"]
    for row in case["rows"]:
        assert row["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert row["images_per_s"] == pytest.approx(row["batch"] / row["s_p50"])
        assert row["concept_s"] > 400 * row["s_p50"]


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("failed", 1), ("timed out", 1)])
def test_exit_code(tmp_path, monkeypatch, status, code):
    def run_stage(name, out, smoke, ops, seconds, keep):
        stage = {"status": "ok" if name == "environment" else status, "seconds": 0.0, "results": {}}
        keep(stage)
        return stage

    monkeypatch.setattr(gpu_suite, "run_stage", run_stage)
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path), "--smoke", "--commit", "abc"])
    assert gpu_suite.main() == code
    results = json.loads((tmp_path / "results.json").read_text())
    assert list(results["stages"]) == list(gpu_suite.STAGES)
    assert results["commit"] == "abc"


def test_a_stage_that_hangs_is_ended(tmp_path):
    kept = []
    stage = gpu_suite.run_stage("ceilings", tmp_path, True, [], 0.05, lambda stage: kept.append(dict(stage)))
    assert stage["status"] == "timed out"
    assert kept[-1] == stage


def test_every_call_takes_less_than_nine_minutes():
    stages = [call.split(",") for call in gpu_suite.CALLS]
    assert all(sum(gpu_suite.LIMITS[stage] for stage in call) <= gpu_suite.CALL < 9 * 60 for call in stages)
    assert [stage for call in stages for stage in call] == list(gpu_suite.STAGES)
    assert gpu_suite.LIMITS.keys() == gpu_suite.STAGES.keys()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--stages", "opps"], "there is no 'opps': stages are environment"),
        (["--ops", "memory"], "there is no 'memory'"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, arguments, expected):
    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path / "new"), "--smoke", *arguments])
    with pytest.raises(SystemExit, match="2"):
        gpu_suite.main()
    assert expected in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
