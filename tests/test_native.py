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
    from benchmarks import kernel_resources

    report = subprocess.run([cuobjdump, "-res-usage", str(path)], capture_output=True, text=True, check=True).stdout
    assert {int(number) for number in re.findall(r"arch = sm_(\d+)", report)} >= set(_build.ARCHITECTURES)
    usage = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", report)
    assert len(usage) >= len(_build.ARCHITECTURES) * len(_build.sources("cuda"))
    assert set(usage) == {("0", "0")}
    sources = "".join(path.read_text() for path in _build.sources("cuda"))
    names = {row["kernel"].partition("<")[0] for row in kernel_resources.native_kernels()}
    assert names == set(re.findall(r"__global__.* (\w+)\(", sources))
    # 65,536 registers hold a block of any size, which is up to 1024 threads.
    assert max(int(number) for number in re.findall(r"REG:(\d+)", report)) <= 64


@pytest.mark.parametrize("part", ["cpu", "cuda"])
def test_compiles_against_the_headers_of_another_torch(part, tmp_path):
    """Of any from 2.10 on; .ci/headers fetches some and runs this."""
    include = os.environ.get("DTI_FAST_TORCH_INCLUDE")
    if include is None:
        pytest.skip("DTI_FAST_TORCH_INCLUDE does not name the include folder of a torch")
    try:
        compiler = _build.host_compiler() if part == "cpu" else _build.cuda_compiler()
    except _build.BuildError as error:
        pytest.skip(str(error))
    options = _build._HOST if part == "cpu" else ("-DUSE_CUDA", "-gencode=arch=compute_89,code=sm_89")
    for source in _build.sources(part):
        command = [compiler, "-c", *_build._COMMON, *options, f"-I{_build.source_directory()}", "-isystem", include]
        command += [str(source), "-o", str(tmp_path / "object.o")]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr


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
    assert {path.suffix for path in (tmp_path / "out").glob("*")} <= {".failed"}


@pytest.mark.skipif(shutil.which("c++") is None, reason="no compiler found")
def test_a_failed_build_is_tried_once_and_its_reason_is_shown(monkeypatch, tmp_path):
    """By a compiler that counts its calls, in processes of their own."""
    compiler, calls = tmp_path / "broken-c++", tmp_path / "calls"
    compiler.write_text(
        f"#!/bin/sh\necho call >> {calls}\necho 'In file x:' >&2\necho 'x.h:3: error: no luck' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "DTI_FAST_CACHE": str(tmp_path / "cache")}
    monkeypatch.setenv("DTI_FAST_CACHE", environment["DTI_FAST_CACHE"])
    code = (
        "import torch\nfrom dti_fast import ops\np, one = torch.eye(2), torch.ones(())\n"
        "for _ in range(2):\n"
        "    try: ops.sphere_step_(p, p, None, None, one, one, kappa=0.0, beta=0.0, eps=1e-8)\n"
        "    except RuntimeError as error: print(str(error).splitlines()[0])"
    )

    def step() -> list[str]:
        forced = {**environment, "DTI_FAST_BACKEND": "native"}
        return subprocess.run(
            [sys.executable, "-c", code], env=forced, capture_output=True, text=True, check=True
        ).stdout.splitlines()

    first, second = step()
    assert first.endswith("cannot serve sphere_step_ on cpu: broken-c++: x.h:3: error: no luck")
    remembered = "its build failed (python -m dti_fast.ops._build tries again): broken-c++: x.h:3: error: no luck"
    assert second.endswith(remembered)
    assert all(line.endswith(remembered) for line in step())
    assert calls.read_text().count("call") == 1
    report = subprocess.run(
        [sys.executable, "-m", "dti_fast.cli", "doctor"], env=environment, capture_output=True, text=True, check=True
    )
    assert remembered in report.stdout and "In file x" not in report.stdout
    # Asked for, it is tried; and another compiler is another chance.
    again = subprocess.run([sys.executable, "-m", "dti_fast.ops._build", "cpu"], env=environment, capture_output=True)
    assert again.returncode == 1 and calls.read_text().count("call") == 2
    compiler.write_text(compiler.read_text().replace("no luck", "none again"))
    assert step()[0].endswith("on cpu: broken-c++: x.h:3: error: none again")
    assert calls.read_text().count("call") == 3


def test_a_cache_that_cannot_be_written_is_an_obstacle_and_no_crash(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DTI_FAST_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(_build, "find", lambda part: None)
    assert re.search("cannot build in|no gcc|no torch", _native.obstacle("cpu", build=True))
