"""How long a reference's fingerprint takes, beside SHA-256 of the same bytes. One core.

python benchmarks/fingerprint.py [--mib 512]
"""

from __future__ import annotations

import argparse
import hashlib
import time

import torch

from refkl.backend import Whole
from refkl.reference.weights.fingerprint import content_sum


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=512, help="of weights")
    mib = parser.parse_args().mib
    torch.set_num_threads(1)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn((mib << 20) // dtype.itemsize).to(dtype)
        content_sum(weight[: 1 << 20], Whole(torch.Size((1 << 20,))))  # its keys are made once
        ways = {
            "refkl": lambda w=weight: content_sum(w, Whole(w.shape)),
            "SHA-256": lambda w=weight: hashlib.sha256(w.view(torch.uint8).numpy().data).hexdigest(),
            "a copy": lambda w=weight: w.clone(),
        }
        for name, way in ways.items():
            times = []
            for _ in range(3):
                start = time.perf_counter()
                way()
                times.append(time.perf_counter() - start)
            print(f"{dtype!s:16} {name:8} {sorted(times)[1] * 1000 / (mib * 1.048576):.2f} s per GB")


if __name__ == "__main__":
    main()
