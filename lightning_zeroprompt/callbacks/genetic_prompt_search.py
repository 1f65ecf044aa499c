# SPDX-License-Identifier: Apache-2.0
"""GeneticPromptSearch: prompts for unseen tasks, evolved while a model trains.

In every n-th validation of a fit a round of :class:`~lightning_zeroprompt.prompts.search.PromptSearch` runs for each
of some held-out tasks, with the model as it is. Populations and halls of fame go on from round to round, scores do not:
the model has changed. ``trainer.validate`` behind the fit makes a last round with the final model, decides on the
confirm parts and touches the test parts, once.

Where the model is: on one device it is called as it is; under data parallelism, and under ``zeropp``, which gathers the
whole model on every rank for an evaluation, the ranks share the scoring batches; a model that FSDP2 shards is called by
all ranks on all batches, as its collectives need. Every rank makes the same decisions from the same scores: random
numbers are the search's own, answers of text models and decisions by the clock are rank 0's, and after each
generation the ranks compare what they have.

DEAP and matplotlib are imported when a search begins, not with this file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from typing_extensions import override

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationBatch, EvaluationDataset
from lightning_zeroprompt.data.permutation import permute, stream_key
from lightning_zeroprompt.models.prompt_transfer import prompt_numbers, prompt_sources
from lightning_zeroprompt.models.t5 import T5
from lightning_zeroprompt.prompts.encoding import EncodingSettings
from lightning_zeroprompt.prompts.forward import Forward, ShardedForward, T5Forward
from lightning_zeroprompt.prompts.parts import Mode
from lightning_zeroprompt.prompts.pool import PoolError
from lightning_zeroprompt.prompts.settings import SearchSettings, Selection
from lightning_zeroprompt.strategies import ZeroPPStrategy

if TYPE_CHECKING:
    from lightning_zeroprompt.prompts.operators import OperatorSet
    from lightning_zeroprompt.prompts.problem import SearchProblem
    from lightning_zeroprompt.prompts.search import PromptSearch

__all__ = ["GeneticPromptSearch"]


class GeneticPromptSearch(pl.Callback):
    """Evolve prompts for held-out tasks during validation.

    The module is a :class:`~lightning_zeroprompt.models.Text2TextModule`, the data a
    :class:`~lightning_zeroprompt.data.TaskDataModule`. Results are ``prompts.json``, ``prompts.md`` and ``prompts.png``
    in the run folder; for TensorBoard ``prompts/TASK/...`` by generation, the best prompts as text, and the picture.
    The whole state is in the checkpoint: a run that is resumed finds the same prompts bit for bit (float32, CPU,
    without a time budget).

    Args:
        tasks: Ids of tasks that are not trained on, or how many of them to choose.
        every_n_validations: Validations of a fit between two rounds; 0: none during a fit.
        population: Prompts that survive a generation.
        generations: Of a round.
        time_budget: Seconds of a round for all tasks together, kept within 5 %; resuming is not exact then.
        budget: Scorings (prompt, example) of a round for each task on the search part.
        mode: What the search may know of the answers (:mod:`~lightning_zeroprompt.prompts.parts`).
        k: Rows of search and confirm together.
        wordings: Which of the tasks' templates are the manual prompts: those of the kind that is trained on
            (``"train"``), ``"heldout"`` wordings, or ``"all"``.
        offspring: Children of a generation; None: as many as survive.
        selection: How parents are chosen (:mod:`~lightning_zeroprompt.prompts.search`).
        elite: Best prompts that always survive.
        max_age: Changes of the model that a prompt survives outside the elite.
        finalists: Prompts that are checked on the confirm part.
        alpha: Level of that check.
        neighbours: Nearest training tasks that lend their prompts.
        operators: Operator to weight; None for the defaults.
        continuation_model: Folder of a language model, for GPS's sentence continuation.
        translation_models: Folders of two models, for back-translation.
        max_prompt_tokens: Most tokens of a prompt's literal text.
        max_tokens: Padded tokens of a scoring batch; ranks share the batches of a block, so it has to be small enough
            for some batches a rank.
        seed: Of parts, choice of tasks and search.
        folder: In place of the run folder, which is the first logger's, or the Trainer's ``default_root_dir``.

    Attributes:
        records: What came out of the last round, one a task
            (:func:`~lightning_zeroprompt.prompts.outcome.search_record`); on every rank.

    Raises:
        ValueError: A number out of range.
    """

    def __init__(
        self,
        tasks: list[str] | int = 8,
        every_n_validations: int = 1,
        population: int = 32,
        generations: int = 6,
        time_budget: float | None = None,
        budget: int | None = None,
        mode: Mode = "few_label",
        k: int | None = 64,
        wordings: Literal["train", "heldout", "all"] = "all",
        offspring: int | None = None,
        selection: Selection = "tournament",
        elite: int = 2,
        max_age: int | None = 3,
        finalists: int = 3,
        alpha: float = 0.05,
        neighbours: int = 8,
        operators: dict[str, float] | None = None,
        continuation_model: str | None = None,
        translation_models: list[str] | None = None,
        max_prompt_tokens: int | None = None,
        max_tokens: int = 8192,
        seed: int = 0,
        folder: str | None = None,
    ) -> None:
        if (tasks < 1) if isinstance(tasks, int) else not tasks:
            raise ValueError(f"tasks={tasks}: give the ids of tasks, or how many to choose")
        if every_n_validations < 0 or (time_budget is not None and not time_budget > 0):
            raise ValueError(
                f"every_n_validations={every_n_validations} has to be at least 0, time_budget={time_budget} above 0 "
                "seconds (or None for no limit)"
            )
        if wordings not in ("train", "heldout", "all"):
            raise ValueError(f"wordings={wordings!r}: give 'train', 'heldout' or 'all'")
        self._settings = SearchSettings(
            population=population,
            offspring=offspring,
            generations=generations,
            selection=selection,
            elite=elite,
            max_age=max_age,
            budget=budget,
            finalists=finalists,
            alpha=alpha,
            seed=seed,
        )
        self._tasks, self._every, self._time_budget = tasks, every_n_validations, time_budget
        self._mode, self._k, self._wordings, self._neighbours, self._seed = mode, k, wordings, neighbours, seed
        self._weights, self._continuation, self._translation = operators, continuation_model, translation_models
        self._max_prompt_tokens, self._max_tokens, self._folder = max_prompt_tokens, max_tokens, folder
        self.records: list[dict[str, Any]] = []
        self._searches: dict[str, PromptSearch] = {}
        self._loaded: dict[str, Any] | None = None
        self._validations = 0
        self._forward = _ModuleForward()

    # -- hooks ----------------------------------------------------------------------------------------------------

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Choose tasks and cut them into parts, so that what is wrong is said before anything is trained.

        Raises:
            ValueError: Data of another kind, a task that is unknown or trained on, or one that cannot be searched.
        """
        if stage not in ("fit", "validate") or self._searches:
            return
        data = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, TaskDataModule):
            raise ValueError(
                f"GeneticPromptSearch needs a TaskDataModule, whose corpus it searches in; the Trainer has {data!r}"
            )
        operators = self._operators(trainer, data)
        self._searches = {
            problem.name: self._search(pl_module, data, problem, operators)
            for problem in self._problems(pl_module, data)
        }
        self._restore()

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.sanity_checking:
            return
        is_fit = trainer.state.fn == TrainerFn.FITTING
        step = trainer.global_step or getattr(pl_module, "loaded_steps", 0)
        if is_fit:
            self._validations += 1
            if not self._every or self._validations % self._every:
                return
        elif trainer.state.fn != TrainerFn.VALIDATING or not step:
            # A model that has not been trained has no prompts worth searching.
            return
        self._run(trainer, pl_module, step, with_test=not is_fit)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Validations so far, and the state of every search: plain data and tensors."""
        if not self._searches and self._loaded is not None:
            return self._loaded
        searches = {name: search.state_dict() for name, search in self._searches.items()}
        return {"validations": self._validations, "searches": searches}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with a checkpoint's searches.

        Raises:
            ValueError: They are of other tasks, parts or first prompts.
        """
        self._loaded = state_dict
        self._restore()

    # -- building -------------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        if self._loaded is None or not self._searches:
            return
        saved, self._loaded = self._loaded, None
        if saved["searches"].keys() != self._searches.keys():
            raise ValueError(
                f"the checkpoint holds searches for {sorted(saved['searches'])}, this run searches for "
                f"{sorted(self._searches)}; give the same tasks and seed, or leave the callback out"
            )
        self._validations = saved["validations"]
        for name, search in self._searches.items():
            search.load_state_dict(saved["searches"][name])

    def _problems(self, module: pl.LightningModule, data: TaskDataModule) -> Iterator[SearchProblem]:
        from lightning_zeroprompt.prompts.problem import build_problem, corpus_donors, corpus_pool

        corpus, trained = data.corpus, set(data.task_indices)
        donors = corpus_donors(corpus, data.task_indices) if self._neighbours else None
        soft_prompts = getattr(getattr(module, "soft_prompt_settings", None), "mode", "none")
        found, refused = 0, ""
        for task in self._chosen(corpus, trained):
            try:
                problem = build_problem(
                    corpus_pool(corpus, task, self._wordings),
                    donors,
                    population=self._settings.population,
                    mode=self._mode,
                    k=self._k,
                    seed=self._seed,
                    neighbours=self._neighbours,
                    soft_prompts=("shared",) if soft_prompts == "shared" else (),
                    lend_soft_prompts=soft_prompts == "per_task",
                )
            except PoolError as error:
                # Where it does not matter which tasks, those that can be searched are taken.
                if not isinstance(self._tasks, int):
                    raise
                refused = str(error)
                continue
            yield problem
            found += 1
            if found == self._tasks:
                return
        if not found:
            raise ValueError(f"no held-out task can be searched; of the last one: {refused or 'there is none'}")

    def _chosen(self, corpus: Corpus, trained: set[int]) -> list[TaskInfo]:
        """The tasks to search, or all that are eligible in a seeded order."""
        from lightning_zeroprompt.prompts.problem import heldout_tasks, named_tasks

        heldout = heldout_tasks(corpus, [corpus.tasks[index] for index in sorted(trained)])
        if isinstance(self._tasks, int):
            order = permute(len(heldout), stream_key(self._seed, "searched tasks"), np.arange(len(heldout)))
            # In a category that is trained on there is something to find.
            categories = {corpus.tasks[index].category for index in trained}
            return sorted(
                (heldout[place] for place in order.tolist()), key=lambda task: task.category not in categories
            )
        return named_tasks(corpus, heldout, self._tasks)

    def _operators(self, trainer: pl.Trainer, data: TaskDataModule) -> OperatorSet:
        from lightning_zeroprompt.prompts.rounds import build_operators

        return build_operators(
            self._weights,
            lambda: self._forward.model,
            data.corpus.tokenizer,
            denoises=data.mixture_settings.denoising > 0,
            continuation_model=self._continuation,
            translation_models=self._translation,
            device=str(trainer.strategy.root_device),
            agree=lambda texts: trainer.strategy.broadcast(texts),
        )

    def _search(
        self, module: pl.LightningModule, data: TaskDataModule, problem: SearchProblem, operators: OperatorSet
    ) -> PromptSearch:
        from lightning_zeroprompt.prompts.search import PromptSearch

        limits = data.packing_settings
        encoding = EncodingSettings(
            encoder_length=limits.encoder_length,
            decoder_length=limits.decoder_length,
            max_prompt_tokens=self._max_prompt_tokens,
            soft_prompt_length=limits.soft_prompt_length,
            soft_prompts=_soft_prompts(module, data, problem.name),
        )
        return PromptSearch(problem, self._forward, operators, self._settings, encoding, max_tokens=self._max_tokens)

    # -- rounds ---------------------------------------------------------------------------------------------------

    def _run(self, trainer: pl.Trainer, module: pl.LightningModule, step: int, *, with_test: bool) -> None:
        from lightning_zeroprompt.prompts.report import write_prompts
        from lightning_zeroprompt.prompts.rounds import make_records, run_round

        strategy = trainer.strategy
        with self._forward.of(trainer, module):
            run_round(
                self._searches,
                step,
                time_budget=self._time_budget,
                decide=lambda answer: bool(strategy.broadcast(answer)),
                on_generation=lambda search: self._end_generation(trainer, search),
            )
            self.records = make_records(self._searches, with_test=with_test)
        _compare_ranks(self.records)
        folder = Path(self._folder or trainer.log_dir or trainer.default_root_dir)
        if trainer.is_global_zero:
            data: TaskDataModule = trainer.datamodule  # type: ignore[attr-defined]
            write_prompts(folder, self.records, {"corpus": data.corpus.fingerprint, "wordings": self._wordings})
            self._log_records(trainer, step)
        strategy.barrier("prompts")

    def _end_generation(self, trainer: pl.Trainer, search: PromptSearch) -> None:
        # Ranks that go different ways would soon wait for each other in different messages.
        _compare_ranks([[one.key, one.mean] for one in search.population])
        entry = search.history[-1] if search.history else {}
        for logger in _tensorboards(trainer):
            for name in ("best", "median", "mean", "manual", "diversity"):
                if name in entry:
                    tag = f"prompts/{search.problem.name}/{name}"
                    logger.experiment.add_scalar(tag, entry[name], entry["generation"])

    def _log_records(self, trainer: pl.Trainer, step: int) -> None:
        from lightning_zeroprompt.prompts.report import draw_searches, prompts_text

        for logger in _tensorboards(trainer):
            for record in self.records:
                logger.experiment.add_text(f"prompts/{record['task']}", prompts_text(record), step)
                confirm = record["scores"]["confirm"] or {}
                for name in ("manual", "evolved"):
                    if name in confirm:
                        value = confirm[name]["outcome"]
                        logger.experiment.add_scalar(f"prompts/{record['task']}/confirm_{name}", value, step)
            logger.experiment.add_figure("prompts", draw_searches(self.records), step)


def _compare_ranks(found: Any) -> None:
    """Refuse to go on where ranks have found different things.

    Raises:
        RuntimeError: They have.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    mine = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    if len(set(everyone)) > 1:
        raise RuntimeError(
            f"the ranks have found different prompts ({[digest[:8] for digest in everyone]}): their models or data "
            "differ; check that all start from the same weights and corpus"
        )


def _tensorboards(trainer: pl.Trainer) -> list[TensorBoardLogger]:
    if not trainer.is_global_zero:
        return []
    return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def _soft_prompts(module: pl.LightningModule, data: TaskDataModule, task: str) -> dict[str, int]:
    """Number of every source of soft prompts; what an evaluation gives the task is the default."""
    settings = getattr(module, "soft_prompt_settings", None)
    if settings is None:
        return {"": 0}
    numbers = prompt_sources(settings.mode, [data.corpus.tasks[index].task_id for index in data.task_indices])
    default = 0
    if settings.unseen != "none" and data.evaluation is not None:
        dataset = data.evaluation(data.corpus, data.task_indices, num_replicas=1, rank=0)[0]
        if isinstance(dataset, EvaluationDataset):
            given = prompt_numbers(dataset.plan, data.task_indices, settings.unseen)
            default = next((given.get(info.index, 0) for info in data.corpus.tasks if info.task_id == task), 0)
    return {**numbers, "": default}


class _ModuleForward:
    """The module's T5, which exists when a round runs; a :class:`~lightning_zeroprompt.prompts.forward.Forward`."""

    def __init__(self) -> None:
        self._model: T5 | None = None
        self._inner: Forward | None = None

    @contextlib.contextmanager
    def of(self, trainer: pl.Trainer, module: pl.LightningModule) -> Iterator[None]:
        """Use this module's model, in the precision of its evaluation steps."""
        model = module.model
        if not isinstance(model, T5):
            raise ValueError(f"GeneticPromptSearch scores prompts with a T5; the module has a {type(model).__name__}")
        shares = isinstance(trainer.strategy, ZeroPPStrategy) or not any(
            isinstance(part, FSDPModule) for part in model.modules()
        )
        self._model = model
        self._inner = T5Forward(model)
        if trainer.world_size > 1 and shares:
            self._inner = ShardedForward(self._inner)
        try:
            # Shapes vary from batch to batch, and each would be compiled anew.
            with trainer.precision_plugin.val_step_context(), torch.compiler.set_stance("force_eager"):
                yield
        finally:
            self._model = self._inner = None

    @property
    def model(self) -> T5:
        """The T5 of the round that is running."""
        if self._model is None:
            raise RuntimeError("no round is running")
        return self._model

    def option_logprobs(self, batches: Sequence[EvaluationBatch]) -> list[Tensor]:
        return self._running().option_logprobs(batches)

    def generate(self, batches: Sequence[EvaluationBatch]) -> list[list[list[int]]]:
        return self._running().generate(batches)

    def _running(self) -> Forward:
        if self._inner is None:
            raise RuntimeError("no round is running")
        return self._inner
