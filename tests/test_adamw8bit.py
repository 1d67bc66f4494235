"""AdamW with 8-bit states: its bytes, its exact skips, and that it continues bit for bit."""

import copy

import pytest
import torch

from dti_fast.trainer.parts.adamw8bit import AdamW8bit, state_bytes


def problem():
    """Parameters as a small LoRA has them, and a function that gives the gradients of step `i`."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(4, 96), (96, 4), (4, 640), (3, 1)]
    parameters = [torch.nn.Parameter(torch.randn(s, generator=generator)) for s in shapes]

    def backward(i, factor=1.0):
        generator = torch.Generator().manual_seed(i)
        for p in parameters:
            p.grad = factor * torch.randn(p.shape, generator=generator)

    return parameters, backward


def snapshot(parameters, optimizer):
    tensors = [t for p in parameters for t in optimizer.tensors(p).values()]
    return [t.detach().clone() for t in [*parameters, *tensors]]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_small_parameters_keep_float32_moments_and_the_bytes_add_up():
    parameters, _ = problem()
    optimizer = AdamW8bit(parameters)
    dtypes = [optimizer.state[p]["state1"].dtype for p in parameters]
    assert dtypes == [torch.uint8, torch.uint8, torch.uint8, torch.float32]
    eight_bit, total, plain = state_bytes(optimizer)
    numbers = 384 + 384 + 2560
    assert eight_bit == 2 * numbers
    assert total == eight_bit + 2 * 4 * (2 + 2 + 10) + 2 * 4 * 3 + 2 * 1024  # scales, magnitudes, tables
    adamw = torch.optim.AdamW(parameters)
    for p in parameters:
        p.grad = torch.zeros_like(p)
    adamw.step()
    assert plain == sum(t.nbytes for state in adamw.state.values() for t in state.values())


def test_updates_are_those_of_bitsandbytes_and_near_those_of_float32():
    import bitsandbytes

    (ours, backward), (theirs, backward_theirs), (exact, backward_exact) = (problem() for _ in range(3))
    optimizers = [
        AdamW8bit(ours, lr=1e-2),
        bitsandbytes.optim.AdamW8bit(theirs, lr=1e-2, min_8bit_size=256),
        torch.optim.AdamW(exact, lr=1e-2),
    ]
    for step in range(20):
        for go, optimizer in zip((backward, backward_theirs, backward_exact), optimizers, strict=True):
            go(step)
            optimizer.step()
    start, _ = problem()
    for a, b, c, p in zip(ours, theirs, exact, start, strict=True):
        assert torch.equal(a, b)
        assert (a - c).norm() < 0.1 * (c - p).norm()
    torch.testing.assert_close(ours[3], exact[3])  # the magnitudes are float32 throughout


def test_a_found_inf_changes_nothing_and_a_scale_is_divided_out():
    parameters, backward = problem()
    optimizer = AdamW8bit(parameters)
    backward(0)
    optimizer.step()
    before = snapshot(parameters, optimizer)
    backward(1, torch.nan)
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert same(before, snapshot(parameters, optimizer))
    twin, twin_backward = problem()
    other = AdamW8bit(twin)
    twin_backward(0)
    other.step()
    backward(1, 1024.0), twin_backward(1)
    optimizer.found_inf, optimizer.grad_scale = torch.zeros(()), torch.tensor(1024.0)
    optimizer.step(), other.step()
    assert same(snapshot(parameters, optimizer), snapshot(twin, other))


def test_parameters_without_a_gradient_wait():
    parameters, backward = problem()
    optimizer = AdamW8bit(parameters)
    backward(0)
    parameters[0].grad = None
    before = parameters[0].detach().clone()
    optimizer.step()
    assert torch.equal(parameters[0], before)
    assert [optimizer.state[p]["step"] for p in parameters] == [0, 1, 1, 1]


@pytest.mark.parametrize("n", [1, 7])
def test_continues_bit_for_bit(n):
    parameters, backward = problem()
    optimizer = AdamW8bit(parameters)
    for step in range(n):
        backward(step)
        optimizer.step()
    stored = [copy.deepcopy((p.data, optimizer.tensors(p))) for p in parameters]
    twin, twin_backward = problem()
    other = AdamW8bit(twin)
    for p, (value, tensors) in zip(twin, stored, strict=True):
        p.data.copy_(value)
        other.load_tensors(p, tensors)
    for step in range(n, 2 * n):
        backward(step), twin_backward(step)
        optimizer.step(), other.step()
    assert same(snapshot(parameters, optimizer), snapshot(twin, other))
