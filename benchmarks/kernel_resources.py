"""What each kernel costs on each GPU, read from the compiled artefacts; needs no GPU.

python -m benchmarks.kernel_resources                             Markdown
python -m benchmarks.kernel_resources --update docs/kernels.md    the same, as a section of that file
python -m benchmarks.kernel_resources --json                      everything, for the tests
"""

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from benchmarks._harness import update_section
from benchmarks._ops import by_stem
from dti_fast.kernels import _aot
from dti_fast.ops import _build

# Per multiprocessor: warps, blocks, bytes of shared memory; each has 65,536 registers, handed out 256 a warp.
# Source: the table of compute capabilities in the CUDA programming guide.
MULTIPROCESSOR = {
    80: (64, 32, 164 << 10),
    86: (48, 16, 100 << 10),
    89: (48, 24, 100 << 10),
    90: (64, 32, 228 << 10),
    120: (48, 24, 100 << 10),
}


def occupancy(target: int, warps: int, registers: int, shared: int) -> float:
    """Share of a multiprocessor's warps that can be resident; 1 KiB of shared memory a block is the system's."""
    most, blocks, memory = MULTIPROCESSOR[target]
    per_warp = -(-registers * 32 // 256) * 256
    fitting = min(blocks, most // warps, 65536 // per_warp // warps, memory // (shared + 1024))
    return fitting * warps / most


def triton_stems() -> list[str]:
    return [stem for stem, operator in by_stem().items() if "triton" in operator.fused]


def triton_kernels() -> Iterator[dict]:
    for stem in triton_stems():
        for case, call in importlib.import_module(f"dti_fast.kernels.{stem}").aot_cases():
            for target in _build.ARCHITECTURES:
                kernels = _aot.compiled(call, target)
                for kernel in kernels:
                    launch = f": {kernel.metadata.name.strip('_').removesuffix('_kernel')}" if len(kernels) > 1 else ""
                    usage = resource_usage(kernel.asm["cubin"])
                    ptx = kernel.asm["ptx"]
                    yield {
                        "op": stem,
                        "case": case + launch,
                        "target": target,
                        "warps": kernel.metadata.num_warps,
                        "registers": usage["REG"],
                        "shared": kernel.metadata.shared,
                        "spilled": usage["LOCAL"] + usage["STACK"],
                        "occupancy": occupancy(target, kernel.metadata.num_warps, usage["REG"], kernel.metadata.shared),
                        "f64": ".f64" in ptx,
                        "accesses": sorted(set(re.findall(r"(?:ld|st)\.global[.\w:]*", ptx))),
                    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", report)}


def native_kernels() -> Iterator[dict]:
    """Registers of the kernels in csrc/cuda, one row per instantiation and target."""
    library = _build.find("cuda") or _build.build("cuda")
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(library)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    target = None
    for line in report.splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            target = int(found[1])
        elif found := re.search(r"Function (\w+?):", line):
            name = found[1]
        elif found := dict(re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)):
            yield {"kernel": _readable(name), "target": target} | {key: int(value) for key, value in found.items()}


def _readable(mangled: str) -> str:
    """Name, of letters and underscores and behind its length, and integer template argument."""
    name = re.search(r"\d([a-z][a-z_]*_kernel)(?:ILi(\d+)E)?", mangled)
    return f"{name[1]}<{name[2]}>" if name[2] else name[1]


def table(rows: list[dict], key: str, cell) -> str:
    lines = [f"| {key} | " + " | ".join(f"sm_{target}" for target in _build.ARCHITECTURES) + " |"]
    lines.append("|---" * (len(_build.ARCHITECTURES) + 1) + "|")
    for name in dict.fromkeys(row[key] for row in rows):
        cells = {row["target"]: cell(row) for row in rows if row[key] == name}
        lines.append(f"| {name} | " + " | ".join(cells[target] for target in _build.ARCHITECTURES) + " |")
    return "\n".join(lines)


def markdown() -> str:
    kernels = list(triton_kernels())
    spilling = sum(row["spilled"] > 0 for row in kernels)
    lines = [f"torch {torch.__version__}, triton {triton.__version__}.  Kernels that spill registers: {spilling}.", ""]
    lines.append("A cell is registers a thread / bytes of shared memory a block / share of the warps resident.")
    for stem in triton_stems():
        lines += ["", f"### {stem}, Triton", ""]
        lines.append(
            table(
                [row for row in kernels if row["op"] == stem],
                "case",
                lambda row: f"{row['registers']} / {row['shared']} / {row['occupancy']:.0%}",
            )
        )
    try:
        native = list(native_kernels())
    except _build.BuildError as error:
        return "\n".join([*lines, "", f"Native CUDA kernels were not compiled: {error}"])
    native.sort(key=lambda row: (row["kernel"].partition("<")[0], len(row["kernel"]), row["kernel"]))
    lines += ["", "### csrc/cuda", ""]
    lines += ["A cell is registers a thread / bytes of shared memory a block, from sm_90 with the system's 1 KiB.", ""]
    lines.append(table(native, "kernel", lambda row: f"{row['REG']} / {row['SHARED']}"))
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--update", type=Path, metavar="FILE")
    options = parser.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET=1 compiles nothing")
    if options.json:
        print(json.dumps(list(triton_kernels())))
    elif options.update:
        update_section(options.update, "Resources", markdown())
    else:
        print(markdown())


if __name__ == "__main__":
    main()
