"""Shared fixtures."""

import os
from types import SimpleNamespace

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # one test process for each core
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read once, when triton is imported

LANES = [
    pytest.param(("reference", "cpu"), id="reference"),
    pytest.param(("native", "cpu"), id="native"),
    pytest.param(("triton", "cpu"), id="interpreter"),
    pytest.param(("triton", "cuda"), id="triton", marks=pytest.mark.gpu),
    pytest.param(("native", "cuda"), id="cuda", marks=pytest.mark.gpu),
]


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(params=LANES)
def lane(request, monkeypatch) -> str:
    """Forces a backend; the device to put tensors on.  The native libraries are built once, into the cache."""
    from dti_fast.ops import _build, _dispatch

    backend, device = request.param
    if backend == "native":
        try:
            _build.torch_directory(), _build.host_compiler()
            if device == "cuda":
                _build.cuda_compiler()
        except _build.BuildError as error:
            pytest.skip(str(error))
    if (backend, device) == ("triton", "cpu") and torch.cuda.is_available():
        pytest.skip("with a CUDA device the kernels run on it, not in Triton's interpreter")
    if backend == "triton" and (obstacle := _dispatch._triton_obstacle(device)):
        pytest.skip(obstacle)
    monkeypatch.setenv("DTI_FAST_BACKEND", backend)
    return device


@pytest.fixture(scope="session", autouse=True)
def own_store():
    """Keeps counts for this session alone: those in the user's cache may be other code's.  What it replaces."""
    from dti_fast.memory import store

    kept: dict = {}
    own = SimpleNamespace(read=store.read, write=store.write)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "read", lambda key: store.shipped().get(key, kept.get(key)))
        patch.setattr(store, "write", kept.__setitem__)
        yield own


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory):
    """Folders of random-weight pipelines in the layouts of SD 1.5, SD 2.1 and SDXL."""
    from tiny import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines")
    return {family: save_tiny_pipeline(family, folder / family) for family in ("sd15", "sd21", "sdxl")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three training pictures."""
    from runs import write_pictures

    return write_pictures(tmp_path_factory.mktemp("pictures"))
