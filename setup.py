"""Ships csrc/ inside the package, compiled for the CPU where that is possible; all else is in pyproject.toml.

A wheel holds the CPU library when torch's headers and a compiler are at hand (seconds), and the CUDA library with
DTI_FAST_CUDA=1 and nvcc (a minute).  Otherwise, and for an editable install, `python -m dti_fast.ops._build` or the
first use that needs it compiles.  Nothing here imports torch, and no failure of a compiler fails the installation.
"""

import importlib.util
import os
import shutil
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent


def compile_native() -> list[Path]:
    specification = importlib.util.spec_from_file_location("dti_fast_build", ROOT / "dti_fast/ops/_build.py")
    build = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(build)
    libraries = []
    for part in ("cpu", "cuda") if os.environ.get("DTI_FAST_CUDA") == "1" else ("cpu",):
        try:
            libraries.append(build.build(part, ROOT / "build/native"))
            print(f"dti-fast: compiled the {part} kernels of csrc/", file=sys.stderr)
        except (build.BuildError, OSError) as error:
            print(f"dti-fast: the {part} kernels of csrc/ wait for their first use: {error}", file=sys.stderr)
    return libraries


LIBRARIES = compile_native() if "bdist_wheel" in sys.argv else []


class PlatformDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return bool(LIBRARIES)


class BuildWithSources(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            package = Path(self.build_lib) / "dti_fast"
            for name in ("csrc", "lib"):
                shutil.rmtree(package / name, ignore_errors=True)  # of an earlier build
            shutil.copytree(ROOT / "csrc", package / "csrc")
            for library in LIBRARIES:
                (package / "lib").mkdir(exist_ok=True)
                shutil.copy2(library, package / "lib")


class AnyPythonWheel(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])  # the library uses no Python


setup(distclass=PlatformDistribution, cmdclass={"build_py": BuildWithSources, "bdist_wheel": AnyPythonWheel})
