# SPDX-License-Identifier: Apache-2.0
"""Which libraries an import loads, each asked in a fresh process."""

import subprocess
import sys

import pytest


def loaded(code: str) -> set[str]:
    script = f"import sys\n{code}\nprint(' '.join(sorted({{name.partition('.')[0] for name in sys.modules}})))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    return set(done.stdout.split())


def test_the_package_itself_loads_nothing():
    heavy = {"torch", "lightning", "numpy", "datasets", "hydra", "transformers"}
    assert not heavy & loaded("import lightning_zeroprompt, lightning_zeroprompt.data, lightning_zeroprompt.models")


def test_reading_a_corpus_needs_neither_torch_nor_a_data_library():
    found = loaded("import lightning_zeroprompt.data.corpus, lightning_zeroprompt.data.mixture")
    assert not found & {"torch", "lightning", "datasets", "pyarrow", "tokenizers", "transformers"}


def test_training_adds_no_data_library_or_configuration_to_what_lightning_loads():
    base = loaded("import lightning.pytorch, torchmetrics")
    package = "lightning_zeroprompt"
    code = f"import {package}.data.datamodule, {package}.models.module, {package}.callbacks"
    added = loaded(code) - base
    assert not added & {"datasets", "pyarrow", "hydra", "omegaconf", "deap", "transformers", "jinja2", "matplotlib"}


@pytest.mark.parametrize("source", ["builtin", "parquet", "hub", "promptsource"])
def test_listing_sources_touches_no_library_until_used(source):
    found = loaded(f"import lightning_zeroprompt.data.sources.{source}")
    assert not found & {"datasets", "pyarrow", "torch", "transformers"}
