# SPDX-License-Identifier: Apache-2.0
"""What importing and training load. Each test is a fresh process, because modules stay loaded."""

import json
import os
import subprocess
import sys

import pytest

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

_REPORT = "\nimport json, sys\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"


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


def test_the_library_adds_no_heavy_import_to_lightnings_own():
    theirs = loaded("import lightning.pytorch, torchmetrics")
    parts = ("data.corpus", "data.mixture", "data.datamodule", "data.evaluation", "models.module", "models.hf")
    names = "\n".join(f"import lightning_zeroprompt.{part}" for part in (*parts, "metrics", "callbacks"))
    ours = loaded(names)
    assert "lightning" in ours
    heavy = {"datasets", "pyarrow", "hydra", "omegaconf", "transformers", "deap", "matplotlib", "pandas", "sklearn"}
    assert not (ours - theirs) & heavy


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
