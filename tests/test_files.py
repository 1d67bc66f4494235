"""Files that are written whole or not at all."""

import resource

import pytest
import torch
from PIL import Image

from dti_fast.drawing import save_picture
from dti_fast.files import read_tensors, remove_temporary, replacing, write_tensors, write_text


@pytest.fixture
def small_files():
    """A limit of 4 kB on every file that this process writes; the operating system refuses as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


WRITERS = {
    "x.safetensors": lambda path: write_tensors({"x": torch.zeros(4096)}, path),
    "x.toml": lambda path: write_text("x" * 8192, path),
    "x.png": lambda path: save_picture(Image.effect_noise((128, 128), 64), path),
}


@pytest.mark.parametrize("name", WRITERS)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(small_files, tmp_path, name):
    path = tmp_path / name
    path.write_text("old")
    with pytest.raises(OSError, match=name) as raised:
        WRITERS[name](path)
    assert raised.value.filename == str(path)
    assert [p.name for p in tmp_path.iterdir()] == [name]
    assert path.read_text() == "old"


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["x.txt"]
    assert path.read_text() == "old"


def test_written_tensors_come_back_and_others_may_read_them(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors({"x": torch.arange(3.0)}, path, {"steps": 3, "token": "<x>"})
    tensors, header = read_tensors(path)
    assert torch.equal(tensors["x"], torch.arange(3.0))
    assert header == {"steps": "3", "token": "<x>"}
    (tmp_path / "new").touch()
    assert path.stat().st_mode == (tmp_path / "new").stat().st_mode


def test_only_our_own_leftovers_are_removed(tmp_path):
    names = ("checkpoint-000017.safetensors.tmp", "log.jsonl.tmp", "notes.tmp", "a.png")
    for name in names:
        (tmp_path / name).touch()
    remove_temporary(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "notes.tmp"]
