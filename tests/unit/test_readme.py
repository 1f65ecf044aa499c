# SPDX-License-Identifier: Apache-2.0
"""The README's commands and programs run: `make` as far as what it would run, everything else for a few steps.

Python blocks and bash lines are taken from the file as they stand; the tables below are all that is changed in them.
"""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lightning_zeroprompt.cli import train as program

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]

# Appended to a command; a later argument wins over an earlier one.
FEW = (
    "trainer.max_steps=2 trainer.val_check_interval=2 trainer.accelerator=cpu data.rows_per_batch=2 callbacks=none "
    "data.options.examples_per_task=10 data.compile.heldout_fraction=0.2 eval.examples_per_task=1 "
    "eval.fit_examples_per_task=1 eval.templates_per_task=1 eval.instance_tasks=4 eval.levels=[category,instance]"
)
APPENDED = {"zeroprompt-train": FEW, "zeroprompt-data compile": "--examples-per-task 10"}
# Servers, and what test_make_* looks at.
NOT_RUN = ("tensorboard", "make", "git", "cd", "pip")
REPLACED = [(r"\bsteps=\d+", "steps=2"), (r"\bmax_steps=\d+", "max_steps=2")]


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)


LINES = [
    line.split("#")[0].strip()
    for block in blocks("bash")
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("#")
]


def run(line, monkeypatch):
    """Run a console script in this process, as the entry point that pyproject.toml names."""
    name, *arguments = shlex.split(line)
    module, function = SCRIPTS[name].split(":")
    extra = next((text for start, text in APPENDED.items() if line.startswith(start)), "")
    monkeypatch.setattr(sys, "argv", [name, *arguments, *shlex.split(extra)])
    getattr(importlib.import_module(module), function)()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where all lines run one after another, as a reader would run them."""
    return tmp_path_factory.mktemp("readme")


def test_there_is_something_to_run():
    assert {"make train", "make test"} <= set(LINES)
    assert blocks("python")
    known = (*SCRIPTS, *NOT_RUN)
    assert all(line.split()[0] in known for line in LINES)


def planned(target):
    """The commands that make would run with .venv ready."""
    if shutil.which("make") is None:
        pytest.skip("make is not installed; install it with the system's packages")
    # Under `make test` this is a nested make: its inherited flags would add lines about the folder that it is in.
    alone = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    done = subprocess.run(["make", "-n", target], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.replace("\\\n", " ").splitlines()


def test_make_train_runs_the_demo(folder, monkeypatch):
    (line,) = [line for line in planned("train") if "zeroprompt-train" in line]
    assert line.startswith(".venv/bin/zeroprompt-train")
    monkeypatch.chdir(folder)
    run(line.removeprefix(".venv/bin/"), monkeypatch)
    (results,) = folder.glob("runs/train/*/results.json")
    assert json.loads(results.read_text(encoding="utf-8"))["num_tasks"] == 1000


def test_make_test_runs_all_but_slow_and_gpu_tests():
    line = planned("test")[-1]
    assert line.startswith(".venv/bin/python -m pytest")
    assert '-m "not slow and not gpu"' in line
    assert not [part for part in shlex.split(line) if part.startswith(("tests", "--ignore", "-k"))]


@pytest.mark.parametrize(
    "line",
    [
        # test_conf.py runs a sweep of as many jobs among the fast tests.
        pytest.param(line, marks=pytest.mark.slow if " -m " in line else ())
        for line in LINES
        if line.split()[0] not in NOT_RUN
    ],
)
def test_bash_line_runs(line, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    before = set(folder.rglob("results.json"))
    if line.split()[0] == "zeroprompt-train":
        # Jobs of a sweep run in this process; test_cli_train.py starts fresh ones.
        monkeypatch.setattr(program, "run_in_fresh_process", lambda module, config, folder: program.train(config))
    if "runs/corpus" in line and "compile" not in line and not (folder / "runs" / "corpus").exists():
        # Lines of one block may run in different processes.
        run(next(each for each in LINES if "--out runs/corpus" in each), monkeypatch)
    run(line, monkeypatch)
    if line.split()[0] == "zeroprompt-train":
        grid = [value.count(",") + 1 for value in re.findall(r"=(\S+)", line)] if " -m " in line else [1]
        jobs = 1
        for values in grid:
            jobs *= values
        assert len(set(folder.rglob("results.json")) - before) == jobs
    else:
        assert capsys.readouterr().out


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_block_runs(number, tmp_path):
    source = blocks("python")[number]
    for pattern, text in REPLACED:
        source = re.sub(pattern, text, source)
    file = tmp_path / "block.py"
    file.write_text(source, encoding="utf-8")
    done = subprocess.run([sys.executable, file], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_files_that_are_linked_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links
    assert not [link for link in links if not (ROOT / link).exists()]


def test_it_is_short():
    assert README.count("\n") < 200
