# SPDX-License-Identifier: Apache-2.0
"""What importing and training load. Each test is a fresh process, because modules stay loaded."""

import ast
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

PACKAGE = Path(__file__).parents[2] / "lightning_zeroprompt"
_REPORT = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


@functools.cache
def loaded(program, *arguments):
    """Top-level modules that are loaded after ``program``."""
    line = [sys.executable, "-c", program + _REPORT, *map(str, arguments)]
    done = subprocess.run(line, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    tasks = builtin_tasks(num_tasks=10, examples_per_task=10)
    folder = tmp_path_factory.mktemp("imports") / "corpus"
    return compile_tasks(tasks, folder, tokenizer=ByteTokenizer(), heldout_fraction=0.2, progress=False).path


def test_the_package_alone_loads_neither_torch_nor_lightning():
    names = "import lightning_zeroprompt, lightning_zeroprompt.data, lightning_zeroprompt.models"
    assert not loaded(names) & {"torch", "lightning", "numpy", "datasets", "pyarrow", "hydra", "transformers"}


def test_reading_a_corpus_loads_no_framework():
    names = "import lightning_zeroprompt.data.corpus, lightning_zeroprompt.data.mixture, lightning_zeroprompt.data.join"
    assert not loaded(names) & {"torch", "lightning", "datasets", "pyarrow", "hydra", "transformers", "deap"}


def test_what_evolves_and_what_judges_prompts_loads_no_framework():
    parts = ("pool", "parts", "racing", "significance", "confirm", "settings", "clock")
    names = "\n".join(f"import lightning_zeroprompt.prompts.{part}" for part in parts)
    assert not loaded(names) & {"torch", "lightning", "datasets", "pyarrow", "hydra", "transformers", "deap"}


def test_a_search_needs_neither_lightning_nor_hydra_and_its_reports_no_matplotlib():
    theirs = loaded("import torch, torchmetrics")
    parts = [path.stem for path in (PACKAGE / "prompts").glob("*.py") if path.stem != "__init__"]
    assert len(parts) > 15
    ours = loaded("\n".join(f"import lightning_zeroprompt.prompts.{part}" for part in parts))
    assert "deap" in ours
    assert not (ours - theirs) & {"lightning", "hydra", "omegaconf", "matplotlib", "datasets", "pyarrow", "pandas"}


def test_deap_is_imported_in_one_file_alone():
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(name.split(".")[0] == "deap" for name in imports(ast.parse(path.read_text())))
    }
    assert users == {"prompts/search.py"}


HEAVY = {"datasets", "pyarrow", "hydra", "omegaconf", "transformers", "deap", "matplotlib", "pandas", "sklearn"}


def test_the_library_adds_no_heavy_import_to_lightnings_own():
    theirs = loaded("import lightning.pytorch")
    parts = (
        "data.corpus",
        "data.mixture",
        "data.datamodule",
        "data.evaluation",
        "models.module",
        "models.hf",
        "prompts.fitness",
    )
    names = "\n".join(f"import lightning_zeroprompt.{part}" for part in (*parts, "metrics", "callbacks"))
    ours = loaded(names)
    assert "lightning" in ours
    assert not (ours - theirs) & HEAVY


def test_the_engine_adds_no_heavy_import_to_lightnings_own():
    theirs = loaded("import lightning.pytorch")
    ours = loaded("import lightning_zeroprompt.strategies, lightning_zeroprompt.pipeline")
    assert "lightning" in ours
    assert not (ours - theirs) & HEAVY


def test_the_pipeline_runs_without_lightning():
    parts = [path.stem for path in (PACKAGE / "pipeline").glob("*.py") if path.stem != "__init__"]
    assert len(parts) > 10
    modules = loaded("\n".join(f"import lightning_zeroprompt.pipeline.{part}" for part in parts))
    assert "torch" in modules
    assert not modules & {"lightning", "pytorch_lightning", "torchmetrics"}


def imports(tree):
    """Names that a file imports, dotted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def dotted(node):
    """``a.b.c`` of an attribute's syntax tree, None for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        head = dotted(node.value)
        return head and f"{head}.{node.attr}"
    return None


def test_private_names_of_torch_are_touched_in_one_file_alone():
    # Documented by torch, whatever its underscore: the pytree of nested containers.
    allowed = {"torch.utils._pytree"}
    private = {}
    for path in PACKAGE.rglob("*.py"):
        tree = ast.parse(path.read_text())
        used = [name for name in imports(tree) if name.startswith("torch.")]
        used += [name for node in ast.walk(tree) if (name := dotted(node)) and name.startswith(("torch.", "dist."))]
        bad = {name for name in used if re.search(r"\._(?!_)", name) and not name.startswith(tuple(allowed))}
        if bad:
            private[path.relative_to(PACKAGE).as_posix()] = bad
    assert private.keys() == {"pipeline/torch_compat.py"}, private


@pytest.mark.parametrize(
    "order",
    [
        "import lightning_zeroprompt, lightning.pytorch as pl",
        pytest.param("import lightning.pytorch as pl, lightning_zeroprompt", marks=pytest.mark.slow),
    ],
)
def test_importing_the_package_registers_the_strategy(order):
    program = f"""{order}
import sys
assert "lightning_zeroprompt.strategies" not in sys.modules
trainer = pl.Trainer(strategy="zeropp", accelerator="cpu", devices=2, logger=False)
assert type(trainer.strategy).__name__ == "ZeroPPStrategy" and trainer.world_size == 2
"""
    loaded(program)


@pytest.mark.parametrize(
    "order",
    [
        "import lightning_zeroprompt, pytorch_lightning as pl",
        pytest.param("import pytorch_lightning as pl, lightning_zeroprompt", marks=pytest.mark.slow),
    ],
)
def test_a_trainer_of_the_other_package_says_what_to_use(order):
    program = f"""{order}
try:
    pl.Trainer(strategy="zeropp", accelerator="cpu", devices=2, logger=False)
except TypeError as error:
    assert "`lightning`, not with `pytorch_lightning`" in str(error), error
else:
    raise AssertionError("no error")
"""
    loaded(program)


def test_a_run_from_a_compiled_folder_loads_neither_datasets_nor_pyarrow(compiled, tmp_path):
    program = """
import sys
from hydra import compose, initialize_config_dir
from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.cli.train import train

compiled, output = sys.argv[1:]
with initialize_config_dir(str(config_dir()), version_base="1.3"):
    config = compose("train", [
        "model=nano", "trainer.accelerator=cpu", "trainer.max_steps=2", "callbacks=none", "data.num_tasks=10",
        f"data.compiled={compiled}", f"paths.output_dir={output}", "data.encoder_length=128", "data.rows_per_batch=2",
        "eval.examples_per_task=1", "eval.fit_examples_per_task=1", "eval.templates_per_task=1",
        "eval.levels=[instance]", "trainer.val_check_interval=2",
    ])
train(config)
"""
    modules = loaded(program, compiled, tmp_path / "run")
    assert (tmp_path / "run" / "results.json").is_file()
    # Not transformers: torchmetrics loads it where it is installed.
    assert not modules & {"datasets", "pyarrow", "deap"}
