"""Does a change leave every result as it was?  `python tools/same_results.py REVISION`

Trains a few small runs from the command line, with this working tree and with another revision, and compares what they
wrote: tensors, log lines and pictures bit for bit.  For changes that move code and mean no numbers to change.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

PREVIEW = {"num_validation_images": 1, "validation_prompt": "a {} on grass"}
RUNS = {  # name: the model, and the settings that differ from those of `train_arguments`
    "sd15": ("sd15", {"max_train_steps": 12, **PREVIEW}),
    "sd15-constant-recomputed": ("sd15", {"lr_scheduler": "constant", "recompute": "block", "max_train_steps": 8}),
    "sd15-ti": ("sd15", {"method": "ti", "max_train_steps": 8}),
    "sd15-crossinit": ("sd15", {"method": "crossinit", "max_train_steps": 8}),
    "sd15-adamw": ("sd15", {"optimizer": "adamw", "max_train_steps": 8}),
    "sd21": ("sd21", {"gradient_accumulation_steps": 2, "max_train_steps": 8, **PREVIEW}),
    "sd21-fp16": ("sd21", {"mixed_precision": "fp16", "max_train_steps": 8}),
    "sdxl": ("sdxl", {"initializer_token": "dog cat", "max_train_steps": 12, **PREVIEW}),
    "sdxl-reference": ("sdxl", {"pooling": "reference", "recompute": "geglu", "max_train_steps": 8}),
    "sdxl-lora": ("sdxl", {"lora_rank": 2, "dco_beta": 1000, "train_magnitude": True, "max_train_steps": 8}),
    "sdxl-int8": ("sdxl", {"base_precision": "int8", "max_train_steps": 6}),
    "sdxl-style-rescaled": ("sdxl", {"method": "ti-rescaled", "learnable_property": "style", "max_train_steps": 8}),
    "sdxl-planned": ("sdxl", {"vram": 1, "train_batch_size": 2, "max_train_steps": 6}),
}


def train(tree: Path, arguments: list) -> None:
    environment = {
        **os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "DTI_FAST_BACKEND": "reference",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    command = [sys.executable, "-m", "dti_fast.cli", *map(str, arguments)]
    subprocess.run(command, env=environment, cwd=tree, check=True, capture_output=True)


def contents(folder: Path) -> dict:
    """What a run wrote, in a form that can be compared: the part that does not depend on the clock."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".safetensors":
            found |= {f"{name}:{key}": t.numpy().tobytes() for key, t in load_file(path).items()}
        elif path.suffix == ".png":
            found[name] = Image.open(path).tobytes()
        elif path.suffix == ".jsonl":
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            kept = ("step", "loss", "learning_rate", "angle_degrees", "magnitude")
            found[name] = [{key: line[key] for key in kept} for line in lines]
    return found


def main() -> None:
    from runs import train_arguments, write_pictures
    from tiny import save_tiny_pipeline

    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("revision")
    parser.add_argument("--only", nargs="*", help="names of runs; default: all, and the bundled example")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        other = work / "other"
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", other, arguments.revision], check=True)
        try:
            models = {family: save_tiny_pipeline(family, work / family) for family in ("sd15", "sd21", "sdxl")}
            pictures = write_pictures(work / "pictures")
            bundled = ["train", "--max_train_steps", 20, "--num_validation_images", 1, "--output_dir"]
            different = 0
            for name in arguments.only or [*RUNS, "bundled"]:
                results = []
                for tree in (ROOT, other):
                    out = work / f"{name}-{tree.name}"
                    if name == "bundled":
                        train(tree, [*bundled, out])
                    else:
                        family, settings = RUNS[name]
                        train(tree, train_arguments(models[family], pictures, out, **settings))
                    results.append(contents(out))
                new, old = results
                wrong = [key for key in old if key in new and new[key] != old[key]]
                lost, more = sorted(old.keys() - new.keys()), sorted(new.keys() - old.keys())
                different += bool(wrong or lost)
                words = [f"{len(old) - len(wrong) - len(lost)} results equal"]
                words += [
                    f"{what} {keys}" for what, keys in (("differing", wrong), ("lost", lost), ("new", more)) if keys
                ]
                print(f"{name}: {', '.join(words)}", flush=True)
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", other], check=True)
    sys.exit(f"{different} runs differ" if different else 0)


if __name__ == "__main__":
    main()
