"""Counts that have been made before: shipped with the package for the models that most people train, else in a cache.

A count depends on a model's configuration alone, and not on the device.  The key of a shipped count is made of that
configuration and of what was counted; that of a cached one also of the versions that could change it.
"""

import gzip
import hashlib
import json
import os
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch

from dti_fast import __version__
from dti_fast.files import write_text

SHIPPED = Path(__file__).parent / "counts.json.gz"  # made by tools/ship_counts.py
_DECISIVE = ("torch", "diffusers", "transformers")


def model_key(folder: str | Path, dtype: torch.dtype) -> str | None:
    """What tells the configuration of a diffusers folder from others, in `dtype`; None for one that is not local.

    Names and versions in the files, which begin with an underscore, play no part.
    """
    folder = Path(folder)
    if not (folder / "model_index.json").is_file():
        return None
    digest = hashlib.sha256()
    for path in [*sorted(folder.glob("*/config.json")), folder / "model_index.json"]:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return None
        if not isinstance(content, dict):
            return None
        if path.parent.name.startswith(("scheduler", "safety_checker", "feature_extractor", "tokenizer")):
            continue
        kept = {key: value for key, value in content.items() if not key.startswith("_")}
        digest.update(f"{path.relative_to(folder).as_posix()} {json.dumps(kept, sort_keys=True)}".encode())
    return f"{digest.hexdigest()[:16]} {str(dtype).removeprefix('torch.')}"


@cache
def shipped() -> dict[str, list | int]:
    """All counts that come with the package, by key."""
    return json.loads(gzip.decompress(SHIPPED.read_bytes())) if SHIPPED.is_file() else {}


def read(key: str) -> list | int | None:
    """What was counted under `key`, or None."""
    found = shipped().get(key)
    if found is None:
        try:
            found = json.loads(_path(key).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
    return found


def write(key: str, value: list | int) -> None:
    """Keep a count for the next time; a cache that cannot be written is none."""
    path = _path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(json.dumps(value), path)
    except OSError:
        return


def _path(key: str) -> Path:
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    versions = " ".join(version(package) for package in _DECISIVE)
    name = hashlib.sha256(f"{__version__} {versions} {key}".encode()).hexdigest()[:24]
    return root / "dti-fast" / "counts" / f"{name}.json"
