# SPDX-License-Identifier: Apache-2.0
"""benchmarks/pipeline.py and pipeline_t5.py from end to end on two gloo ranks, as torchrun starts them."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

from lightning_zeroprompt.pipeline.costs import Costs

ROOT = Path(__file__).parents[2]


def run(script, *given):
    """The last line that it prints, read."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    script = [str(ROOT / "benchmarks" / script), "--tiny", "--device", "cpu", *given]
    done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_t5():
    cases = ["limit", "zeropp", "auto-measured"]
    found = run("pipeline_t5.py", "--cases", ",".join(cases))["results"]
    assert [entry["case"] for entry in found] == cases
    assert all(entry["ms"] > 0 and entry["of_limit"] > 0 for entry in found)
    assert len({entry["loss"] for entry in found}) == 1


def test_tiny(tmp_path):
    cases = ["limit", "zeropp-v2", "fsdp-v8", "auto", "lightning:auto", "torch-dualpipev", "torch-zbv", "fsdp2-zero3"]
    given = ["--micro-batches", "2", "--cases", ",".join(cases), "--timeline", str(tmp_path / "timelines")]
    given += ["--save-costs", str(tmp_path / "costs.json")]
    result = run("pipeline.py", "--growth", "10", *given)
    by_case = {entry["case"]: entry for entry in result["results"]}
    assert list(by_case) == cases
    # DualPipeV needs as many micro-batches as there are stages; its error is a result, and the rest runs.
    assert "rank 1: ValueError" in by_case.pop("torch-dualpipev")["error"]
    for entry in by_case.values():
        assert "error" not in entry, entry
        assert entry["ms"] > 0
        assert entry["of_limit"] > 0
        # Untrained, on 64 words; first values are seeded.
        assert abs(entry["loss"] - math.log(64)) < 0.5
        # Live tensors after the first step and after the tenth; a step's own batches may differ by some.
        assert abs(entry["growth_bytes"]) < 0.05 * entry["held_bytes"]
    assert {path.name for path in (tmp_path / "timelines").iterdir()} == {
        f"{name}_m2.{end}" for name in ("zeropp-v2", "fsdp-v8", "auto") for end in ("png", "json")
    }
    costs = Costs.load(tmp_path / "costs.json")
    assert len(costs.blocks) == 18
    for name in ("zeropp-v2", "fsdp-v8", "auto"):
        assert by_case[name]["predicted_ms"] > 0
    assert "predicted_ms" not in by_case["torch-zbv"]
