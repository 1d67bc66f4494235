"""`dti-fast doctor`: what a user pastes into a bug report."""

import subprocess
import sys

import pytest
import torch
from runs import ENVIRONMENT, command

from dti_fast.commands.doctor import report

OPS = ("sphere_step_", "tangent_sum", "token_embed", "token_embed_backward")
WORKS = """
import torch.nn.functional as F
def memory_efficient_attention(q, k, v):
    return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
"""
WRONG = "def memory_efficient_attention(q, k, v): return q + k + v"
FAILS = "def memory_efficient_attention(q, k, v): raise NotImplementedError('No operator\\n  because of much else')"


def words(text: str) -> list[list[str]]:
    """Of each line: whatever the columns are wide."""
    return [line.split() for line in text.splitlines()]


def test_report():
    run = command("doctor")
    assert run.returncode == 0, run.stderr
    assert ["torch", torch.__version__] in words(run.stdout)
    assert all(
        name in run.stdout for name in (*OPS, "triton", "diffusers", "xformers attention: ", "bitsandbytes nf4: ")
    )
    assert "no CUDA device" in run.stdout or "capability" in run.stdout


@pytest.mark.parametrize(
    ("backend", "expected"),
    [
        ("reference", "sphere_step_ cpu reference forced by DTI_FAST_BACKEND"),
        ("nonsense", "must be one of triton, native, reference, got 'nonsense'"),
    ],
)
def test_says_what_the_environment_forces(monkeypatch, backend, expected):
    monkeypatch.setenv("DTI_FAST_BACKEND", backend)
    text = report()
    assert expected in " ".join(text.split())
    assert f"DTI_FAST_BACKEND={backend}" in text


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (WORKS, "runs on c"),
        (WRONG, "gives wrong results on c"),
        (FAILS, "does not run: NotImplementedError: No operator\n"),
    ],
    ids=["works", "wrong", "fails"],
)
def test_runs_xformers_rather_than_believing_its_version(tmp_path, monkeypatch, source, expected):
    (tmp_path / "xformers").mkdir()
    (tmp_path / "xformers/__init__.py").touch()
    (tmp_path / "xformers/ops.py").write_text(source)
    (tmp_path / "xformers-9.9.dist-info").mkdir()
    (tmp_path / "xformers-9.9.dist-info/METADATA").write_text("Metadata-Version: 2.1\nName: xformers\nVersion: 9.9\n")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.partition(".")[0] == "xformers"]:
        monkeypatch.delitem(sys.modules, name)
    try:
        text = report()
    finally:
        for name in ("xformers", "xformers.ops"):
            sys.modules.pop(name, None)
    assert ["xformers", "9.9"] in words(text)
    assert f"xformers attention: {expected}" in text


def test_needs_the_base_install_only():
    absent = "cyclopts rich PIL diffusers transformers bitsandbytes"
    code = (
        f"import sys; sys.modules.update(dict.fromkeys({absent.split()!r})); sys.argv = ['dti-fast', 'doctor']\n"
        "from dti_fast.cli import main; main()"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert run.returncode == 0, run.stderr
    assert all(op in run.stdout for op in OPS)
