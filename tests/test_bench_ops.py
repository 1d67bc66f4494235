"""The benchmarks of ops: they take the ops from the registry, and time nothing that is wrong."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import dti_fast.kernels
from benchmarks import _ops, bench_ops, gpu_suite, kernel_errors, kernel_resources
from dti_fast import ops
from dti_fast.memory.live_bytes import LiveBytes
from dti_fast.ops import _dispatch

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent
TOY_KERNEL = """
def toy(x):
    return 2 * x
def aot_cases():
    yield "toy case", lambda: None
"""
TOY_PROBLEMS = """
import torch
from benchmarks._ops import Case, normal
SIZES, SMOKE = ((1 << 20,),), (64,)
def case(n, *, dtype, device):
    double = lambda x: (2 * x,)
    return Case(f"n={n}", 2 * n * dtype.itemsize, ("twice",), lambda seed: normal(seed, dtype, device, (n,)),
                lambda x: (torch.ops.dti_fast.toy(x),), double, lambda x: double(x.double()))
def error_cases(dtype, device):
    yield case(8, dtype=dtype, device=device)
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """An op of its own files: an Operator, dti_fast/kernels/toy.py and benchmarks/ops/toy.py."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels/toy.py").write_text(TOY_KERNEL)
    monkeypatch.setattr(dti_fast.kernels, "__path__", [*dti_fast.kernels.__path__, str(tmp_path / "kernels")])
    (tmp_path / "benchmarks/ops").mkdir(parents=True)
    (tmp_path / "benchmarks/ops/toy.py").write_text(TOY_PROBLEMS)
    monkeypatch.syspath_prepend(tmp_path)
    with torch.library._scoped_library("dti_fast", "FRAGMENT") as library:
        monkeypatch.setattr(_dispatch, "library", library)
        yield _dispatch.Operator(
            "toy(Tensor x) -> Tensor",
            stem="toy",
            check=lambda x: None,
            reference=lambda x: x + x,
            output=torch.empty_like,
            fused=("triton",),
            save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
            backward=lambda ctx, grad: 2 * grad,
            keeps="toy input",
        )
        del _dispatch.operators["toy"]
    for name in ("dti_fast.kernels.toy", "benchmarks.ops.toy"):
        sys.modules.pop(name, None)


def test_a_new_op_is_in_every_list(toy, tmp_path, monkeypatch, capsys):
    assert "toy" in {row.op for row in ops.backends()}
    assert "toy" in kernel_resources.triton_stems()

    x = torch.ones(8, requires_grad=True)
    with LiveBytes() as counter:
        out = torch.ops.dti_fast.toy(x * 1)
    assert counter.by_kind() == {"toy input": 32, "other": out.nbytes}

    errors = list(kernel_errors.rows("toy", CPU))
    assert len(errors) == 3 and errors[0].startswith("| toy | float32 | twice, n=8 | 0.0e+00 | 0.0e+00 |  | 0.0e+00 |")

    table = tmp_path / "ops.csv"
    monkeypatch.setattr(sys, "argv", ["bench_ops", "toy", "--smoke", "--csv", str(table)])
    bench_ops.main()
    assert [row["implementation"] for row in csv.DictReader(table.open())] == ["eager", "reference"]

    monkeypatch.setattr(sys, "argv", ["gpu_suite", "--out", str(tmp_path / "new"), "--ops", "nonsense"])
    with pytest.raises(SystemExit):
        gpu_suite.main()
    assert "ops are" in (said := capsys.readouterr().err) and "toy" in said


def test_every_op_has_problems_of_the_same_kind():
    assert set(_ops.by_stem()) == {path.stem for path in (ROOT / "dti_fast/ops").glob("[a-z]*.py")}
    for stem in _ops.by_stem():
        module = _ops.problems(stem)
        cases = [module.case(*module.SMOKE, dtype=torch.float32, device=CPU)]
        for case in [*cases, *module.error_cases(torch.bfloat16, CPU)]:
            tensors = case.eager(*case.make(0))
            assert len(case.results) == len(tensors) and case.bytes > 0
            errors = case.errors(["reference"])
            assert all(column.keys() == {"eager", "reference"} and size > 0 for column, size in errors.values())


def test_a_wrong_op_is_not_timed():
    (case,) = _ops.problems("layer_norm").error_cases(torch.float32, CPU)
    assert set(bench_ops.measure(case, ("reference",), CPU, rounds=2)) == {"eager", "reference"}
    wrong = case._replace(op=lambda *arguments: [tensor * 1.0001 for tensor in case.op(*arguments)])
    with pytest.raises(ValueError, match="output of reference is wrong by"):
        bench_ops.measure(wrong, ("reference",), CPU, rounds=2)
    nothing = case._replace(op=lambda *arguments: [tensor * torch.nan for tensor in case.op(*arguments)])
    with pytest.raises(ValueError, match="output of reference is wrong by nan"):
        bench_ops.measure(nothing, ("reference",), CPU, rounds=2)


def test_unknown_op(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_ops", "gelu"])
    with pytest.raises(SystemExit, match="2"):
        bench_ops.main()
    assert "there is no op 'gelu': ops are " in capsys.readouterr().err


def test_the_index_has_every_script():
    index = (ROOT / "benchmarks/README.md").read_text()
    scripts = {path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py")}
    assert not {name for name in scripts if f"python -m benchmarks.{name}" not in index}
