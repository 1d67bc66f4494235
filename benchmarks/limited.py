"""`dti-fast` in a process that may have so much of a GPU: `python -m benchmarks.limited GIB REPORT train ...`.

Everything beyond the first GIB is out of reach of PyTorch's allocator, as on a smaller card; the driver's context
is not in that number.  Afterwards REPORT, a JSON file, has what was reserved and what the driver says is free.
"""

import json
import sys
from pathlib import Path

import torch

from dti_fast.cli import main as dti_fast
from dti_fast.memory.plan import GIB


def main() -> None:
    limit, report = float(sys.argv[1]) * GIB, Path(sys.argv[2])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.mem_get_info()[1])
    sys.argv[1:] = sys.argv[3:]
    try:
        dti_fast()
    finally:
        if cuda:
            free, total = torch.cuda.mem_get_info()
            peaks = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
            names = ("free_gib", "total_gib", "peak_allocated_gib", "peak_reserved_gib")
            numbers = dict(zip(names, (n / GIB for n in (free, total, *peaks)), strict=True))
            report.write_text(json.dumps(numbers | {"device": torch.cuda.get_device_name()}))


if __name__ == "__main__":
    main()
