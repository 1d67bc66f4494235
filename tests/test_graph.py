"""The captured step: on a CPU a tape stands in for the CUDA graph, replaying the operations on their own memory."""

from types import SimpleNamespace

import pytest
import torch
from runs import command, train_arguments
from safetensors.torch import load_file
from steps import setup
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dti_fast.data.draws import draw
from dti_fast.trainer.graph import WARM_UP, CapturedStep, captured
from dti_fast.trainer.monitor import Monitor
from dti_fast.trainer.step import train_step


class Tape(TorchDispatchMode):
    """Records operations with the very tensors they had, as a CUDA graph does with addresses."""

    def __init__(self):
        super().__init__()
        self.calls, self.replays = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    @torch.no_grad()
    def replay(self) -> None:
        self.replays += 1
        if self.replays == 1:  # unlike a capture, the recording was carried out
            return
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)

    @classmethod
    def capture(cls, run):
        tape = cls()
        with tape:
            run()
        read = [func for func, *_ in tape.calls if func is torch.ops.aten._local_scalar_dense.default]
        assert not read, "the step reads the device"
        return tape.replay


def learn(folder, captured: bool, steps: int, device="cpu", capture=Tape.capture, **settings):
    """Directions, mean loss and first failure after `steps`, of which the one before the last gets a NaN."""
    backbone, data, path, learner = setup(folder, device, **settings)
    failed = torch.zeros((), device=device)
    lr = learner.parts[0].optimizer.param_groups[0]["lr"]
    monitor = Monitor(learner.embeddings, 0, steps)

    def step(passes):
        loss, now = train_step(backbone, data, path, passes, learner, failed)
        failed.copy_(now)
        monitor.record(loss, failed)

    run = CapturedStep(step, capture) if captured else step
    states = []
    for i in range(steps):
        lr.fill_(0.04 / (i + 1))
        if i == steps - 2:
            data.mean.fill_(torch.nan)
        run([draw(data, 2, 1000, 0, i)])
        sums = monitor.loss_sum, monitor.largest_gradient, monitor.first_failure
        states.append([t.clone() for t in (*learner.state().values(), *sums, failed)])
    return states, run


NORMALISED = {"momentum": 0.9, "per_sample_normalisation": True}


@pytest.mark.parametrize(("family", "settings"), [("sd15", {}), ("sdxl", {}), ("sd15", NORMALISED)])
def test_replays_on_new_draws_are_the_eager_steps(tiny_pipelines, family, settings):
    eager, _ = learn(tiny_pipelines[family], False, WARM_UP + 5, **settings)
    captured, run = learn(tiny_pipelines[family], True, WARM_UP + 5, **settings)
    assert run.replay.__self__.replays == 5
    for step, (ours, expected) in enumerate(zip(captured, eager, strict=True)):
        for a, b in zip(ours, expected, strict=True):
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), step
    directions = [state[0] for state in eager]
    assert not torch.equal(directions[-4], directions[-3])  # it does move
    assert torch.equal(directions[-3], directions[-1])  # until the loss is NaN
    assert eager[-1][-2].item() == WARM_UP + 4


def test_the_tape_would_catch_a_step_that_counts_on_the_host():
    total, count = torch.zeros(()), 0

    def run():
        nonlocal count
        count += 1
        total.add_(count)

    replay = Tape.capture(run)
    for _ in range(3):
        replay()
    assert total.item() == 3  # eager steps would have made it 6


class FromTheHost(TorchDispatchMode):
    """Notes the operations that make or read tensors of the CPU: copies from there wait, and break a capture."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.seen.append(str(func))
        return out


@pytest.mark.parametrize(("family", "settings"), [("sd15", {}), ("sd21", {}), ("sdxl", {}), ("sdxl", NORMALISED)])
def test_nothing_in_a_step_comes_from_the_host(tiny_pipelines, family, settings):
    backbone, data, path, learner = setup(tiny_pipelines[family], "meta", **settings)
    passes, failed = [draw(data, 2, 1000, 0, 0)], torch.zeros((), device="meta")
    monitor = Monitor(learner.embeddings, 0, 9)
    train_step(backbone, data, path, passes, learner, failed)  # makes gradients and states
    with FromTheHost() as host:
        loss, failed = train_step(backbone, data, path, passes, learner, failed)
        monitor.record(loss, failed)
    assert not host.seen


@pytest.mark.gpu
@pytest.mark.parametrize(("family", "settings"), [("sd15", {}), ("sdxl", {}), ("sd15", NORMALISED)])
def test_a_cuda_graph_is_the_eager_steps(tiny_pipelines, family, settings):
    from dti_fast.trainer.graph import cuda_graph

    eager, _ = learn(tiny_pipelines[family], False, WARM_UP + 5, "cuda", **settings)
    captured, _ = learn(tiny_pipelines[family], True, WARM_UP + 5, "cuda", cuda_graph, **settings)
    for ours, expected in zip(captured, eager, strict=True):
        for a, b in zip(ours, expected, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def learner_on(device, scaling=False, optimizers=()):
    return SimpleNamespace(
        embeddings=[SimpleNamespace(directions=SimpleNamespace(device=torch.device(device)))],
        scaler=SimpleNamespace(is_enabled=lambda: scaling),
        parts=[SimpleNamespace(optimizer=optimizer) for optimizer in optimizers],
    )


ADAMW = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        (learner_on("cpu"), "no CUDA device"),
        (learner_on("cuda", scaling=True), "fp16"),
        (learner_on("cuda", optimizers=[ADAMW]), "AdamW"),
        (learner_on("cuda"), None),
    ],
)
def test_why_a_run_stays_eager(learner, reason):
    said = []
    step = captured(print, learner, said.append)
    if reason is None:
        assert isinstance(step, CapturedStep) and not said
    else:
        assert step is print and len(said) == 1 and reason in said[0]


def test_a_run_on_a_cpu_says_so_and_learns_the_same(tiny_pipelines, pictures, tmp_path):
    directions = []
    for mode in ("off", "on"):
        settings = {"max_train_steps": 3, "resolution": 64, "train_batch_size": 1, "cuda_graph": mode}
        run = command(*train_arguments(tiny_pipelines["sd15"], pictures, tmp_path / mode, **settings))
        assert run.returncode == 0, run.stderr
        assert ("because there is no CUDA device" in " ".join(run.stderr.split())) == (mode == "on")
        directions.append(load_file(tmp_path / mode / "learned_embeds.safetensors")["<toy>"])
    assert torch.equal(*directions)
