"""Shared fixtures."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


@pytest.fixture(scope="session")
def tiny_pipelines(tmp_path_factory):
    """Folders of random-weight pipelines in the layouts of SD 1.5, SD 2.1 and SDXL."""
    from tiny import save_tiny_pipeline

    folder = tmp_path_factory.mktemp("pipelines")
    return {family: save_tiny_pipeline(family, folder / family) for family in ("sd15", "sd21", "sdxl")}


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of three training pictures."""
    from runs import write_pictures

    return write_pictures(tmp_path_factory.mktemp("pictures"))
