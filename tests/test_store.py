"""Counts that are kept: for the next estimator of the same configuration, and for no other."""

import json

import pytest
import torch

from dti_fast.memory import estimator as estimator_module
from dti_fast.memory import store
from dti_fast.memory.estimator import Estimator


@pytest.fixture
def cache(tmp_path, monkeypatch, own_store):
    """A folder in place of the user's cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(store, "read", own_store.read)
    monkeypatch.setattr(store, "write", own_store.write)
    return tmp_path / "dti-fast" / "counts"


def step(model, dtype=torch.float32, batch=1, resolution=64):
    return Estimator(str(model), dtype, batch=batch, resolution=resolution, modes=("none",)).count("none", batch)


@pytest.fixture
def counted(monkeypatch):
    """Notes the models that are put together to be counted."""
    made, skeleton = [], estimator_module.skeleton
    monkeypatch.setattr(estimator_module, "skeleton", lambda *of: made.append(of) or skeleton(*of))
    return made


def test_the_same_is_counted_once(tiny_pipelines, cache, counted):
    model = tiny_pipelines["sd15"]
    first = step(model)
    assert len(counted) == 1
    assert step(model) == first
    assert len(counted) == 1
    others = [
        step(model, torch.bfloat16),
        step(model, batch=2),
        step(model, resolution=128),
        step(tiny_pipelines["sd21"]),
    ]
    assert len(counted) == 5
    assert all(other != first for other in others)


def test_another_version_counts_anew(tiny_pipelines, cache, counted, monkeypatch):
    first = step(tiny_pipelines["sd15"])
    monkeypatch.setattr(store, "version", lambda package: "0")
    assert step(tiny_pipelines["sd15"]) == first
    assert len(counted) == 2


def test_a_damaged_or_forbidden_cache_is_none(tiny_pipelines, cache, counted):
    first = step(tiny_pipelines["sd15"])
    for path in cache.iterdir():
        assert json.loads(path.read_text())
        path.write_text("{")
    assert step(tiny_pipelines["sd15"]) == first
    assert len(counted) == 2
    for path in cache.iterdir():
        path.unlink()
    cache.rmdir()
    cache.touch()  # a file where the folder would be
    assert step(tiny_pipelines["sd15"]) == first
    assert len(counted) == 3
