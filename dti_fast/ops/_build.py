"""Compiles csrc/ into one library for the CPU and one for CUDA: `python -m dti_fast.ops._build [cpu] [cuda]`.

The libraries use torch's stable ABI and no Python, so that one build serves every Python and every torch from 2.10.
Their names carry a hash of all that goes into them: a stale one is never loaded.  Standard library only, because
setup.py runs this file where torch cannot be imported.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

PARTS = {"cpu": ("cpu",), "cuda": ("cpu", "cuda")}  # device -> libraries; the first one defines the ops
ARCHITECTURES = (80, 86, 89, 90, 120)
_COMMON = ("-std=c++17", "-O3", "-DTORCH_TARGET_VERSION=0x020a000000000000")
_HOST = ("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra")
# What the compilers read besides their arguments.
_ENVIRONMENT = ("CPATH", "CPLUS_INCLUDE_PATH", "LIBRARY_PATH", "NVCC_CCBIN", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS")
_failures: dict[Path, str] = {}  # of this process, should a note not be writable


class BuildError(RuntimeError):
    """The library cannot be built here; the message says why."""


def find(part: str) -> Path | None:
    """The built library, from the installed package or from the cache."""
    for directory in (_package() / "lib", cache_directory()):
        path = directory / file_name(part)
        if path.exists():
            return path
    return None


def build(part: str, directory: Path | None = None) -> Path:
    """Compile `part` into `directory`, by default the cache, and return the library's path.

    Raises:
        BuildError: without a compiler or torch's headers, when the compiler fails, which `failure` remembers, or for a
            directory that cannot be written.
    """
    directory = directory or cache_directory()
    target, note = directory / file_name(part), _note(part, directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # The rename is atomic: of two processes that build at once neither sees half a library.
        with tempfile.TemporaryDirectory(dir=directory) as scratch:
            output = Path(scratch) / target.name
            command = _command(part, output)
            result = subprocess.run(command, capture_output=True, text=True)
            if result.returncode:
                message = _message(command, result.stderr.strip())
                if result.returncode > 0:  # and was not killed
                    _failures[note] = message
                    (Path(scratch) / note.name).write_text(message)
                    os.replace(Path(scratch) / note.name, note)
                raise BuildError(message)
            os.replace(output, target)
    except OSError as error:
        raise BuildError(f"cannot build in {directory}: {error}") from error
    _failures.pop(note, None)
    note.unlink(missing_ok=True)
    return target


def failure(part: str) -> str | None:
    """What the compiler said when it last failed to build `part` into the cache, or None.

    That is noted for the sources, the command, the compilers and the torch of then: once one of them is another, it is
    as if nothing had been tried.  `build` always tries.

    Raises:
        BuildError: without a compiler or torch's headers.
    """
    note = _note(part, cache_directory())
    return _failures.get(note) or (note.read_text() if note.exists() else None)


def cache_directory() -> Path:
    """`$DTI_FAST_CACHE`, or dti-fast's folder in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("DTI_FAST_CACHE") or Path(base) / "dti-fast")


def file_name(part: str) -> str:
    settings = (_COMMON, _HOST, ARCHITECTURES, sys.platform, platform.machine())
    ingredients = hashlib.sha256(repr(settings).encode())
    for path in (*sorted(source_directory().glob("*.h")), *sources(part)):
        ingredients.update(path.read_bytes())
    return f"dti_fast_C_{part}-{ingredients.hexdigest()[:16]}.so"


def source_directory() -> Path:
    """csrc/, of the checkout or of the installed package."""
    for directory in (_package() / "csrc", _package().parent / "csrc"):
        if (directory / "dti_math.h").exists():
            return directory
    raise BuildError("csrc/ is missing from this installation")


def sources(part: str) -> list[Path]:
    directory = source_directory()
    if part == "cuda":
        return sorted(directory.glob("cuda/*.cu"))
    return [directory / "register.cpp", *sorted(directory.glob("cpu/*.cpp"))]


def host_compiler() -> str:
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next(filter(None, (shutil.which(name) for name in names if name)), None)
    if compiler is None or sys.platform == "win32":
        raise BuildError("no gcc or clang found")
    return compiler


def cuda_compiler() -> str:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    compiler = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if compiler is None:
        raise BuildError("no nvcc found")
    return compiler


def torch_directory() -> Path:
    """Where torch is installed; it need not be importable, as under pip's build isolation."""
    specification = importlib.util.find_spec("torch")
    roots = [Path(specification.origin).parent] if specification and specification.origin else []
    roots += [Path(sysconfig.get_path(name)) / "torch" for name in ("purelib", "platlib")]
    for root in roots:
        if (root / "include/torch/csrc/stable/library.h").exists():
            return root
    raise BuildError("no torch with headers of the stable ABI found")


def torch_has_cuda() -> bool:
    version = (torch_directory() / "version.py").read_text()
    return re.search(r"^cuda\b[^=]*= *'", version, re.MULTILINE) is not None


def _command(part: str, output: Path) -> list[str]:
    torch = torch_directory()
    # libtorch pulls in libtorch_cuda where there is one, so that one command serves both builds of torch.
    link = [f"-L{torch / 'lib'}", "-Wl,--no-as-needed" if sys.platform == "linux" else "", "-ltorch", "-ltorch_cpu"]
    files = [str(path) for path in sources(part)]
    include = [f"-I{source_directory()}", "-isystem", str(torch / "include")]
    if part == "cpu":
        command = [host_compiler(), "-shared", *_COMMON, *_HOST, *include, *files, *link, "-o", str(output)]
    else:
        compiler = cuda_compiler()
        known = subprocess.run([compiler, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
        targets = [number for number in ARCHITECTURES if f"compute_{number}" in known]
        code = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in targets]
        code.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
        host = [f"-Xcompiler={flag}" for flag in _HOST]
        linker = [flag.replace("-Wl,", "-Xlinker=") for flag in link]
        command = [
            compiler,
            "-shared",
            "-DUSE_CUDA",
            *_COMMON,
            *host,
            *code,
            *include,
            *files,
            *linker,
            "-o",
            str(output),
        ]
    return [word for word in command if word]


def _note(part: str, directory: Path) -> Path:
    command = _command(part, Path("output"))
    ingredients = hashlib.sha256(repr((command, [os.environ.get(name) for name in _ENVIRONMENT])).encode())
    for tool in (command[0], *filter(None, map(shutil.which, ("c++", "g++")))):
        status = os.stat(tool)
        ingredients.update(repr((os.path.realpath(tool), status.st_size, status.st_mtime_ns)).encode())
    ingredients.update((torch_directory() / "version.py").read_bytes())
    return directory / f"{Path(file_name(part)).stem}-{ingredients.hexdigest()[:16]}.failed"


def _message(command: list[str], said: str) -> str:
    """The first error, then all that the compiler said."""
    lines = said.splitlines() or ["it said nothing"]
    first = next((line for line in lines if re.search(r"\berror\b", line)), lines[-1])
    return f"{Path(command[0]).name}: {first}\n{' '.join(command)} failed:\n{said}"


def _package() -> Path:
    return Path(__file__).parents[1]


def main(parts: list[str]) -> int:
    if not parts:
        parts = ["cpu", "cuda"] if torch_has_cuda() or os.environ.get("DTI_FAST_CUDA") == "1" else ["cpu"]
    for part in parts:
        try:
            print(find(part) or build(part))
        except BuildError as error:
            print(f"{part}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
