# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a program of its own, with a few steps."""

import functools
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FAST = {
    "drop_in.py": ["--steps", "4"],
    "hf_causal.py": ["--steps", "2"],
    "own_tasks.py": ["--steps", "5"],
    "t5_pipeline.py": ["--steps", "2"],
}
PRINTS = {
    # float32 on both sides; the order of sums differs
    "drop_in.py": r"(step \d: loss (\d\.\d{3})\d on one process, \2\d on a pipeline of two\n){4}"
    r"largest difference: \de-0[5-9]\n",
    "hf_causal.py": r"^loss of the first step 3\.\d{3}, of the last \d\.\d{3}\n$",
    "own_tasks.py": r"before training: 'sort' [01]\.\d\d of 60 right \(chance 0\.33\)\n"
    r"after training: 'sort' [01]\.\d\d of 60 right .*\n"
    r"Give the kind: a heavy old owl -> ",
    "t5_pipeline.py": r"loss of the first step (\d\.\d{3}), of the last (\d\.\d{3})\n"
    r"\d+ tasks never seen: score [01]\.\d\d \([01]\.\d\d to [01]\.\d\d\)\n",
}


def run(name, *arguments, folder):
    line = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == FAST.keys() == PRINTS.keys()


@functools.cache
def fast(name):
    """What an example prints with a few steps."""
    with tempfile.TemporaryDirectory() as folder:
        printed = run(name, *FAST[name], folder=folder)
        # What an example makes, it makes in a temporary folder.
        assert not list(Path(folder).iterdir())
    return printed


@pytest.mark.parametrize("name", sorted(FAST))
def test_example_runs(name):
    assert re.search(PRINTS[name], fast(name))


def test_t5_learns_the_same_without_a_pipeline(tmp_path):
    printed = run("t5_pipeline.py", *FAST["t5_pipeline.py"], "--strategy", "auto", folder=tmp_path)
    alone, cut = (re.search(PRINTS["t5_pipeline.py"], text).groups() for text in (printed, fast("t5_pipeline.py")))
    # Three digits are printed.
    for one, other in zip(alone, cut, strict=True):
        assert abs(float(one) - float(other)) < 2e-3


@pytest.mark.slow
def test_own_tasks_learns_the_held_out_task(tmp_path):
    printed = run("own_tasks.py", folder=tmp_path)
    (score,) = re.findall(r"after training: 'sort' (\S+)", printed)
    assert float(score) > 0.6, printed
