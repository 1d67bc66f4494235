"""The byte counter counts right, and the stock UNets need what the documentation says."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.bench_memory import GIB, measure, table
from dti_fast.memory.live_bytes import LiveBytes


def near(gib: float):
    return pytest.approx(gib, rel=0.02)


def test_storages_count_once_and_until_they_die():
    with FakeTensorMode():
        before = torch.empty(1000)
        with LiveBytes() as counter:
            a = before.t().exp()
            view = a[10:]
            before.add_(1)
            b = torch.empty(500, dtype=torch.bfloat16)
            assert counter.live == 4000 + 1000
            del a
            assert counter.live == 4000 + 1000
            del view
            assert counter.live == 1000
            del b
    assert (counter.live, counter.peak) == (0, 5000)


def test_what_autograd_keeps_is_seen_even_if_no_hook_sees_it():
    class Keeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.kept = x * 2
            return x + 1

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.kept

    with FakeTensorMode():
        x = torch.empty(100, requires_grad=True)
        with LiveBytes() as counter:
            y = Keeps.apply(x)
            assert counter.live == 800
            y.sum().backward()
            del y
            assert counter.live == 400  # the gradient


def test_a_frozen_linear_layer_keeps_nothing_and_a_convolution_its_input():
    with FakeTensorMode():
        linear = torch.nn.Linear(32, 32).requires_grad_(False)
        conv = torch.nn.Conv2d(8, 8, 1).requires_grad_(False)
        x = torch.empty(4, 32, requires_grad=True)
        z = torch.empty(1, 8, 4, 4, requires_grad=True)
        with LiveBytes() as counter:
            y = linear(x * 2)
            assert counter.live == y.nbytes
            w = conv(z * 2)
            assert counter.by_kind() == {"conv input": z.nbytes, "other": y.nbytes + w.nbytes}


def test_sdxl_at_1024():
    kinds, peak = measure("sdxl", 1024, 1)
    live = sum(kinds.values())
    assert f"{live / GIB:.2f} {peak / GIB:.2f}" == "4.94 4.98"
    fused = live - kinds["conv input"] - kinds["SiLU input"] - kinds["GEGLU gelu(gate)"]
    assert fused / GIB == near(3.64)
    assert kinds["other"] / live < 0.01
    assert "| live after forward | 4.94 |" in table({"SDXL": (kinds, peak)})


@pytest.mark.parametrize(
    "mode, live, peak",
    [("checkpointing", 0.47, 0.57), ("none", 3.64, 3.70), ("geglu", 2.07, 2.13), ("block", 0.39, 0.51)],
)
def test_sdxl_at_1024_with_less_kept(mode, live, peak):
    kinds, most = measure("sdxl", 1024, 1, mode)
    assert (sum(kinds.values()) / GIB, most / GIB) == (near(live), near(peak))
    assert mode == "checkpointing" or "conv input" not in kinds or kinds["conv input"] < 1 << 20


def test_sd15_frozen():
    assert sum(measure("sd15", 512, 1, "none")[0].values()) / GIB == near(0.44)


@pytest.mark.parametrize(
    "model, resolution, batch, live", [("sdxl", 768, 4, 11.2), ("sdxl", 512, 1, 1.25), ("sd15", 512, 1, 0.69)]
)
def test_other_sizes(model, resolution, batch, live):
    assert sum(measure(model, resolution, batch)[0].values()) / GIB == near(live)
