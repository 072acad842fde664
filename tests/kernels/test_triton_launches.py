"""Which binaries training loads, from recorded launches (bench/launches.py): few for batches of any size, and none in a
CUDA graph's capture that its warm-up has not loaded.

Recorded in a process of its own, where triton does not interpret.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

pytest.importorskip("triton")
ROOT = pathlib.Path(__file__).parents[2]

RECORD = """
import json
from unittest import mock

import torch

import unlearn_kernels as uk
from bench.launches import recording
from unlearn_kernels import triton_tuning

TARGET = "sm_90"


def keys(num_rows, *, capturable=False, capturing=False, workspace=None, plan="fused", vocab=32000, width=2048, lora=0,
         int32=False, first=0):
    boundaries = sorted({0, 1, num_rows // 3, num_rows})
    with recording(TARGET, boundaries) as (record, _), triton_tuning.force(plan):
        capture = mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing)
        bf16 = {"dtype": torch.bfloat16}
        hidden = torch.empty(first + num_rows, width, **bf16)[first:].requires_grad_()
        weight = torch.empty(vocab, width, requires_grad=True, **bf16)
        targets = torch.empty(first + num_rows, dtype=torch.int64)[first:]
        cu = torch.empty(len(boundaries), dtype=torch.int32 if int32 else torch.int64)
        head = {"options": uk.Options(workspace_bytes=workspace, backend="triton", capturable=capturable)}
        if lora:
            a, b = torch.empty(lora, width, **bf16), torch.empty(vocab, lora, **bf16)
            head["lora"] = (a.requires_grad_(), b.requires_grad_(), 2.0)
        ref = torch.empty(len(boundaries) - 1, dtype=torch.float64)
        with capture:
            with torch.no_grad():
                uk.sequence_logprobs(hidden, weight, targets, cu, **head)
            uk.npo_loss(hidden, weight, targets, cu, ref, beta=0.1, **head).backward()
    return [launch.key() for launch in record.launches]


steps = {}
SIZES = [4096, 4095, 3001, 2048, 1025, 1000, 777, 512, 130, 64, 17, 1]
for name, more in {
    "kept": {},
    "chunks": {"workspace": 64 << 20},
    "chunks of a slice": {"workspace": 64 << 20, "first": 3},
    "LoRA": {"lora": 16},
    "library": {"plan": "library"},
    "odd vocabulary": {"vocab": 50257, "workspace": 96 << 20},
}.items():
    found = [set(keys(size, **more)) for size in SIZES]
    steps[name] = [len(found[0]), len(set().union(*found))]

captures = {}
for workspace in (None, 64 << 20):
    for int32 in (False, True):
        shape = {"workspace": workspace, "int32": int32}
        captured = keys(3001, capturing=True, **shape)
        captures[f"{'kept' if workspace is None else 'beyond the workspace'}{', int32' if int32 else ''}"] = {
            "launches": len(captured),
            "new": len(set(captured) - set(keys(3001, capturable=True, **shape))),
            "as warmed up": captured == keys(3001, capturable=True, **shape),
            "as by default": captured == keys(3001, **shape),
            "with the option too": captured == keys(3001, capturing=True, capturable=True, **shape),
        }
print(json.dumps({"steps": steps, "captures": captures}))
"""


@pytest.fixture(scope="module")
def recorded():
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", RECORD]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_batches_of_twelve_sizes_load_hardly_more_than_one(recorded):
    for name, (one, twelve) in recorded["steps"].items():
        assert twelve <= min(18, one + 2), f"{name}: {one} binaries for one batch, {twelve} for twelve"


def test_a_capture_launches_what_its_warm_up_has_launched(recorded):
    for name, found in recorded["captures"].items():
        assert found["launches"] > 10, name
        assert found["new"] == 0 and found["as warmed up"] and found["with the option too"], name
        assert found["as by default"] == name.startswith("kept"), name
