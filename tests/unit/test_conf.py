# SPDX-License-Identifier: Apache-2.0
"""Every file of conf/ composes, and everything that it names can be built."""

from pathlib import Path

import hydra.utils
import lightning.pytorch as pl
import pytest
import torch
from hydra import compose, initialize_config_dir
from lightning.pytorch.strategies import Strategy
from omegaconf import DictConfig, OmegaConf

from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.data.evaluation import EvaluationSettings
from lightning_zeroprompt.data.mixture import MixtureSettings
from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.models import T5, OptimizerSettings, SoftPromptSettings, T5Config

CONF = config_dir()
GROUPS = ("model", "data", "mixture", "optimizer", "eval", "strategy", "trainer", "callbacks", "logger", "paths")
FILES = [(group, path.stem) for group in GROUPS for path in sorted((CONF / group).glob("*.yaml"))]
WHOLE = [(group, path.stem) for group in ("experiment", "sweep") for path in sorted((CONF / group).glob("*.yaml"))]


def composed(folder: Path, *overrides: str, name: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(name, overrides=[f"paths.output_dir={folder}", *overrides])
    OmegaConf.set_struct(config, False)
    return config


def test_every_file_belongs_to_a_group_that_is_tested():
    known = {*GROUPS, "experiment", "sweep", "mappings"}
    assert {path.parent.name for path in CONF.glob("*/*.yaml")} <= known
    assert {path.stem for path in CONF.glob("*.yaml")} == {"train", "eval"}
    assert len(FILES) >= 20


@pytest.mark.parametrize(("group", "name"), FILES, ids=lambda value: value)
def test_every_choice_of_a_group_composes_and_builds(group, name, tmp_path):
    config = composed(tmp_path, f"{group}={name}", "data.path=somewhere", "++trainer.accelerator=cpu")
    node = config[group]
    resolved = OmegaConf.to_container(node, resolve=True) if node else {}
    if group == "model":
        with torch.device("meta"):
            T5(T5Config.preset(node.size, 1000, dropout=node.dropout, **resolved["overrides"]))
        SoftPromptSettings(**resolved["soft_prompt"])
    elif group == "optimizer":
        assert isinstance(hydra.utils.instantiate(node), OptimizerSettings)
    elif group == "mixture":
        MixtureSettings(**{key: value for key, value in resolved.items() if key != "curriculum"})
    elif group == "eval":
        for key in ("shuffled", "max_tokens", "fit_examples_per_task", "examples_per_task"):
            resolved.pop(key)
        EvaluationSettings(**resolved)
    elif group == "strategy":
        strategy = node.strategy
        assert isinstance(strategy, str) or isinstance(hydra.utils.instantiate(strategy), Strategy)
    elif group == "trainer":
        node.precision = "32-true"
        assert isinstance(hydra.utils.instantiate(node), pl.Trainer)
    elif group == "callbacks":
        assert all(isinstance(hydra.utils.instantiate(callback), pl.Callback) for callback in node.values())
    elif group == "logger" and node:
        hydra.utils.instantiate(node)
    elif group == "data":
        assert resolved["source"] in ("builtin", "parquet")


@pytest.mark.parametrize(("group", "name"), WHOLE, ids=lambda value: value)
def test_every_experiment_and_sweep_composes(group, name, tmp_path):
    config = composed(tmp_path, f"{group}={name}", "data.path=somewhere")
    OmegaConf.to_container(config, resolve=True)
    assert config.data.num_tasks == 1000


def test_the_demo_is_the_embedded_tasks_at_the_smallest_size(tmp_path):
    config = composed(tmp_path, "experiment=demo")
    assert (config.data.source, config.model.size, config.trainer.accelerator) == ("builtin", "nano", "cpu")
    training = [task for task in builtin_tasks() if task.role == "train"]
    assert len(training) >= config.data.num_tasks == 1000


def test_the_evaluation_configuration_composes(tmp_path):
    config = composed(tmp_path, "checkpoint=some.ckpt", name="eval")
    assert OmegaConf.to_container(config, resolve=True)["checkpoint"] == "some.ckpt"
