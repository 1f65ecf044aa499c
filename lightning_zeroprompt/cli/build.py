# SPDX-License-Identifier: Apache-2.0
"""From a Hydra configuration to the library's objects; with checkpoints.py, the only place that knows the keys.

No ``DictConfig`` leaves this file: constructors get plain typed arguments, so the same objects can be built in Python
or by LightningCLI.
"""

import hashlib
import inspect
import json
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import hydra.utils
import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import LearningRateMonitor
from omegaconf import DictConfig, OmegaConf

from lightning_zeroprompt.cli.checkpoints import check_tokenizer
from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus, TaskInfo
from lightning_zeroprompt.data.datamodule import EvaluationFactory, TaskDataModule
from lightning_zeroprompt.data.describe import corpus_summary, training_summary
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation, split_tasks
from lightning_zeroprompt.data.mixture import MixtureSettings, select_tasks
from lightning_zeroprompt.data.packing import check_replicas
from lightning_zeroprompt.data.prepare import compile_source
from lightning_zeroprompt.models.hf import load_t5
from lightning_zeroprompt.models.module import SoftPromptSettings, Text2TextModule
from lightning_zeroprompt.models.prompt_transfer import prompt_numbers
from lightning_zeroprompt.strategies import ZeroPPStrategy

__all__ = [
    "build_datamodule",
    "build_module",
    "build_trainer",
    "check_keys",
    "check_run",
    "data_summary",
    "evaluation_factory",
    "evaluation_settings",
    "open_corpus",
    "other_datamodule",
    "quieten",
]

_DATA = {
    *("source", "path", "compiled", "num_tasks", "num_source_tasks", "holdout_categories", "drop_shared_families"),
    *("options", "tokenizer", "vocab_size", "compile", "encoder_length", "decoder_length", "rows_per_batch"),
    "num_workers",
}
_EVAL = {"fit_examples_per_task", "shuffled", "max_tokens"}


def quieten() -> None:
    """Hide notices of libraries that a user of this program can do nothing about."""
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # Of a resumed run in another folder, or in one that was moved: the other folder's checkpoints are left alone.
    warnings.filterwarnings("ignore", message="The dirpath has changed.*")
    warnings.filterwarnings("ignore", message=".*Checkpoint directory .* exists and is not empty.*")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.getMessage().startswith("zeropp:")


def check_keys(config: DictConfig) -> None:
    """Refuse keys that nothing reads, which Hydra's ``+`` lets through: misspelt ones would change nothing, silently.

    Args:
        config: A composed or resolved configuration of training or evaluation.

    Raises:
        ValueError: An unknown key, with the known ones, or a value where a group belongs.
    """
    targets = [name for name in ("optimizer", "trainer", "logger") if config.get(name)]
    targets += [f"callbacks.{name}" for name in config.get("callbacks") or {}]
    known: dict[str, set[str] | None] = {
        "data": _DATA,
        "data.compile": _parameters(compile_tasks) - {"tasks", "folder", "tokenizer", "source", "existing"},
        "eval": (_parameters(EvaluationSettings) | _EVAL) - {"shuffle_instructions"},
        "mixture": _parameters(MixtureSettings),
        "model": {"size", "dropout", "overrides", "compile", "soft_prompt"},
        "model.soft_prompt": _parameters(SoftPromptSettings),
        "paths": {"runs_dir", "compiled_dir", "output_dir"},
        "strategy": {"strategy"},
        **dict.fromkeys(targets),
    }
    for name, keys in known.items():
        node = OmegaConf.select(config, name)
        if not OmegaConf.is_dict(node) or (keys is None and "_target_" not in node):
            raise ValueError(f"{name} is {node!r}; it must be a mapping" + (" with a _target_" if keys is None else ""))
        if keys is None:
            keys = _parameters(hydra.utils.get_object(node["_target_"]))
        unknown = sorted(str(key) for key in node if key not in keys and not str(key).startswith("_"))
        if unknown and "**" not in keys:
            raise ValueError(f"{name}.{unknown[0]} is unknown; {name} has: {', '.join(sorted(keys))}")


def _parameters(function: Callable[..., Any]) -> set[str]:
    """Names of its parameters; ``**`` where it takes any."""
    parameters = inspect.signature(function).parameters.values()
    return {"**" if p.kind is p.VAR_KEYWORD else p.name for p in parameters}


def open_corpus(config: DictConfig) -> Corpus:
    """The corpus that ``data`` describes: ``data.compiled`` as it is, or compiled now unless an equal one is there.

    Args:
        config: With the groups ``data`` and ``paths``.
    """
    data = config.data
    if data.compiled is not None:
        return Corpus.open(data.compiled)
    arguments = {
        "tokenizer": data.tokenizer,
        "vocab_size": data.vocab_size,
        "num_tasks": data.num_source_tasks,
        "options": _plain(data.options),
        **_plain(data.compile),
    }
    # One folder for each way of compiling; in it, a source whose content has changed replaces the corpus of the old
    # one.
    digest = hashlib.sha256(json.dumps([data.source, arguments], sort_keys=True).encode()).hexdigest()
    folder = Path(config.paths.compiled_dir) / f"{data.source}-{digest[:10]}"
    return compile_source(data.source, data.path, folder, existing="replace", **arguments)


def evaluation_settings(
    config: DictConfig, *, on_gpu: bool, during_fit: bool = False, shuffle_instructions: bool = False
) -> EvaluationSettings:
    """What the group ``eval`` asks for.

    Args:
        config: With the group ``eval``; ``auto`` examples are 8 a task on a CPU and all on a GPU, and during
            training 2 and 16.
        on_gpu: Whether the model runs on a GPU.
        during_fit: Whether it is one of the evaluations during training, which may take fewer examples.
        shuffle_instructions: Whether instructions are exchanged between tasks.
    """
    given = _plain(config.eval)
    fit_examples = given.pop("fit_examples_per_task")
    if given["examples_per_task"] == "auto":
        given["examples_per_task"] = None if on_gpu else 8
    if during_fit:
        given["examples_per_task"] = (16 if on_gpu else 2) if fit_examples == "auto" else fit_examples
    given.pop("shuffled")
    given.pop("max_tokens")
    given["levels"] = tuple(given["levels"])
    return EvaluationSettings(**given, shuffle_instructions=shuffle_instructions)


def build_datamodule(
    config: DictConfig, corpus: Corpus, *, steps: int, on_gpu: bool, shuffled: bool = False
) -> TaskDataModule:
    """Training tasks, mixture and evaluation data.

    Args:
        config: With the groups ``data``, ``mixture``, ``eval`` and ``model``, and ``seed``.
        corpus: Compiled corpus.
        steps: Batches of the run.
        on_gpu: Whether the model runs on a GPU.
        shuffled: Whether evaluations also ask with the instructions of other tasks.
    """
    data = config.data
    candidates, _ = _split(config, corpus)
    tasks = select_tasks(corpus.tasks, data.num_tasks, config.seed, among=candidates)
    prompt = SoftPromptSettings(**_plain(config.model.soft_prompt))

    return TaskDataModule(
        corpus,
        tasks=tasks,
        steps=steps,
        encoder_length=data.encoder_length,
        decoder_length=data.decoder_length,
        rows_per_batch=data.rows_per_batch,
        seed=config.seed,
        mixture=_mixture(config, corpus, tasks),
        soft_prompt_length=prompt.length,
        num_workers=data.num_workers,
        pin_memory=on_gpu,
        evaluation=evaluation_factory(config, on_gpu=on_gpu, shuffled=shuffled),
    )


def _split(config: DictConfig, corpus: Corpus) -> tuple[list[int], list[int]]:
    # Configurations of older runs lack the key.
    drop = config.data.get("drop_shared_families", False)
    return split_tasks(corpus.tasks, _plain(config.data.holdout_categories), drop_shared_families=drop)


def data_summary(config: DictConfig, datamodule: TaskDataModule) -> str:
    """What a run trains on, for people: counts of the corpus and of the chosen tasks.

    Args:
        config: With the group ``data``.
        datamodule: What :func:`build_datamodule` has made of it.
    """
    corpus = datamodule.corpus
    return f"{corpus_summary(corpus)}\n{training_summary(corpus, datamodule.task_indices, *_split(config, corpus))}"


def evaluation_factory(
    config: DictConfig,
    *,
    on_gpu: bool,
    during_fit: bool = False,
    shuffled: bool = False,
    trained: Sequence[TaskInfo] | None = None,
) -> EvaluationFactory:
    """Build the evaluation datasets that ``eval`` describes, once the training tasks are known.

    Args:
        config: With the groups ``data``, ``eval`` and ``model``.
        on_gpu: Whether the model runs on a GPU.
        during_fit: Whether it is for the evaluations during training.
        shuffled: Whether a second dataset asks the same with the instructions of other tasks.
        trained: What was trained on, where the evaluated corpus is another one than that of the training.
    """
    data, prompt = config.data, SoftPromptSettings(**_plain(config.model.soft_prompt))

    def build(corpus: Corpus, task_indices: Sequence[int], *, num_replicas: int, rank: int) -> list[EvaluationDataset]:
        if trained is None:
            _, heldout = _split(config, corpus)
        else:
            ids, families = {task.task_id for task in trained}, {task.family for task in trained}
            heldout = [t.index for t in corpus.tasks if t.task_id not in ids and t.family not in families]
        datasets = []
        for shuffle in (False, True) if shuffled else (False,):
            settings = evaluation_settings(config, on_gpu=on_gpu, during_fit=during_fit, shuffle_instructions=shuffle)
            plan = plan_evaluation(
                corpus, task_indices, settings, heldout_tasks=heldout, trained_elsewhere=trained or ()
            )
            datasets.append(
                EvaluationDataset(
                    corpus,
                    plan,
                    encoder_length=data.encoder_length,
                    decoder_length=data.decoder_length,
                    max_tokens=config.eval.max_tokens,
                    soft_prompt_length=prompt.length,
                    prompt_ids=prompt_numbers(plan, task_indices, prompt.unseen) if prompt.length else None,
                    rank=rank,
                    num_ranks=num_replicas,
                )
            )
        return datasets

    return build


def _mixture(config: DictConfig, corpus: Corpus, tasks: Sequence[int]) -> MixtureSettings:
    given = _plain(config.mixture)
    curriculum = given.pop("curriculum")
    if curriculum is None:
        return MixtureSettings(**given)
    stage_of = hydra.utils.get_method(curriculum["stage_of"])
    stages = {index: stage_of(corpus.tasks[index].task_id) for index in tasks}
    phases = tuple(
        (draws, tuple(index for index in tasks if stages[index] <= stage))
        for stage, draws in enumerate(curriculum["draws"])
    )
    # With few training tasks a stage can be empty; the phases after it are as long as they would be.
    return MixtureSettings(**given, curriculum=tuple(phase for phase in phases if phase[1]))


def other_datamodule(config: DictConfig, trained: TaskDataModule, corpus: Corpus, *, on_gpu: bool) -> TaskDataModule:
    """Evaluation data of another corpus than the training's: every task that shares no id and no family with it.

    Args:
        config: The training run's configuration, with the evaluation's group ``eval``.
        trained: The training's data, for what was trained on.
        corpus: What to evaluate.
        on_gpu: Whether the model runs on a GPU.

    Raises:
        ValueError: The model mixes soft prompts of training tasks, which this corpus does not have.
    """
    if config.model.soft_prompt.unseen != "none":
        raise ValueError(
            f"model.soft_prompt.unseen={config.model.soft_prompt.unseen} mixes prompts of the training corpus; "
            "evaluate there, or train with unseen=none"
        )
    tasks = [trained.corpus.tasks[index] for index in trained.task_indices]
    factory = evaluation_factory(config, on_gpu=on_gpu, shuffled=config.eval.shuffled, trained=tasks)
    return TaskDataModule(corpus, tasks=[], evaluation=factory)


def build_module(config: DictConfig, corpus: Corpus, num_tasks: int) -> Text2TextModule:
    """The model, from a size or from a checkpoint's folder.

    Args:
        config: With the groups ``model`` and ``optimizer``, ``init_from`` and ``init_seed``.
        corpus: Its tokenizer gives the vocabulary.
        num_tasks: Training tasks.

    Raises:
        ValueError: The folder to start from holds another tokenizer than the corpus has.
    """
    model = config.model
    common: dict[str, Any] = {
        "vocab_size": corpus.tokenizer.vocab_size,
        "tokenizer": corpus.tokenizer.fingerprint,
        "optimizer": hydra.utils.instantiate(config.optimizer),
        "soft_prompt": SoftPromptSettings(**_plain(model.soft_prompt)),
        "num_tasks": num_tasks,
        "init_seed": config.init_seed,
        "compile": model.compile,
    }
    if config.init_from is None:
        overrides = {"dropout": model.dropout, **_plain(model.overrides)}
        return Text2TextModule(size=model.size, overrides=overrides, **common)
    check_tokenizer(Path(config.init_from), corpus)
    start = load_t5(config.init_from, dtype=torch.float32, dropout=model.dropout)
    return Text2TextModule(config=start.config, weights=start.state_dict(), **common)


def build_trainer(config: DictConfig) -> pl.Trainer:
    """Callbacks, logger, strategy and Trainer.

    Args:
        config: With the groups ``trainer``, ``strategy`` and, for training, ``callbacks`` and ``logger``. Without a
            logger, a learning-rate monitor, which Lightning refuses then, is left out.
    """
    callbacks = [hydra.utils.instantiate(callback) for callback in (config.get("callbacks") or {}).values()]
    logger = hydra.utils.instantiate(config.logger) if config.get("logger") else False
    if not logger:
        callbacks = [callback for callback in callbacks if not isinstance(callback, LearningRateMonitor)]
    strategy = config.strategy.strategy
    trainer: pl.Trainer = hydra.utils.instantiate(
        config.trainer,
        strategy=strategy if isinstance(strategy, str) else hydra.utils.instantiate(strategy),
        callbacks=callbacks,
        logger=logger,
    )
    return trainer


def check_run(config: DictConfig, trainer: pl.Trainer) -> None:
    """Refuse what would otherwise be noticed only after the untrained model's evaluation.

    Args:
        config: With ``data``, ``trainer`` and ``strategy``.
        trainer: Of the run, not started yet.

    Raises:
        ValueError: A run without a step or with cut evaluations, a validation interval longer than the run, or rows of
            a batch that cannot be divided by the ranks or into micro-batches.
    """
    steps, accumulated, interval = (
        config.trainer[name] for name in ("max_steps", "accumulate_grad_batches", "val_check_interval")
    )
    if steps < 1 or accumulated < 1:
        raise ValueError(
            f"trainer.max_steps={steps} with trainer.accumulate_grad_batches={accumulated}: a run has at least one "
            "step of at least one batch"
        )
    limit = trainer.limit_val_batches
    # Lightning reads 1 as one batch and 1.0 as all.
    if isinstance(limit, int) or limit < 1:
        raise ValueError(
            f"trainer.limit_val_batches={limit} (trainer.fast_dev_run sets it too): a run reports whole evaluations; "
            "for a short one, set trainer.max_steps, eval.examples_per_task and eval.templates_per_task"
        )
    if isinstance(interval, int) and interval > steps * accumulated:
        raise ValueError(
            f"trainer.val_check_interval={interval} batches, but the run has {steps} x {accumulated} = "
            f"{steps * accumulated}; give fewer, or a share of the run such as 0.25"
        )
    strategy = config.strategy.strategy
    if isinstance(trainer.strategy, ZeroPPStrategy):
        check_replicas(config.data.rows_per_batch, 0, trainer.strategy.data_parallel_size)
        trainer.strategy.check_rows(config.data.rows_per_batch // trainer.strategy.data_parallel_size)
    else:
        tensor_parallel = 1 if isinstance(strategy, str) else strategy.get("tensor_parallel_size", 1)
        if isinstance(tensor_parallel, int):
            check_replicas(config.data.rows_per_batch, 0, trainer.num_devices * trainer.num_nodes // tensor_parallel)


def _plain(node: Any) -> Any:
    return OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
