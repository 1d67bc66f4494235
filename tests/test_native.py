"""csrc/ as a library: it builds, depends on nothing but torch's stable ABI, and is chosen when it should be."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from dti_fast import ops
from dti_fast.ops import _build, _dispatch, _native


@pytest.fixture(scope="module", params=["cpu", "cuda"])
def library(request):
    """Built once, into the cache; for CUDA by nvcc for all five targets, with a GPU or without."""
    try:
        _build.torch_directory()
        _build.host_compiler() if request.param == "cpu" else _build.cuda_compiler()
    except _build.BuildError as error:
        pytest.skip(str(error))
    return request.param, _build.find(request.param) or _build.build(request.param)


def symbols(path, *options):
    report = subprocess.run(["nm", "-D", *options, str(path)], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1].partition("@")[0] for line in report.splitlines()]


def newer_than_the_target():
    """Functions which torch's headers offer from releases after 2.10 on."""
    headers = _build.torch_directory() / "include/torch/csrc"
    names = set()
    for path in (headers / "stable/c/shim.h", headers / "inductor/aoti_torch/c/shim.h"):
        for guard in re.finditer(
            r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0(.*?)#endif", path.read_text(), re.S
        ):
            if int(guard[1]) > 10:
                names |= set(re.findall(r"\b(?:aoti_)?torch_\w+(?=\()", guard[2]))
    return names


@pytest.mark.skipif(shutil.which("nm") is None, reason="no nm found")
def test_only_the_stable_abi_is_used(library):
    _, path = library
    wanted = symbols(path, "--undefined-only")
    assert not [name for name in wanted if re.search(r"^_Z.*(3c10|2at|5torch)|^_?Py", name)]
    torch_names = {name for name in wanted if "torch" in name}
    assert torch_names and all(name.startswith(("aoti_torch_", "torch_")) for name in torch_names)
    assert not torch_names & newer_than_the_target()
    assert not [name for name in symbols(path, "--defined-only") if "PyInit" in name or "dti_fast" in name]


def test_cuda_holds_every_target_without_spills(library):
    part, path = library
    if part != "cuda":
        pytest.skip("for the CUDA library")
    cuobjdump = pytest.importorskip("triton").knobs.nvidia.cuobjdump.path
    report = subprocess.run([cuobjdump, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    assert {int(number) for number in re.findall(r"arch = sm_(\d+)", report)} >= set(_build.ARCHITECTURES)
    usage = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", report)
    assert len(usage) >= len(_build.ARCHITECTURES) * len(_build.sources("cuda"))
    assert set(usage) == {("0", "0")}


def step(monkeypatch, backend):
    monkeypatch.setenv("DTI_FAST_BACKEND", backend)
    p = F.normalize(torch.ones(2, 8))
    one = torch.ones(())
    ops.sphere_step_(p, torch.randn(2, 8), None, None, one, one, kappa=0.0, beta=0.0, eps=1e-8)


def test_forced_backend_that_is_missing_is_an_error(monkeypatch):
    monkeypatch.setattr(_dispatch.operators["sphere_step_"], "_chosen", {})
    monkeypatch.setattr(_native, "obstacle", lambda device, build: "no gcc or clang found")
    with pytest.raises(RuntimeError, match="DTI_FAST_BACKEND=native cannot serve sphere_step_ on cpu: no gcc"):
        step(monkeypatch, "native")
    rows = [row for row in ops.backends() if row.device == "cpu" and "native" in _dispatch.operators[row.op].fused]
    assert rows and all(row.backend is None and "no gcc" in row.why for row in rows)
    with pytest.raises(ValueError, match="must be one of triton, native, reference, got 'tritton'"):
        step(monkeypatch, "tritton")


def test_unbuilt_library_is_not_built_unasked(monkeypatch, tmp_path):
    monkeypatch.delenv("DTI_FAST_BACKEND", raising=False)
    monkeypatch.setattr(_build, "find", lambda part: None)
    monkeypatch.setattr(_build, "build", lambda *_: pytest.fail("built unasked"))
    for row in ops.backends():
        if row.device == "cpu" and "native" in _dispatch.operators[row.op].fused:
            assert row.backend == "reference" and "not built" in row.why


def test_interpreted_kernels_need_the_interpreter():
    code = (
        "import torch\nfrom dti_fast import ops\np, one = torch.eye(2), torch.ones(())\n"
        "ops.sphere_step_(p, p, None, None, one, one, kappa=0.0, beta=0.0, eps=1e-8)"
    )
    environment = {**os.environ, "DTI_FAST_BACKEND": "triton", "TRITON_INTERPRET": "0"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert "on the CPU Triton runs under TRITON_INTERPRET=1 only" in result.stderr


def test_failed_build_says_what_the_compiler_said(monkeypatch, tmp_path):
    broken = tmp_path / "csrc"
    shutil.copytree(_build.source_directory(), broken)
    (broken / "dti_math.h").write_text("#error deliberately\n")
    monkeypatch.setattr(_build, "source_directory", lambda: broken)
    with pytest.raises(_build.BuildError, match=r"#error deliberately|no gcc|no torch"):
        _build.build("cpu", tmp_path / "out")
    assert not list((tmp_path / "out").glob("*"))
