# SPDX-License-Identifier: Apache-2.0
"""What ``zeroprompt-search`` and ``zeroprompt-eval prompts=`` share: a model and its tasks."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table

from lightning_zeroprompt.cli.build import build_datamodule, open_corpus
from lightning_zeroprompt.cli.checkpoints import load_module
from lightning_zeroprompt.cli.config import run_config
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.sources.table import read_examples
from lightning_zeroprompt.data.task import Example, PromptTemplate
from lightning_zeroprompt.files import json_bytes, write_files
from lightning_zeroprompt.models.module import Text2TextModule
from lightning_zeroprompt.models.prompt_transfer import prompt_sources
from lightning_zeroprompt.prompts.encoding import EncodingSettings
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.prompts.parts import choose_parts
from lightning_zeroprompt.prompts.pool import ExamplePool, PoolError
from lightning_zeroprompt.prompts.problem import corpus_pool, heldout_tasks, named_tasks, rows_fingerprint
from lightning_zeroprompt.prompts.report import read_prompts

__all__ = ["Loaded", "evaluate_prompts"]


class Loaded:
    """A trained model and what it was trained on.

    Args:
        config: A composed configuration with ``checkpoint``, ``run``, ``corpus`` and ``device``.

    Attributes:
        run: The training run's configuration.
        corpus: To search in.
        module: The model, on its device, in eval mode.
        device: That device.
        data: The training's data, for the tasks that were trained on.
    """

    def __init__(self, config: DictConfig) -> None:
        self.run = run_config(config)
        own = open_corpus(self.run)
        self.corpus = own if config.corpus is None else Corpus.open(config.corpus)
        self.module: Text2TextModule = load_module(self.run, self.corpus)
        self.data: TaskDataModule = build_datamodule(self.run, own, steps=1, on_gpu=False)
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
        self.module.configure_model()
        self.module.to(self.device).eval()

    def encoding(self, max_prompt_tokens: int | None = None) -> EncodingSettings:
        """Limits and soft prompts of the training."""
        prompt, own = self.module.soft_prompt_settings, self.data.corpus
        return EncodingSettings(
            encoder_length=self.run.data.encoder_length,
            decoder_length=self.run.data.decoder_length,
            max_prompt_tokens=max_prompt_tokens,
            soft_prompt_length=prompt.length,
            soft_prompts=prompt_sources(prompt.mode, [own.tasks[index].task_id for index in self.data.task_indices]),
        )

    def pools(self, config: DictConfig, names: Sequence[str], wordings: str) -> Iterator[tuple[ExamplePool, Any]]:
        """The tasks, and the rows of their test parts where these come from another file.

        Args:
            config: With the group ``examples``.
            names: Ids of held-out tasks; with ``examples.path``, the name of one's own task.
            wordings: Which templates are the manual prompts.

        Raises:
            ValueError: A task is unknown, was trained on, or cannot be read.
        """
        if config.examples.path is not None:
            if len(names) != 1:
                raise ValueError(f"examples.path is one task; task={list(names)} names {len(names)}, give one name")
            yield _own_pool(config.examples, names[0], self.corpus)
            return
        trained = [self.data.corpus.tasks[index] for index in self.data.task_indices]
        for task in named_tasks(self.corpus, heldout_tasks(self.corpus, trained), names):
            yield corpus_pool(self.corpus, task, wordings), None


def _own_pool(examples: DictConfig, name: str, corpus: Corpus) -> tuple[ExamplePool, Any]:
    options = examples.options
    choices: dict[str, Any] = {"options_column": options} if isinstance(options, str) else {}
    if OmegaConf.is_list(options):
        choices = {"labels": [str(option) for option in options]}

    def read(path: str) -> list[Example]:
        found = read_examples(path, input_column=examples.input, output_column=examples.output, **choices)
        # What a pool would leave out: nothing can be chosen there.
        return [e for e in found if e.options is None or len(e.options) < 2 or len(set(e.options)) > 1]

    if not examples.templates:
        raise PoolError(
            f'task {name!r} has no template; give examples.templates, such as ["Is it good? {{input}}"] with '
            "the placeholders {input} and {options}"
        )
    templates = tuple(
        PromptTemplate(name=f"template {place}", text=text) for place, text in enumerate(examples.templates)
    )
    rows = read(examples.path)
    tested = [] if examples.test_path is None else read(examples.test_path)
    pool = ExamplePool.from_examples(name, [*rows, *tested], templates, corpus.tokenizer, metric=examples.metric)
    return pool, np.arange(len(rows), len(rows) + len(tested)) if tested else None


def evaluate_prompts(config: DictConfig) -> None:
    """Score the prompts of a search on their test parts, beside the manual ones, and leave ``prompt_scores.json``.

    Args:
        config: A composed configuration of ``conf/eval.yaml`` with ``prompts``.

    Raises:
        ValueError: The file cannot be read, or its test rows are not those of the corpus or file given.
    """
    data = read_prompts(config.prompts)
    loaded = Loaded(config)
    found = []
    for record in data["tasks"]:
        for pool, test_rows in loaded.pools(config, [record["task"]], "all"):
            parts = choose_parts(
                pool, mode=record["mode"], k=record["k"], seed=record["seeds"]["parts"], test_rows=test_rows
            )
            test = pool.select(parts.test)
            if rows_fingerprint(test) != record["test_rows"]:
                raise ValueError(
                    f"task {record['task']!r}: the rows here are not those that {config.prompts} was searched with; "
                    "give the same corpus=, or the same examples.path and examples.test_path"
                )
            scorer = PromptScorer(
                test, T5Forward(loaded.module.model), loaded.encoding(), max_tokens=config.eval.max_tokens
            )
            scores = scorer.score([record["genomes"][name] for name in ("manual", "prompt")], outcomes=True)
            means = scores.outcome.mean(1).tolist()
            found.append({"task": record["task"], "kept": record["kept"], "metric": record["metric"], "rows": len(test),
                          "manual": means[0], "prompt": means[1], "text": record["prompt"]["text"]})  # fmt: skip
    folder = Path(config.paths.output_dir)
    write_files(folder, {"prompt_scores.json": json_bytes({"checkpoint": str(config.checkpoint), "tasks": found})})
    table = Table(title="Prompts on their test parts")
    for name in ("task", "rows", "manual", "prompt", ""):
        table.add_column(name, justify="left" if name in ("task", "") else "right")
    for entry in found:
        kept = "evolved" if entry["kept"] else "the manual one"
        table.add_row(entry["task"], f"{entry['rows']:,}", f"{entry['manual']:.3f}", f"{entry['prompt']:.3f}", kept)
    Console().print(table)
    print(f"Scores: {folder / 'prompt_scores.json'}")
