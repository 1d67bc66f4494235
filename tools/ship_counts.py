"""Count the models that most people train, for dti_fast/memory/counts.json.gz: `python tools/ship_counts.py`

Takes an hour of one core.  A test counts some of them anew and compares.
"""

import gzip
import json
import os
import sys
import tempfile
import time

import torch

from dti_fast.memory import store
from dti_fast.memory.estimator import Estimator
from dti_fast.memory.plan import MODES

RESOLUTIONS = {"sd15": (512, 768), "sd21": (512, 768), "sdxl": (512, 768, 1024)}
BATCHES = (1, 2, 4)
DTYPES = (torch.bfloat16, torch.float16)


def main() -> None:
    counts = dict(store.shipped()) if "--more" in sys.argv else {}
    store.read = counts.get  # neither the present counts nor a cache
    store.write = counts.__setitem__
    for model, resolutions in RESOLUTIONS.items():
        for dtype in DTYPES:
            for resolution in (None, *resolutions):
                began = time.process_time()
                estimator = Estimator(model, dtype, batch=1, resolution=resolution)
                if resolution is None:
                    estimator.resolution  # noqa: B018
                    continue
                estimator.model  # noqa: B018
                for batch in BATCHES:
                    for mode in MODES:
                        estimator.count(mode, batch)
                print(model, dtype, resolution, f"{time.process_time() - began:.0f} s, {len(counts)}", flush=True)
                save(counts)


def save(counts: dict) -> None:
    content = json.dumps(dict(sorted(counts.items())), separators=(",", ":")).encode()
    with tempfile.NamedTemporaryFile(dir=store.SHIPPED.parent, delete=False) as file:
        file.write(gzip.compress(content, mtime=0))
    os.chmod(file.name, 0o644)
    os.replace(file.name, store.SHIPPED)


if __name__ == "__main__":
    main()
