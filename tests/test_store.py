"""Counts that are kept: those that are shipped are right, and others are made once."""

import pytest
import torch

from dti_fast.memory import store
from dti_fast.memory.estimator import Estimator


@pytest.fixture(autouse=True)
def own_cache(own_store, tmp_path, monkeypatch):
    """The real store, in a folder of this test."""
    monkeypatch.setattr(store, "read", own_store.read)
    monkeypatch.setattr(store, "write", own_store.write)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_shipped_counts_are_what_is_counted(monkeypatch):
    kept = Estimator("sd15", torch.bfloat16, batch=1, resolution=512)
    known = kept.count("geglu", 1), kept.model
    assert not list(store._path("x").parent.glob("*.json"))  # shipped, so nothing was counted
    monkeypatch.setattr(store, "read", lambda key: None)
    anew = Estimator("sd15", torch.bfloat16, batch=1, resolution=512)
    assert (anew.count("geglu", 1), anew.model) == known


@pytest.mark.parametrize("model", ["sd15", "sd21", "sdxl"])
def test_known_models_are_planned_without_counting(model, monkeypatch):
    monkeypatch.setattr(Estimator, "_backbone", property(lambda self: pytest.fail("a model was built")))
    plan = Estimator(model, torch.bfloat16, batch=4).choose(["bf16", "int8", "nf4"], 12 * 2**30)
    assert plan.fits(12 * 2**30)


def test_a_count_is_made_once_for_a_configuration(tiny_pipelines, tmp_path, monkeypatch):
    def estimate(family):
        return Estimator(str(tiny_pipelines[family]), torch.float32, batch=1, resolution=64).count("none", 1)

    first = estimate("sd15")
    files = set(tmp_path.rglob("*.json"))
    assert any("counts" in str(path) for path in files)
    monkeypatch.setattr(Estimator, "_count_pass", lambda *_: pytest.fail("counted again"))
    assert estimate("sd15") == first
    with pytest.raises(pytest.fail.Exception, match="counted again"):
        estimate("sd21")  # another configuration


def test_a_damaged_or_forbidden_cache_is_none(tiny_pipelines, tmp_path, monkeypatch):
    store.write("key", [1, 2])
    assert store.read("key") == [1, 2]
    store._path("key").write_text("[1,")
    assert store.read("key") is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    store.write("key", [1])  # nothing can be written there
    assert store.read("key") is None
