# SPDX-License-Identifier: Apache-2.0
"""Every example runs as a program of its own, with a few steps."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
FAST = {
    "drop_in.py": ["--steps", "4"],
    "hf_causal.py": ["--steps", "2"],
    "own_tasks.py": ["--steps", "5"],
}
PRINTS = {
    # float32 on both sides; the order of sums differs
    "drop_in.py": r"(step \d: loss (\d\.\d{3})\d on one process, \2\d on a pipeline of two\n){4}"
    r"largest difference: \de-0[5-9]\n",
    "hf_causal.py": r"^loss of the first step 3\.\d{3}, of the last \d\.\d{3}\n$",
    "own_tasks.py": r"before training: 'sort' [01]\.\d\d of 60 right \(chance 0\.33\)\n"
    r"after training: 'sort' [01]\.\d\d of 60 right .*\n"
    r"Give the kind: a heavy old owl -> ",
}


def run(name, *arguments, folder):
    line = [sys.executable, str(EXAMPLES / name), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == FAST.keys() == PRINTS.keys()


@pytest.mark.parametrize("name", sorted(FAST))
def test_example_runs(name, tmp_path):
    assert re.search(PRINTS[name], run(name, *FAST[name], folder=tmp_path))
    # What an example makes, it makes in a temporary folder.
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_own_tasks_learns_the_held_out_task(tmp_path):
    printed = run("own_tasks.py", folder=tmp_path)
    (score,) = re.findall(r"after training: 'sort' (\S+)", printed)
    assert float(score) > 0.6, printed
