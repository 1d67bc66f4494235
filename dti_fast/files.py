"""Files: written under a temporary name and renamed, read with a clear error."""

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dti_fast.errors import UserError

TEMPORARY = ".tmp"


def hash_tensors(tensors: Iterable[Tensor]) -> str:
    """A short hash of the tensors' values, 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; renamed to `path` afterwards, or deleted if the block raises.

    Raises:
        OSError: that names `path`, if it cannot be written.
    """
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        yield temporary
        os.replace(temporary, path)
    except SafetensorError as error:
        raise OSError(errno.EIO, f"cannot be written ({error})", str(path)) from None
    except OSError as error:
        raise OSError(error.errno, error.strerror or f"cannot be written ({error})", str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def remove_temporary(folder: Path) -> None:
    """Delete what writers that were killed left half-written in `folder`."""
    for suffix in (".safetensors", ".toml", ".jsonl", ".json", ".md", ".png"):
        for path in folder.glob(f"*{suffix}{TEMPORARY}"):
            path.unlink(missing_ok=True)


def write_text(text: str, path: Path) -> None:
    """Write UTF-8 under a temporary name, then rename it; UserError if the text holds a file's name that is no text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        line = text[: error.start].rpartition("\n")[2] + text[error.start :].partition("\n")[0]
        raise UserError(f"{path.name} cannot hold {line!r}, which is not UTF-8: rename that file or folder") from None
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict | None = None) -> None:
    """Write a safetensors file under a temporary name, then rename it; metadata values become JSON strings.

    Equal contents give equal bytes.
    """
    header = {k: v if isinstance(v, str) else json.dumps(v) for k, v in (metadata or {}).items()}
    with replacing(path) as temporary:
        temporary.touch()
        mode = temporary.stat().st_mode  # that of any new file: safetensors would make it readable by its owner alone
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary, metadata=header)
        _sort_header(temporary)
        temporary.chmod(mode)


def _sort_header(path: Path) -> None:
    """Sort the keys of a safetensors header, in place: the library writes metadata in an order that varies."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        entries = {"__metadata__": header.pop("__metadata__", {}), **dict(sorted(header.items()))}
        entries["__metadata__"] = dict(sorted(entries["__metadata__"].items()))
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
        file.seek(8)
        file.write(text.ljust(length))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; UserError if it is none."""
    if not path.is_file():
        raise UserError(f"there is no file {str(path)!r}")
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{str(path)!r} is not a safetensors file ({error})") from None
