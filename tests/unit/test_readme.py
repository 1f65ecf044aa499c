# SPDX-License-Identifier: Apache-2.0
"""The README's blocks are run: bash and python as they stand, but for sizes that would make a test long."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SMALL = [
    "trainer.max_steps=2",
    "eval.examples_per_task=1",
    "eval.templates_per_task=1",
    "eval.instance_tasks=2",
    "data.options.examples_per_task=6",
]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> list[str]:
    return [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(
        arguments, cwd=folder, env=environment, capture_output=True, text=True, timeout=400, check=False
    )


def test_the_readme_is_short_and_names_both_commands():
    assert len(README.splitlines()) < 200
    assert {"make train", "make test"} <= set(commands())
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", README) + re.findall(
        r"\]\(((?:docs|benchmarks|conf)[^)]*)\)", README
    ):
        assert (ROOT / picture).exists(), picture


@pytest.mark.parametrize("target", ["train", "test"])
def test_make_targets_set_up_the_environment_first(target, tmp_path):
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    planned = run(["make", "-n", target], tmp_path).stdout
    assert planned.index("-m venv .venv") < planned.index("grep '^torch=='") < planned.index("--editable")
    wanted = {"train": "zeroprompt-train experiment=demo", "test": "-m pytest"}[target]
    assert planned.index("--editable") < planned.index(wanted)


def test_make_trains_what_the_demo_configuration_says(tmp_path):
    planned = run(["make", "-n", "train"], ROOT).stdout.splitlines()[-1]
    words = planned.replace(".venv/bin/", "").split()
    done = run([*words, *SMALL], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "unseen category" in done.stdout
    assert "unseen task" in done.stdout
    (results,) = (tmp_path / "runs" / "train").glob("*/results.json")
    assert f"Run folder: {results.parent}" in done.stdout
    assert "tensorboard --logdir" in done.stdout


@pytest.mark.slow
def test_training_and_sweep_commands_run(tmp_path):
    ran = 0
    for command in commands():
        if command.startswith("zeroprompt-train"):
            done = run([*command.split(), *SMALL], tmp_path)
            assert done.returncode == 0, (command, done.stderr)
            ran += 1
    assert ran >= 2
    assert len(list((tmp_path / "runs" / "sweep").glob("*/*/results.json"))) == 6


def test_data_commands_run(tmp_path):
    ran = 0
    for command in commands():
        if command.startswith("zeroprompt-data"):
            done = run(command.replace("--examples-per-task 40", "--examples-per-task 10").split(), tmp_path)
            assert done.returncode == 0, (command, done.stderr)
            ran += 1
    assert ran >= 4


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_python_blocks_run_as_they_stand(number, tmp_path):
    script = tmp_path / "block.py"
    script.write_text(blocks("python")[number], encoding="utf-8")
    done = run([sys.executable, str(script)], tmp_path)
    assert done.returncode == 0, done.stderr
