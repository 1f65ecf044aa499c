# SPDX-License-Identifier: Apache-2.0
"""What user code logs on the last stage, logged on every rank of the pipeline.

User code runs behind the last block, so ``self.log`` is called on one rank only; callbacks that monitor a value, and
``sync_dist``, need it on all. Calls are recorded a micro-batch at a time, combined by their ``reduce_fx``, sent round
and made again everywhere:

* ``"mean"`` (the default): the mean weighted by the micro-batches' loss weights, or by ``batch_size`` where one is
  given;
* ``"sum"``, ``"max"``, ``"min"``: that, over the micro-batches;
* anything else Lightning refuses, on every rank.

A ``Metric`` object keeps its state on the last stage (see ``metrics``). Logged ``on_step`` in training, it shows the
weighted mean of its values for the micro-batches; its value for an epoch is exact.

Names and arguments go round on the CPU, and only when they change; values go in one tensor, which the CPU never waits
for.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from torch import Tensor
from torchmetrics import Metric

__all__ = ["LogRelay"]

_LOG_ARGUMENTS = tuple(inspect.signature(pl.LightningModule.log).parameters)[3:]


@dataclass(slots=True)
class _Record:
    name: str
    arguments: dict[str, Any]
    metric: str | None = None
    values: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One call of ``self.log`` as it is made on every rank."""

    name: str
    arguments: dict[str, Any]
    metric: str | None
    dtype: str


class LogRelay:
    """Stands in for ``LightningModule.log`` while user code runs on a stage.

    Args:
        module: The user's module.
        source: Global rank of the last stage.
        group: The pipeline's ranks, for tensors.
        control: The same ranks on the CPU.
        device: Where values live.
    """

    def __init__(
        self,
        module: pl.LightningModule,
        source: int,
        group: dist.ProcessGroup,
        control: dist.ProcessGroup,
        device: torch.device,
    ) -> None:
        self._module, self._source, self._group, self._control = module, source, group, control
        self._device = device
        self._records: dict[tuple[str, int], _Record] = {}
        self._sent: tuple[tuple[_Entry, ...], str | None, bool] = ((), None, False)
        self._metrics = {id(part): name for name, part in module.named_modules() if isinstance(part, Metric)}

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Drop what is logged: user code runs here only up to its blocks."""
        with self._log_replaced(lambda *args, **kwargs: None):
            yield

    @contextmanager
    def recording(self, weight: Tensor) -> Iterator[None]:
        """Record what is logged for one micro-batch.

        Args:
            weight: Of the micro-batch in means.
        """
        seen: dict[str, int] = {}

        def log(name: str, value: Any, *args: Any, **kwargs: Any) -> None:
            if args:
                kwargs |= dict(zip(_LOG_ARGUMENTS, args, strict=False))
            count = seen[name] = seen.get(name, -1) + 1
            self._record(name, count, value, kwargs, weight)

        with self._log_replaced(log):
            yield

    @contextmanager
    def _log_replaced(self, log: Any) -> Iterator[None]:
        self._module.log = log  # type: ignore[method-assign]
        try:
            yield
        finally:
            del self._module.log

    def _record(self, name: str, count: int, value: Any, arguments: dict[str, Any], weight: Tensor) -> None:
        record = self._records.get((name, count))
        if record is None:
            record = self._records[name, count] = _Record(name, dict(arguments))
            record.arguments.pop("batch_size", None)
        if isinstance(value, Metric):
            record.metric = self._metrics.get(id(value)) or arguments.get("metric_attribute")
            if record.metric is None:
                raise ValueError(f"self.log({name!r}, ...) was given a metric that is no attribute of the module")
            value = getattr(value, "_forward_cache", None)
            if value is None:
                # Updated, not called: there is no value of this step.
                return
        if isinstance(value, dict):
            raise TypeError(f"self.log({name!r}, <dict>): use self.log_dict")
        if not isinstance(value, Tensor):
            # As Lightning does, whatever precision plugins make of the default type.
            value = torch.tensor(value, dtype=torch.promote_types(torch.get_default_dtype(), torch.float32))
        tensor = value.detach().to(self._device)
        if tensor.numel() != 1:
            raise ValueError(f"self.log({name!r}, ...) was given {tensor.numel()} numbers; log one")
        size = arguments.get("batch_size")
        record.values.append(tensor.reshape(()))
        record.weights.append(weight if size is None else torch.as_tensor(float(size), device=self._device))
        if size is not None:
            record.sizes.append(int(size))

    def send(self, loss: Tensor | None = None, more: bool = False) -> tuple[Tensor | None, bool]:
        """Tell all ranks of the pipeline, and log there; every rank calls this at the end of a step.

        Args:
            loss: The batch's loss on the last stage's rank; elsewhere ignored.
            more: Something that the last stage's rank says.

        Returns:
            What the last stage's rank gave; a loss in float32 or better.
        """
        here = dist.get_rank() == self._source
        message: list[Any] = [None]
        values: list[Tensor] = []
        if here:
            entries, values = self._combine()
            dtype = None
            if loss is not None:
                values.append(loss.detach().double())
                dtype = _name(torch.promote_types(loss.dtype, torch.float32))
            described = (entries, dtype, more)
            # Nothing changed: nothing to say.
            message = [None if described == self._sent else described]
            self._sent = described
        if dist.get_world_size(self._group) > 1:
            dist.broadcast_object_list(message, self._source, group=self._control)
        if message[0] is not None:
            self._sent = message[0]
        entries, dtype, more = self._sent
        count = len(entries) + (dtype is not None)
        packed = torch.stack(values) if values else torch.zeros(count, dtype=torch.float64, device=self._device)
        if count and dist.get_world_size(self._group) > 1:
            dist.broadcast(packed, self._source, group=self._group)
        for entry, value in zip(entries, packed.unbind(), strict=False):
            self._log_again(entry, value)
        return (None if dtype is None else packed[-1].to(getattr(torch, dtype))), more

    def _log_again(self, entry: _Entry, value: Tensor) -> None:
        if entry.metric is None:
            self._module.log(entry.name, value.to(getattr(torch, entry.dtype)), **entry.arguments)
            return
        metric = self._module.get_submodule(entry.metric)
        metric._forward_cache = value.to(getattr(torch, entry.dtype)) if entry.dtype else None  # type: ignore[assignment]
        self._module.log(entry.name, metric, **entry.arguments)  # type: ignore[arg-type]

    def _combine(self) -> tuple[tuple[_Entry, ...], list[Tensor]]:
        records, self._records = list(self._records.values()), {}
        entries, values = [], []
        for record in records:
            arguments = dict(record.arguments)
            if record.sizes:
                arguments["batch_size"] = sum(record.sizes)
            dtype = _name(record.values[0].dtype) if record.values else ""
            entries.append(_Entry(record.name, arguments, record.metric, dtype))
            values.append(
                _reduce(record.values, record.weights, arguments.get("reduce_fx", "mean"))
                if record.values
                else torch.zeros((), dtype=torch.float64, device=self._device)
            )
        return tuple(entries), values


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _reduce(values: Sequence[Tensor], weights: Sequence[Tensor], how: Any) -> Tensor:
    stacked = torch.stack([value.double() for value in values])
    how = how.lower() if isinstance(how, str) else how
    if how in ("sum", torch.sum):
        return stacked.sum()
    if how in ("max", max, torch.max):
        return stacked.max()
    if how in ("min", min, torch.min):
        return stacked.min()
    weighted = torch.stack([weight.double() for weight in weights])
    # The mean loss of a micro-batch without targets is NaN.
    return (torch.where(weighted == 0, 0.0, stacked) * weighted).sum() / weighted.sum()
