"""Which device and precision a run takes, and the names that are refused."""

import pytest
import torch

from dti_fast.devices import DEVICES, pick_device, pick_precision, precision_name
from dti_fast.errors import UserError


@pytest.fixture
def machine(monkeypatch):
    """Makes this machine one with so many devices of each kind."""

    def has(**counts):
        for kind in DEVICES:
            count = counts.get(kind, 0)
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda count=count: count > 0)
            monkeypatch.setattr(getattr(torch, kind), "device_count", lambda count=count: count)

    return has


def test_auto_is_the_first_gpu_there_is(machine):
    for counts, expected in (({}, "cpu"), ({"mps": 1}, "mps"), ({"mps": 1, "xpu": 1}, "xpu"), ({"cuda": 2}, "cuda")):
        machine(**counts)
        assert pick_device() == pick_device("auto") == torch.device(expected)


def test_a_device_that_is_there(machine):
    machine(cuda=2)
    for name in ("cpu", "cpu:0", "cuda", "cuda:0", "cuda:1"):
        assert pick_device(name) == torch.device(name)


@pytest.mark.parametrize("name", ["cuda:2", "cpu:1", "mps", "xpu:0"])
def test_a_device_that_is_not_there(machine, name):
    machine(cuda=2)
    with pytest.raises(UserError, match=f"there is no device '{name}' here; leave out --device"):
        pick_device(name)


@pytest.mark.parametrize(
    "name", ["", "gpu", "CUDA", "cuda:", "cpu:", "cuda:x", "cuda:-1", "cuda:²", "cuda:0:0", "cuda0"]
)
def test_what_names_no_device(machine, name):
    machine(cuda=2)
    with pytest.raises(UserError, match=r"--device is auto, cpu, cuda, cuda:N, mps or xpu, got") as refusal:
        pick_device(name)
    assert str(refusal.value).endswith(repr(name))


def test_precision_of_a_device(monkeypatch):
    for capability, expected in (((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((12, 0), torch.bfloat16)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert pick_precision("auto", torch.device("cuda")) == expected
    assert pick_precision("auto", torch.device("xpu")) == torch.bfloat16
    assert pick_precision("auto", torch.device("mps")) == pick_precision("auto", torch.device("cpu")) == torch.float32
    for name in ("no", "fp16", "bf16"):
        assert precision_name(pick_precision(name, torch.device("cpu"))) == name
