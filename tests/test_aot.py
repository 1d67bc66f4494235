"""Every launch of the Triton kernels compiled for real GPUs, none of which need be here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dti_fast.ops import _build, operators


@pytest.fixture(scope="module")
def kernels():
    """Compiled in a process of its own, because this one may have loaded Triton as an interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "benchmarks.kernel_resources", "--json"]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_every_launch_compiles_for_every_target(kernels):
    cases = {(kernel["op"], kernel["case"]) for kernel in kernels}
    assert {name for name, _ in cases} == {op.stem for op in operators.values() if "triton" in op.fused}
    assert sorted((*case, target) for case in cases for target in _build.ARCHITECTURES) == sorted(
        (kernel["op"], kernel["case"], kernel["target"]) for kernel in kernels
    )


def test_no_spills(kernels):
    assert not [kernel for kernel in kernels if kernel["spilled"]]


def test_no_float64(kernels):
    assert not [kernel for kernel in kernels if kernel["f64"]]


def test_sixteen_bytes_an_access(kernels):
    """All these rows are multiples of 16 elements at aligned addresses, but for a group's few parts."""
    streaming = [kernel for kernel in kernels if ": combine" not in kernel["case"]]
    assert not [kernel for kernel in streaming if "ld.global.v4.b32" not in kernel["accesses"]]
    reductions = [kernel for kernel in streaming if kernel["case"].endswith((": statistics", ": sums"))]
    reductions += [k for k in streaming if k["op"] == "token_embed" and k["case"].startswith("backward")]
    writers = [kernel for kernel in streaming if kernel not in reductions]
    assert not [kernel for kernel in writers if "st.global.v4.b32" not in kernel["accesses"]]
