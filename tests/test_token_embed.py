"""`token_embed`: every backend against float64, its gradient, and ids that are nobody's."""

import os

import pytest
import torch
import torch.nn.functional as F
from accuracy import capture

from dti_fast.ops import token_embed
from dti_fast.reference import token_embed as reference

FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def problem(K, D, device="cpu", *, V=50, first_id=None, shape=(2, 13), dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    first_id = V if first_id is None else first_id
    ids = torch.randint(0, max(V, first_id + K), shape, generator=generator)
    ids.view(-1)[:K] = torch.arange(first_id, first_id + K)[: ids.numel()]
    vocabulary = torch.randn(V, D, generator=generator).to(dtype)
    directions = F.normalize(torch.randn(K, D, generator=generator))
    magnitudes = torch.rand(K, 1, generator=generator) + 0.2
    return [tensor.to(device) for tensor in (ids, vocabulary, directions, magnitudes)] + [first_id]


def expected(ids, vocabulary, directions, magnitudes, first_id):
    """Row by row in float64, sharing no code with the reference."""
    table = {first_id + k: magnitudes[k].double() * directions[k].double() for k in range(len(directions))}
    rows = [table[i] if i in table else vocabulary[i].double() for i in ids.flatten().tolist()]
    return torch.stack(rows).view(*ids.shape, -1)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("K", "D"), [(1, 1), (4, 768), (3, 127), (13, 1280), (2, 2304)])
def test_values(lane, K, D, dtype):
    arguments = problem(K, D, lane, dtype=FLOATS[dtype])
    out = token_embed(*arguments)
    assert out.dtype == FLOATS[dtype] and out.shape == (2, 13, D)
    exact, limits = expected(*arguments), torch.finfo(FLOATS[dtype])
    # Half a unit in the last place, and the product's own in float32; Triton's interpreter truncates to bfloat16.
    truncates = os.environ["DTI_FAST_BACKEND"] == "triton" and lane == "cpu" and dtype == "bf16"
    ulps = (1.0 if truncates else 0.5) * limits.eps + torch.finfo(torch.float32).eps
    assert ((out - exact).abs() <= ulps * exact.abs() + limits.tiny * limits.eps / 2).all()
    frozen = arguments[0] < arguments[4]
    assert torch.equal(out[frozen], arguments[1][arguments[0][frozen]])


def test_learned_ids_replace_rows_of_the_vocabulary(lane):
    arguments = problem(3, 40, lane, first_id=20)
    assert torch.equal(token_embed(*arguments).double(), expected(*arguments).float().double())


@pytest.mark.parametrize("shape", [(), (7,), (2, 3, 5), (0, 4)], ids=str)
def test_shapes_of_ids(lane, shape):
    ids, *rest = problem(2, 24, lane)
    ids = torch.randint(0, 52, shape, device=lane)
    directions = rest[1].requires_grad_()
    out = token_embed(ids, rest[0], directions, *rest[2:])
    assert out.shape == (*shape, 24)
    out.sum().backward()
    assert directions.grad.shape == (2, 24)


def test_strided_arguments(lane):
    ids, vocabulary, directions, magnitudes, first_id = problem(3, 40, lane, dtype=torch.bfloat16)
    out = token_embed(ids, vocabulary, directions, magnitudes, first_id)

    def strided(tensor, column=2):
        home = torch.full((tensor.shape[0] + 2, tensor.shape[1] * column + 3), 77, dtype=tensor.dtype, device=lane)
        home[1:-1, 2 : 2 + tensor.shape[1] * column : column] = tensor
        return home[1:-1, 2 : 2 + tensor.shape[1] * column : column]

    again = token_embed(ids.T.contiguous().T, *map(strided, (vocabulary, directions, magnitudes)), first_id)
    assert torch.equal(out, again)
    grad = torch.randn(2, 13, 40, device=lane)
    op = torch.ops.dti_fast.token_embed_backward
    plain = op(grad, ids, magnitudes, first_id)
    again = op(grad.transpose(0, 2).contiguous().transpose(0, 2), ids.T.contiguous().T, strided(magnitudes), first_id)
    assert torch.equal(plain, again)


def test_an_id_of_nobody_gives_nan(lane):
    ids, *rest = problem(2, 24, lane)
    ids[0, 5], ids[1, 1], ids[1, 2] = -1, 52, 2**40
    out = token_embed(ids, *rest)
    wrong = (ids < 0) | (ids >= 52)
    assert out[wrong].isnan().all() and out[~wrong].isfinite().all()


def gradient(arguments, weight):
    directions = arguments[2].detach().requires_grad_()
    out = token_embed(*arguments[:2], directions, *arguments[3:])
    return torch.autograd.grad((out * weight).sum(), directions)[0]


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("K", "D"), [(1, 1), (4, 768), (3, 127), (9, 200)])
def test_gradient(lane, K, D, dtype):
    arguments = problem(K, D, lane, shape=(2, 77), V=3, dtype=FLOATS[dtype])
    ids, magnitudes, first_id = arguments[0], arguments[3], arguments[4]
    weight = torch.randn(2, 77, D, device=lane).to(FLOATS[dtype])
    ours = gradient(arguments, weight)
    assert ours.dtype == torch.float32
    truth = torch.stack([magnitudes[k].double() * weight[ids == first_id + k].double().sum(0) for k in range(K)])
    plain = reference.token_embed_backward(weight, ids, magnitudes, first_id)
    floor = 4 * torch.finfo(torch.float32).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * (plain - truth).abs().max() + floor
    assert torch.equal(ours, gradient(arguments, weight))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("shape", "first_id"), [((4, 77), 3), ((3, 5, 7), 1), ((1, 9), 3), ((9,), 3)], ids=str)
def test_each_sample_has_directions_of_its_own(lane, shape, first_id, dtype):
    """Values and gradients are those of the samples one by one; rows in any strides."""
    ids, vocabulary, _, magnitudes, first_id = problem(
        3, 40, lane, V=3, first_id=first_id, shape=shape, dtype=FLOATS[dtype]
    )
    directions = torch.randn(40, 3, shape[0], device=lane).T.requires_grad_()
    weight = torch.randn(*shape, 40, device=lane).to(FLOATS[dtype])
    out = token_embed(ids, vocabulary, directions, magnitudes, first_id)
    (ours,) = torch.autograd.grad((out * weight).sum(), directions)
    assert ours.shape == directions.shape and ours.dtype == torch.float32
    for b in range(shape[0]):
        alone = directions[b].detach().requires_grad_()
        arguments = ids[b], vocabulary, alone, magnitudes, first_id
        assert torch.equal(out[b], token_embed(*arguments))
        truth = torch.stack(
            [magnitudes[k].double() * weight[b][ids[b] == first_id + k].double().sum(0) for k in range(3)]
        )
        assert (ours[b] - truth).abs().max() <= 1e-6 * (1 + truth.abs().max())


def test_no_samples_and_no_room_for_them(lane):
    ids, vocabulary, directions, magnitudes, first_id = problem(3, 40, lane, shape=(0, 7))
    own = torch.empty(0, 3, 40, device=lane, requires_grad=True)
    token_embed(ids, vocabulary, own, magnitudes, first_id).sum().backward()
    assert own.grad.shape == (0, 3, 40)
    with pytest.raises(RuntimeError, match=r"directions must be float32 \[3, 40\] or \[0, 3, 40\]"):
        token_embed(ids, vocabulary, directions.expand(2, 3, 40), magnitudes, first_id)


def test_gradient_of_the_formula():
    """The backward formula against finite differences in float64."""
    ids, vocabulary, directions, magnitudes, first_id = problem(3, 5)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx, directions):
            return reference.token_embed(ids, vocabulary.double(), directions, magnitudes.double(), first_id)

        @staticmethod
        def backward(ctx, grad):
            return reference.token_embed_backward(grad, ids, magnitudes.double(), first_id)

    assert torch.autograd.gradcheck(Formula.apply, directions.double().requires_grad_())


def test_only_directions_get_a_gradient_and_nothing_large_is_kept(lane):
    ids, vocabulary, directions, magnitudes, first_id = problem(2, 24, lane)
    vocabulary.requires_grad_(), magnitudes.requires_grad_(), directions.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        out = token_embed(ids, vocabulary, directions, magnitudes, first_id)
    out.sum().backward()
    assert vocabulary.grad is None and magnitudes.grad is None and directions.grad is not None
    assert {tensor.data_ptr() for tensor in kept} == {ids.data_ptr(), magnitudes.data_ptr()}


def test_nan_at_a_frozen_word_does_not_reach_the_directions(lane):
    arguments = problem(2, 24, lane)
    grad = torch.randn(2, 13, 24, device=lane)
    grad[arguments[0] < arguments[4]] = torch.nan
    assert torch.ops.dti_fast.token_embed_backward(grad, arguments[0], *arguments[3:]).isfinite().all()


def test_opcheck(lane):
    ids, vocabulary, directions, magnitudes, first_id = problem(3, 16, lane, dtype=torch.bfloat16)
    arguments = (ids, vocabulary, directions.requires_grad_(), magnitudes, first_id)
    torch.library.opcheck(torch.ops.dti_fast.token_embed.default, arguments)
    grad = torch.randn(2, 13, 16, device=lane)
    torch.library.opcheck(torch.ops.dti_fast.token_embed_backward.default, (grad, ids, magnitudes, first_id))
    own = directions.detach().expand(2, -1, -1).clone().requires_grad_()
    torch.library.opcheck(torch.ops.dti_fast.token_embed.default, (ids, vocabulary, own, magnitudes, first_id))
    torch.library.opcheck(torch.ops.dti_fast.token_embed_backward.default, (grad, ids, magnitudes, first_id, True))


def test_compiles_to_one_graph(lane):
    from torch._dynamo.testing import CompileCounterWithBackend

    ids, vocabulary, directions, magnitudes, first_id = problem(3, 16, lane)
    directions.requires_grad_()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(
        lambda ids: token_embed(ids, vocabulary, directions, magnitudes, first_id).square().sum(),
        fullgraph=True,
        backend=counter,
    )
    for shift in range(5):
        shifted = (ids + shift) % (first_id + 3)
        compiled(shifted).backward()
        ours, directions.grad = directions.grad, None
        token_embed(shifted, vocabulary, directions, magnitudes, first_id).square().sum().backward()
        assert torch.equal(ours, directions.grad)
        directions.grad = None
    assert counter.frame_count == 1


def test_meta_device_reads_nothing_back():
    ids, vocabulary, directions, magnitudes, first_id = (
        value.to("meta") if isinstance(value, torch.Tensor) else value for value in problem(3, 16, dtype=torch.bfloat16)
    )
    out = token_embed(ids, vocabulary, directions.requires_grad_(), magnitudes, first_id)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16 and directions.grad.shape == (3, 16)


@pytest.mark.parametrize(
    ("index", "wrong", "message"),
    [
        (0, torch.zeros(2, 3), "ids must be int64 or int32"),
        (1, torch.zeros(50, 8, dtype=torch.int64), "vocabulary must be"),
        (2, torch.zeros(3, 7), "directions must be"),
        (2, torch.zeros(3, 8, dtype=torch.bfloat16), "directions must be"),
        (3, torch.zeros(3), "magnitudes must be"),
        (3, torch.zeros(2, 1), "directions must be"),
    ],
)
def test_wrong_arguments(index, wrong, message):
    arguments = problem(3, 8)
    arguments[index] = wrong
    with pytest.raises(RuntimeError, match=message):
        token_embed(*arguments)


@pytest.mark.gpu
@pytest.mark.parametrize("lane", [("triton", "cuda"), ("native", "cuda")], indirect=True, ids=["triton", "cuda"])
def test_graph_capture(lane):
    ids, vocabulary, directions, magnitudes, first_id = problem(4, 768, lane, dtype=torch.bfloat16)
    directions.requires_grad_()

    def step():
        out = token_embed(ids, vocabulary, directions, magnitudes, first_id)
        return out, torch.autograd.grad(out.float().square().sum(), directions)[0]

    graph, captured = capture(step)
    for shift in range(3):
        ids.copy_((ids + shift) % (first_id + 4))
        graph.replay()
        assert all(map(torch.equal, captured, step()))


@pytest.mark.parametrize("D", [768, 1280, 2048])
def test_text_encoders_are_compiled_ahead(D):
    kernels = pytest.importorskip("dti_fast.kernels.token_embed")
    assert any(f"D={D}," in case for case, _ in kernels.aot_cases())
