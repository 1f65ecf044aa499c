# SPDX-License-Identifier: Apache-2.0
"""Every file in conf/: groups compose and what they name is built; experiments and sweeps run for a few steps."""

import dataclasses
import inspect
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import datasets
import hydra.utils
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from omegaconf import OmegaConf

from lightning_zeroprompt.callbacks import GeneticPromptSearch, Throughput
from lightning_zeroprompt.cli import train as program
from lightning_zeroprompt.cli.build import build_module, build_trainer, evaluation_settings, open_corpus
from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.cli.train import run_ranks, train
from lightning_zeroprompt.data.evaluation import EvaluationSettings
from lightning_zeroprompt.data.mixture import MixtureSettings
from lightning_zeroprompt.data.sources.parquet import COLUMNS
from lightning_zeroprompt.models import OptimizerSettings
from lightning_zeroprompt.prompts.settings import SearchSettings
from lightning_zeroprompt.strategies import ZeroPPStrategy

CONF = config_dir()
FEW = (
    "trainer.max_steps=3",
    "trainer.val_check_interval=3",
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "data.rows_per_batch=2",
    "eval.examples_per_task=1",
    "eval.fit_examples_per_task=1",
    "eval.templates_per_task=1",
    "eval.instance_tasks=4",
)
# One in five examples of each task is held out, so that the instance level has some.
BUILTIN = ("data.options.examples_per_task=10", "data.compile.heldout_fraction=0.2")
# Parameters in millions with 32,128 ids: T5 v1.1 as released (https://huggingface.co/google/t5-v1_1-small and so on),
# and this package's smaller sizes with 1,280 ids.
SIZES = {"nano": 0.35, "tiny": 2, "mini": 10, "small": 77, "base": 248, "large": 783, "xl": 2850, "xxl": 11135}


def files(group):
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def composed(name, *overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def compiled_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("conf") / "compiled"


def test_every_group_is_tested_here():
    groups = {path.parent.name for path in CONF.rglob("*.yaml")}
    tested = {"model", "optimizer", "mixture", "eval", "strategy", "trainer", "callbacks", "logger", "data", "paths"}
    run = {"experiment", "sweep"}
    # test_hub.py reads the mappings; test_cli_search.py tables of examples.
    assert groups == tested | run | {"search", "examples", "mappings", CONF.name}
    assert {path.name for path in CONF.glob("*.yaml")} == {"train.yaml", "eval.yaml", "search.yaml"}


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF)))
def test_every_key_has_a_value_of_its_own(path):
    """YAML reads a key that stands twice without a word, and 1e-3 as a string."""
    text = path.read_text(encoding="utf-8")
    keys = [line.split(":")[0] for line in text.splitlines() if line and line[0].isalpha()]
    assert len(keys) == len(set(keys))
    assert isinstance(yaml.safe_load(text) or {}, dict)


@pytest.mark.parametrize("name", files("model"))
def test_models_have_their_size(name):
    vocabulary = 1280 if SIZES[name] < 50 else 32128
    corpus = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=vocabulary, fingerprint="f"))
    # The released sizes have a head of their own.
    config = composed("train", f"model={name}", f"+model.overrides.tie_head={vocabulary == 1280}")
    module = build_module(config, corpus, 3)
    with torch.device("meta"):
        module.configure_model()
    assert {parameter.device.type for parameter in module.parameters()} == {"meta"}
    assert sum(parameter.numel() for parameter in module.parameters()) / 1e6 == pytest.approx(
        SIZES[name], rel=0.01 if vocabulary == 32128 else 0.3
    )


@pytest.mark.parametrize("name", files("optimizer"))
def test_optimizers(name):
    settings = hydra.utils.instantiate(composed("train", f"optimizer={name}").optimizer)
    assert isinstance(settings, OptimizerSettings)
    assert settings.name == name
    assert isinstance(settings.learning_rate, float)


def test_searches_are_the_defaults_of_the_library():
    given = OmegaConf.to_container(composed("search", "checkpoint=c", "task=t").search)
    defaults = dataclasses.asdict(SearchSettings()) | {"generations": 10}
    defaults.pop("race")
    parts = inspect.signature(GeneticPromptSearch).parameters
    assert given.keys() - defaults.keys() <= parts.keys()
    assert given == defaults | {name: parts[name].default for name in given.keys() - defaults.keys()}
    callback = OmegaConf.to_container(composed("train", "callbacks=search").callbacks.prompt_search)
    del callback["_target_"], callback["folder"], callback["seed"]
    assert callback == {name: parts[name].default for name in callback}


@pytest.mark.parametrize("name", files("mixture"))
def test_mixtures_are_the_defaults_of_the_library(name):
    given = OmegaConf.to_container(composed("train", f"mixture={name}").mixture)
    assert given.pop("curriculum") is None
    assert MixtureSettings(**given) == MixtureSettings()


@pytest.mark.parametrize("name", files("eval"))
@pytest.mark.parametrize("program_name", ["train", "eval"])
def test_evaluations(name, program_name):
    config = composed(program_name, f"eval={name}", *(["checkpoint=x"] if program_name == "eval" else []))
    on_cpu = evaluation_settings(config, on_gpu=False)
    assert on_cpu == EvaluationSettings()
    assert evaluation_settings(config, on_gpu=True).examples_per_task is None
    assert evaluation_settings(config, on_gpu=False, during_fit=True).examples_per_task == 2


STRATEGIES = {
    "auto": SingleDeviceStrategy,
    "ddp": DDPStrategy,
    "fsdp2": ModelParallelStrategy,
    "zeropp": ZeroPPStrategy,
    "zeropp_auto": ZeroPPStrategy,
    "zeropp_small": ZeroPPStrategy,
}


@pytest.mark.parametrize(("name", "kind"), STRATEGIES.items())
@pytest.mark.parametrize("trainer", files("trainer"))
def test_strategies_and_trainers(name, kind, trainer, tmp_path):
    assert set(files("strategy")) == set(STRATEGIES)
    given = (f"strategy={name}", f"trainer={trainer}", "trainer.accelerator=cpu", "callbacks=none", "logger=none")
    built = build_trainer(composed("train", *given, f"paths.output_dir={tmp_path}"))
    assert isinstance(built.strategy, kind)
    assert built.precision == ("bf16-mixed" if trainer == "gpu" else "32-true")
    assert built.max_steps == 1000


@pytest.mark.parametrize("callbacks", files("callbacks"))
@pytest.mark.parametrize("logger", files("logger"))
def test_callbacks_and_loggers(callbacks, logger, tmp_path):
    given = (f"callbacks={callbacks}", f"logger={logger}", f"paths.output_dir={tmp_path}", "trainer.accelerator=cpu")
    config = composed("train", *given)
    built = build_trainer(config)
    assert all(isinstance(hydra.utils.instantiate(entry), Callback) for entry in config.callbacks.values())
    assert any(isinstance(callback, Throughput) for callback in built.callbacks)
    assert isinstance(built.logger, TensorBoardLogger) == (logger == "tensorboard")
    if built.logger:
        assert built.logger.log_dir == str(tmp_path / "tensorboard")


@pytest.mark.parametrize("name", files("paths"))
def test_paths_lie_below_one_folder(name):
    paths = composed("train", f"paths={name}", "paths.runs_dir=x", "paths.output_dir=y").paths
    assert (paths.runs_dir, paths.compiled_dir) == ("x", "x/compiled")


def parquet_folder(folder):
    folder.mkdir()
    kinds = {name: pa.string() if kind == "string" else pa.list_(pa.string()) for name, kind in COLUMNS.items()}

    def rows(split, number, count, **more):
        for row in range(count):
            yield {
                "task": f"{split} {number}",
                "family": f"family of {split} {number}",
                "category": f"category {number % 3}",
                "language": "en",
                "tier": "core",
                "benchmark": "train",
                "source": "somewhere",
                "licence": "MIT",
                "instruction": f"Say whether {number} is even or odd.",
                "input": f"number {number}, row {row} of some rows",
                "outputs": [("even", "odd")[row % 2]],
                "options": ["even", "odd"] if number % 2 else None,
            } | more

    def write(name, entries):
        table = pa.Table.from_pylist([row for some in entries for row in some], schema=pa.schema(list(kinds.items())))
        pq.write_table(table, folder / f"{name}.parquet")

    write("train", [rows("core", number, 40) for number in range(6)])
    write("train_extra", [rows("extra", number, 40, tier="extra") for number in range(6)])
    write("heldout", [rows("held", number, 4, benchmark="t0", category="new") for number in range(2)])
    write("heldout_noncommercial", [rows("free", 0, 4, benchmark="sni", licence="CC-BY-NC-4.0")])
    write("heldout_bigbench", [rows("big", 1, 4, benchmark="bigbench")])
    lines = [json.dumps({"task": "core 0", "instructions": ["Is it even or odd?"]})]
    (folder / "tasks.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def mapping(folder):
    lines = [json.dumps({"text": f"row {row}", "kind": f"kind {row % 8}", "label": "odd"}) for row in range(80)]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    columns = {"task_id": "kind", "category": {"value": "c"}, "input": "text", "output": "label"}
    content = {"load": {"path": "json", "data_files": "rows.jsonl", "split": "train"}, **columns}
    (folder / "mapping.yaml").write_text(yaml.safe_dump(content | {"instructions": {"value": ["Odd or even?"]}}))
    return folder / "mapping.yaml"


@pytest.mark.parametrize("name", files("data"))
def test_sources_compile(name, tmp_path, compiled_dir, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    given = (f"data={name}", f"paths.compiled_dir={compiled_dir}", "data.tokenizer=byte")
    given += {
        "builtin": lambda: ("data.num_source_tasks=8", "data.options.examples_per_task=10"),
        "parquet": lambda: ("data.num_source_tasks=8", f"data.path={parquet_folder(tmp_path / 'data')}"),
        "hub": lambda: (f"data.path={mapping(tmp_path)}",),
    }[name]()
    config = composed("train", *given)
    corpus = open_corpus(config)
    assert sum(task.role == "train" for task in corpus.tasks) == 8
    assert corpus.counts["rows"] > 0
    # A second run finds the same folder, without compiling.
    assert open_corpus(config).path == corpus.path


def check_run(folder, num_tasks, steps=3):
    found = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert found["num_tasks"] == num_tasks
    assert found["steps"] == steps
    assert found["macro"]
    assert (folder / "results.png").is_file()
    assert (folder / "checkpoints" / "final.ckpt").is_file()
    return found


# test_readme.py runs it for `make train`.
@pytest.mark.slow
def test_experiment_demo_runs(tmp_path, compiled_dir):
    paths = (f"paths.output_dir={tmp_path}", f"paths.compiled_dir={compiled_dir}")
    few = ("callbacks.prompt_search.k=4", "callbacks.prompt_search.generations=1")
    assert run_ranks(composed("train", "experiment=demo", *FEW, *BUILTIN, *paths, *few, "eval.levels=[category]")) == 0
    found = check_run(tmp_path, 1000)
    assert (found["strategy"], found["world_size"]) == ("ZeroPPStrategy", 2)
    assert found["model"]["size"] == "nano"
    assert any(macro["shuffled"] for macro in found["macro"])


def test_experiment_real_1000_runs(tmp_path, compiled_dir):
    paths = (f"paths.output_dir={tmp_path / 'run'}", f"paths.compiled_dir={compiled_dir}")
    data = (f"data.path={parquet_folder(tmp_path / 'data')}", "data.num_source_tasks=8", "data.num_tasks=8")
    small = ("model=tiny", "data.vocab_size=500", "data.encoder_length=128", "data.decoder_length=32")
    train(composed("train", "experiment=real_1000", *FEW, *paths, *data, *small, "data.num_workers=0"))
    found = check_run(tmp_path / "run", 8)
    # Six core tasks and two of the others; all three held-out files.
    assert {size["level"] for size in found["macro"]} >= {"heldout", "category", "instance"}
    tasks = json.loads((tmp_path / "run" / "results_tasks.json").read_text(encoding="utf-8"))
    assert {"held 0", "held 1", "free 0", "big 1"} <= {task["task_id"] for task in tasks}


def test_every_experiment_and_sweep_is_run():
    assert files("experiment") == ["demo", "real_1000"]
    assert files("sweep") == ["task_scaling"]


def sweep(monkeypatch, folder, *overrides):
    """Run the command in this process, its jobs too: a fresh process for each is tested in test_cli_train.py."""
    monkeypatch.setattr(program, "run_in_fresh_process", lambda module, config, folder: train(resolved(config)))
    subdir = "hydra.sweep.subdir=${hydra.job.num}"
    monkeypatch.setattr(sys, "argv", ["zeroprompt-train", "-m", *overrides, f"hydra.sweep.dir={folder}", subdir])
    program.main()


def resolved(config):
    return OmegaConf.create(OmegaConf.to_container(config, resolve=True))


def test_sweep_task_scaling_runs(tmp_path, monkeypatch, compiled_dir):
    steps = ("trainer.max_steps=1", "trainer.val_check_interval=1")
    paths = (f"paths.compiled_dir={compiled_dir}", "callbacks=none", "eval.levels=[instance]")
    sweep(monkeypatch, tmp_path, "sweep=task_scaling", *FEW, *BUILTIN, *steps, *paths)
    found = [json.loads((Path(tmp_path) / str(job) / "results.json").read_text()) for job in range(6)]
    grid = [(result["num_tasks"], result["model"]["size"]) for result in found]
    assert grid == [(tasks, size) for tasks in (10, 100, 1000) for size in ("tiny", "mini")]
    tokens = [result["tokens_trained"] for result in found]
    assert max(tokens) <= 1.1 * min(tokens)
