"""Run the demo for several seeds and keep a row per seed and model: `python -m bench.demo --seeds 0 1 2`.

With --data DIR the same for TOFU's files. A row holds every metric of results.json's table; the pictures of the
first seed are kept beside the rows. With --backends the first seed once with the compiled kernels and once as where
they were not built: rows of seconds alone, in demo_backends.jsonl.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from bench.rows import RESULTS, environment, write
from unlearn.demo import run_demo
from unlearn_kernels import native

BACKENDS = ("native", "torch")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data", help="TOFU's files instead of the invented corpus")
    parser.add_argument("--out", help="keep the reports here, one folder per seed")
    parser.add_argument(
        "--backends", action="store_true", help="the demo's wall time with and without compiled kernels"
    )
    args = parser.parse_args()
    if args.backends:
        return backends(args.seeds[0])
    case = "tofu" if args.data else "demo"
    shared = environment()
    for folder in (args.data, args.out):  # where things lie on this machine is nobody's business
        if folder:
            shared["command"] = shared["command"].replace(folder, "DIR")
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in args.seeds:
            start = time.perf_counter()
            out = Path(args.out or scratch) / f"{case}-{seed}"
            results = run_demo(out, data=Path(args.data) if args.data else None, seed=seed)
            wall = round(time.perf_counter() - start, 1)
            for entry in results["models"]:
                rows.append({"case": case, "seed": seed, "model": entry["name"], **entry["metrics"], "wall_s": wall})
            path = write(case, [{**row, **shared} for row in rows])
            if seed == args.seeds[0]:
                for picture in ("plane", "logprobs"):
                    shutil.copyfile(out / f"{picture}.png", RESULTS / f"{case}-{picture}.png")
    print(f"{len(rows)} rows in {path.name}")
    return 0


def backends(seed: int) -> int:
    """A row per backend and model."""
    if not native.load():
        print("the native library is not built: nothing to compare")
        return 1
    shared, rows = environment(), []
    for name in BACKENDS:
        without = mock.patch.object(native, "load", lambda: False) if name == "torch" else contextlib.nullcontext()
        start = time.perf_counter()
        with tempfile.TemporaryDirectory() as scratch, without:
            results = run_demo(Path(scratch), data=None, seed=seed)
        wall = round(time.perf_counter() - start, 1)
        for entry in results["models"]:
            seconds = entry["metrics"]["seconds"]
            rows.append({"case": "demo_backends", "backend": name, "seed": seed, "model": entry["name"],
                         "seconds": seconds, "wall_s": wall, **shared})  # fmt: skip
    print(f"{len(rows)} rows in {write('demo_backends', rows).name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
