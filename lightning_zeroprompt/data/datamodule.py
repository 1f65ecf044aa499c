# SPDX-License-Identifier: Apache-2.0
"""TaskDataModule: a compiled corpus as Lightning data loaders that resume at any step.

The train loader reads batch number s of the run for every s of the steps that are left; which rows batch s holds is a
pure function of the corpus, the seed and s (see :mod:`lightning_zeroprompt.data.packing`), so neither workers nor
ranks change the global batch and nothing has to be replayed. Where to go on is read from the trainer's count of
processed batches, which is saved with the optimizer's state, and not from a counter of the loader, which runs ahead by
what workers have prefetched. Loaders have a length: Lightning 2.6 loses one batch on resume without it.

The loaders are no :class:`torch.utils.data.DataLoader` objects but hold one. Lightning puts a ``DistributedSampler``
into every DataLoader it is given under a distributed strategy, which would divide rows that are divided already; what
is not a DataLoader it leaves alone, whatever ``Trainer(use_distributed_sampler=...)`` says.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from lightning.pytorch import LightningDataModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.mixture import Mixture, MixtureSettings, select_tasks
from lightning_zeroprompt.data.packing import BatchStream, PackingReport, PackingSettings, check_replicas

__all__ = ["EvaluationFactory", "Loader", "StepLoader", "TaskBatches", "TaskDataModule", "check_identity"]

Batch = dict[str, torch.Tensor]


class EvaluationFactory(Protocol):
    """Builds the validation data."""

    def __call__(
        self, corpus: Corpus, task_indices: Sequence[int], *, num_replicas: int, rank: int
    ) -> Sequence[Dataset[Any]]:
        """Datasets whose items are whole batches of one data-parallel rank.

        Args:
            corpus: The compiled corpus.
            task_indices: Tasks trained on.
            num_replicas: Data-parallel ranks.
            rank: This rank's place among them.
        """
        ...


class TaskBatches(Dataset[Batch]):
    """Packed training batches of one data-parallel rank, by step.

    Args:
        stream: Batches of the run.
        rank: Place among the data-parallel ranks.
        num_replicas: Number of them.

    Raises:
        ValueError: The rows of a batch cannot be divided by the ranks.
    """

    def __init__(self, stream: BatchStream, rank: int = 0, num_replicas: int = 1) -> None:
        check_replicas(stream.settings.rows_per_batch, rank, num_replicas)
        self.stream = stream
        self.rank = rank
        self.num_replicas = num_replicas

    def __getitem__(self, step: int) -> Batch:
        """The rank's rows of batch ``step``; names, shapes and types as in :meth:`BatchStream.batch`, as tensors."""
        arrays = self.stream.batch(step, self.rank, self.num_replicas)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    # A pickled memory map is a copy of the whole file, so workers that are spawned open the corpus themselves.
    def __reduce__(self) -> tuple[Any, ...]:
        mixture = self.stream.mixture
        settings = (mixture.task_indices.tolist(), mixture.seed, mixture.settings, self.stream.settings)
        return _reopen, (self.stream.corpus.path, *settings, self.rank, self.num_replicas)


def _reopen(
    path: Path,
    task_indices: list[int],
    seed: int,
    mixture: MixtureSettings,
    packing: PackingSettings,
    rank: int,
    num_replicas: int,
) -> TaskBatches:
    corpus = Corpus.open(path)
    stream = BatchStream(corpus, Mixture(corpus, task_indices, seed=seed, settings=mixture), packing)
    return TaskBatches(stream, rank, num_replicas)


def _as_it_is(batch: Any) -> Any:
    """Hand a batch on: items of the datasets are whole batches."""
    return batch


class Loader:
    """All items of a dataset of whole batches, in order; a data loader that Lightning leaves as it is.

    Args:
        dataset: Its items are batches of this rank.
        num_workers: Processes that prepare batches; 0 prepares them in this one.
        pin_memory: Whether batches are put into page-locked memory.
    """

    def __init__(self, dataset: Dataset[Any], *, num_workers: int = 0, pin_memory: bool = False) -> None:
        self.dataset = dataset
        self.num_workers = num_workers
        self.pin_memory = pin_memory

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[Any]:
        return self._read(range(len(self)))

    def _read(self, items: range) -> Iterator[Any]:
        return iter(
            DataLoader(
                self.dataset,
                batch_size=None,
                sampler=items,
                num_workers=self.num_workers,
                pin_memory=self.pin_memory,
                collate_fn=_as_it_is,
            )
        )


def check_identity(identity: Mapping[str, str], state: Mapping[str, Any]) -> None:
    """Refuse a saved state of other data.

    Args:
        identity: Hashes of what decides this run's batches, by what they are of.
        state: The saved state, with the hashes of its run.

    Raises:
        ValueError: They differ; both hashes are shown.
    """
    for name, given in identity.items():
        if state.get(name) != given:
            raise ValueError(
                f"the checkpoint was trained on another {name}: it has {state.get(name)}, this run has {given}; resume "
                "with what the checkpoint was trained on, or start a new run from its weights alone"
            )


class StepLoader(Loader):
    """The batches of a run that are still to come.

    Args:
        dataset: Batches by step.
        steps: Batches of an epoch; an epoch after the first goes on with new batches.
        identity: What decides the batches; saved with the position and compared on resume.
        num_workers: As for :class:`Loader`.
        pin_memory: As for :class:`Loader`.
        trainer: Its count of processed batches says where to begin; without one, the loader counts what it has handed
            out.

    Attributes:
        position: Step of the next batch, where no trainer counts.
    """

    def __init__(
        self,
        dataset: TaskBatches,
        steps: int,
        identity: dict[str, str],
        *,
        num_workers: int = 0,
        pin_memory: bool = False,
        trainer: Trainer | None = None,
    ) -> None:
        super().__init__(dataset, num_workers=num_workers, pin_memory=pin_memory)
        self.steps = steps
        self.identity = identity
        self.trainer = trainer
        self.position = 0

    @override
    def __len__(self) -> int:
        """Batches of an epoch, however many of them are done."""
        return self.steps

    @override
    def __iter__(self) -> Iterator[Batch]:
        # Decided when the first batch is asked for: where the optimizer asks for the number of steps, Lightning makes
        # the iterator before it restores the count of batches from the checkpoint.
        first = self.next_step()
        # Under a trainer the epoch's end is the trainer's decision: after a resume its count of the epoch is not ours.
        last = first + self.steps if self.trainer is not None else max(first, self.steps)
        self.position = first
        for batch in self._read(range(first, last)):
            self.position += 1
            yield batch

    def next_step(self) -> int:
        """Step of the first batch that is not processed yet."""
        if self.trainer is None:
            return self.position
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress.total
        return int(progress.processed)

    def state_dict(self) -> dict[str, Any]:
        """What decides the batches, and the step to go on with."""
        return {**self.identity, "step": self.next_step()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was saved, with any number of workers and ranks.

        Raises:
            ValueError: The state belongs to other data; both hashes are shown.
        """
        check_identity(self.identity, state)
        self.position = int(state["step"])


class TaskDataModule(LightningDataModule):
    """Packed multitask training batches and zero-shot evaluation data from a compiled corpus.

    Args:
        corpus: A compiled corpus or the folder of one.
        num_tasks: Training tasks to choose with :func:`~lightning_zeroprompt.data.mixture.select_tasks`; None means
            all.
        tasks: Training tasks by index into the corpus, in place of ``num_tasks``.
        steps: Batches of the run (with gradient accumulation, optimizer steps times the batches of each).
        encoder_length: Positions of an encoder row.
        decoder_length: Positions of a decoder row.
        rows_per_batch: Rows of the global batch, over all data-parallel ranks.
        seed: Seed of task choice and draws.
        mixture: How tasks are balanced.
        soft_prompt_length: Positions for soft prompts at the start of every example.
        max_target_length: Longest target of one example; ``decoder_length`` when None.
        fill: Share of the capacity that is filled on average; None chooses (see
            :class:`~lightning_zeroprompt.data.packing.PackingSettings`).
        window_steps: Steps packed together; None chooses.
        num_workers: Processes that prepare training batches.
        pin_memory: Whether batches are put into page-locked memory.
        evaluation: Builds the validation datasets; without it there is no validation.

    Attributes:
        draws_alike: For pipeline strategies: batches are a function of step and data-parallel rank, so that the ranks
            of a pipeline need not send them to each other.

    Raises:
        ValueError: A number that cannot be, or both ``num_tasks`` and ``tasks``.
    """

    draws_alike = True

    def __init__(
        self,
        corpus: Corpus | str | Path,
        *,
        num_tasks: int | None = None,
        tasks: Sequence[int] | None = None,
        steps: int = 1000,
        encoder_length: int = 512,
        decoder_length: int = 128,
        rows_per_batch: int = 32,
        seed: int = 0,
        mixture: MixtureSettings | None = None,
        soft_prompt_length: int = 0,
        max_target_length: int | None = None,
        fill: float | None = None,
        window_steps: int | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        evaluation: EvaluationFactory | None = None,
    ) -> None:
        super().__init__()
        if num_tasks is not None and tasks is not None:
            raise ValueError(f"num_tasks ({num_tasks}) and a list of {len(tasks)} tasks; give one of the two")
        if steps < 1:
            raise ValueError(f"steps is {steps}; a run has at least one")
        self._source = corpus
        self._num_tasks = num_tasks
        self._tasks = tasks
        self.steps = steps
        self.seed = seed
        self.mixture_settings = mixture or MixtureSettings()
        self.packing_settings = PackingSettings(
            encoder_length=encoder_length,
            decoder_length=decoder_length,
            rows_per_batch=rows_per_batch,
            soft_prompt_length=soft_prompt_length,
            max_target_length=max_target_length,
            fill=fill,
            window_steps=window_steps,
        )
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self.evaluation = evaluation
        self._loader: StepLoader | None = None
        self._loaded: dict[str, Any] | None = None

    @functools.cached_property
    def corpus(self) -> Corpus:
        """The compiled corpus, opened at first use."""
        return self._source if isinstance(self._source, Corpus) else Corpus.open(self._source)

    @functools.cached_property
    def task_indices(self) -> tuple[int, ...]:
        """The chosen training tasks, as indices into the corpus."""
        if self._tasks is not None:
            return tuple(self._tasks)
        return tuple(select_tasks(self.corpus.tasks, self._num_tasks, self.seed))

    @functools.cached_property
    def stream(self) -> BatchStream:
        """The run's batches."""
        mixture = Mixture(self.corpus, self.task_indices, seed=self.seed, settings=self.mixture_settings)
        return BatchStream(self.corpus, mixture, self.packing_settings)

    @property
    def mixture(self) -> Mixture:
        """The run's draws."""
        return self.stream.mixture

    def packing_report(self, windows: int = 4) -> PackingReport:
        """How full the first windows are and how many draws are left over."""
        return self.stream.report(windows)

    @override
    def setup(self, stage: str | None = None) -> None:
        """Open the corpus and, for training, plan the run, so that what is wrong is said before anything starts."""
        if stage in (None, "fit"):
            self.stream.window(0)
        else:
            self.task_indices  # noqa: B018

    @override
    def train_dataloader(self) -> StepLoader:
        """Packed batches of this rank from the step where the trainer stands."""
        dataset = TaskBatches(self.stream, **self._place())
        self._loader = StepLoader(
            dataset,
            self.steps,
            self._identity(),
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            trainer=self.trainer,
        )
        if self._loaded is not None:
            self._loader.load_state_dict(self._loaded)
        return self._loader

    @override
    def val_dataloader(self) -> list[Loader]:
        """A loader for each dataset of ``evaluation``."""
        if self.evaluation is None:
            return []
        datasets = self.evaluation(self.corpus, self.task_indices, **self._place(evaluation=True))
        return [Loader(dataset, pin_memory=self.pin_memory) for dataset in datasets]

    @override
    def test_dataloader(self) -> list[Loader]:
        """The same as for validation."""
        return self.val_dataloader()

    @override
    def state_dict(self) -> dict[str, Any]:
        """Hashes of what decides the batches, and the step to go on with."""
        if self._loader is None:
            return {**self._identity(), "step": 0}
        return self._loader.state_dict()

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of other data; a loader made later goes on at its step.

        Raises:
            ValueError: Corpus, tasks, seed or settings differ from the checkpoint's; both hashes are shown.
        """
        # Evaluation of a checkpoint on other data is no resume.
        if self.trainer is not None and self.trainer.state.fn != TrainerFn.FITTING:
            return
        check_identity(self._identity(), state_dict)
        self._loaded = state_dict

    # Processes that are spawned open the corpus themselves.
    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name not in ("corpus", "stream", "_loader")}
        return state | {"_source": self.corpus.path, "_loader": None}

    def _place(self, *, evaluation: bool = False) -> dict[str, int]:
        """Data-parallel size and rank of the strategy; its model-parallel ranks read the same rows."""
        given = None
        if self.trainer is not None:
            own = getattr(self.trainer.strategy, "evaluation_sampler_kwargs", None) if evaluation else None
            given = own or self.trainer.distributed_sampler_kwargs
        given = given or {}
        return {"num_replicas": int(given.get("num_replicas", 1)), "rank": int(given.get("rank", 0))}

    def _identity(self) -> dict[str, str]:
        packing = hashlib.sha256(repr(dataclasses.astuple(self.packing_settings)).encode()).hexdigest()
        return {"corpus": self.corpus.fingerprint, "mixture": self.mixture.fingerprint, "packing": packing}
