# SPDX-License-Identifier: Apache-2.0
"""What ranks compare of a Hydra job."""

import subprocess
import sys

import hydra
import pytest
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig

from lightning_zeroprompt.strategies.support import compile_options, hydra_config


@pytest.fixture
def job():
    def start(config, *overrides):
        ConfigStore.instance().store("job", config)
        with hydra.initialize(version_base=None, config_path=None):
            HydraConfig.instance().set_config(hydra.compose("job", list(overrides), return_hydra_config=True))

    yield start
    HydraConfig.instance().cfg = None


CONFIG = {"lr": 0.1, "model": {"width": 8, "lr": "${lr}"}, "folder": "${hydra:job.name}-${now:%f}", "missing": "???"}


def test_the_composed_configuration_is_compared(job):
    job(CONFIG, "model.width=16")
    assert hydra_config() == CONFIG | {"model": {"width": 16, "lr": "${lr}"}}
    job(CONFIG | {"lr": 0.2}, "model.width=16")
    assert hydra_config()["lr"] == 0.2


def test_what_is_a_ranks_own_is_not(job):
    job(CONFIG)
    first = hydra_config()
    job(CONFIG, "hydra.job.name=train_ddp_process_1")
    assert hydra_config() == first


def test_without_a_job_there_is_none_and_hydra_is_not_imported():
    assert hydra_config() is None
    program = """
import sys
from lightning_zeroprompt.strategies.support import hydra_config
print(hydra_config(), "hydra" in sys.modules)
"""
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout == "None False\n"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "use True, False or a mapping of torch.compile's options"),
        ({"mode": "reduce-overhead"}, "CUDA graphs, .* Use mode='max-autotune-no-cudagraphs'"),
        ({"options": {"triton.cudagraphs": True}}, "CUDA graphs"),
    ],
)
def test_options_that_stages_cannot_be_compiled_with(given, message):
    with pytest.raises(ValueError, match=message):
        compile_options(given)
