"""Short runs give the numbers that version 0.1 gave; `tools/same_results.py` compares two versions bit for bit."""

import json

import pytest
import torch
from safetensors.torch import load_file

from dti_fast import Session, TrainConfig

# Of commit 2438958: losses after steps 10 and 12, final angles in degrees, the first three elements of each vector.
NUMBERS = {
    "sd15": (
        [1.1560421, 1.1465417], [9.9228401], [[0.0043064565, 0.0253315195, 0.0169710442]],
    ),
    "sd21": (
        [0.5405281, 0.5294909], [8.3217993], [[-0.0123211396, 0.0189079829, -0.0039649727]],
    ),
    "sdxl": (
        [1.1597663, 1.1231098], [5.8167520, 10.7339191],
        [[0.0303567313, -0.0041710567, 0.0186747089], [-0.0232372042, -0.0054275333, 0.0085741095]],
    ),
    "pocket": (
        [0.5288770, 0.6346222], [10.9856062], [[0.0086949011, 0.0164664034, -0.0149703734]],
    ),
}  # fmt: skip


@pytest.mark.parametrize("family", NUMBERS)
def test_short_run(family, tiny_pipelines, pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("DTI_FAST_BACKEND", "reference")
    settings = {"output_dir": tmp_path, "max_train_steps": 12, "num_validation_images": 0}
    if family != "pocket":
        settings |= {"train_data_dir": pictures, "placeholder_token": "<toy>", "initializer_token": "dog"}
    with Session(str(tiny_pipelines.get(family, "pocket")), device="cpu") as session:
        result = session.learn(TrainConfig(**settings))
    losses, angles, vectors = NUMBERS[family]
    logs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [log["loss"] for log in logs] == pytest.approx(losses, rel=1e-4)  # another CPU rounds otherwise
    assert result.angle_degrees == pytest.approx(angles, abs=0.01)
    files = [path for path in result.embedding_paths if path.name.startswith("learned_embeds")]
    for path, expected in zip(files, vectors, strict=True):
        learned = next(iter(load_file(path).values()))
        torch.testing.assert_close(learned[0, :3], torch.tensor(expected), rtol=1e-3, atol=1e-6)
