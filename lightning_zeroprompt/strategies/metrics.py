# SPDX-License-Identifier: Apache-2.0
"""torchmetrics objects of a module that is cut over a pipeline.

They are updated by code behind the blocks, so what they have counted is on the last stage's rank; ``compute`` is called
by Lightning, or by hooks, on every rank. So the last stage's rank computes, together with its data-parallel neighbours
alone, and tells the others. A metric that a hook updates on every rank with what a step returned is not counted twice
either.

Not covered: metrics that are not registered in the module, such as a callback's own; they gather over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchmetrics import Metric, MetricCollection

from lightning_zeroprompt.pipeline.layout import ProcessGroups
from lightning_zeroprompt.strategies.broadcast import broadcast_nested

__all__ = ["PipelineMetrics"]


class PipelineMetrics:
    """The metrics of one module.

    Args:
        module: Cut.
        groups: The ranks.
        source: Global rank of the last stage.
        device: Of this rank.
        in_user_code: Whether a step is running, which it does on the last stage alone.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: ProcessGroups,
        source: int,
        device: torch.device,
        in_user_code: Callable[[], bool],
    ) -> None:
        self._groups, self._source, self._device = groups, source, device
        self._in_user_code = in_user_code
        self._parts = [part for part in module.modules() if isinstance(part, (Metric, MetricCollection))]
        self._computes: list[tuple[Metric, Callable[..., Any]]] = []
        self._computing = False

    def attach(self) -> None:
        """Make ``compute`` mean the whole pipeline's; until ``detach``."""
        if not self._computes:
            self._computes = [(part, part.compute) for part in self._parts if isinstance(part, Metric)]
        for metric, compute in self._computes:
            metric.compute = self._shared(metric, compute)  # type: ignore[method-assign]

    def detach(self) -> None:
        """Leave metrics as they were."""
        for metric, compute in self._computes:
            metric.compute = compute  # type: ignore[method-assign]
        self._computes = []

    def _shared(self, metric: Metric, compute: Callable[..., Any]) -> Callable[..., Any]:
        def shared(*args: Any, **kwargs: Any) -> Any:
            # Within forward it is the value of one batch, which is not gathered.
            if self._computing or not metric._should_unsync:
                return compute(*args, **kwargs)
            alone = self._in_user_code() or self._groups.layout.pipeline == 1
            here = dist.get_rank() == self._source
            value = self._compute(metric, compute, args, kwargs) if alone or here else None
            return value if alone else broadcast_nested(value, self._source, self._groups, self._device)

        return shared

    def _compute(self, metric: Metric, compute: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        parts = [part for part in metric.modules() if isinstance(part, Metric) and part.process_group is None]
        self._computing = True
        for part in parts:
            part.process_group = self._groups.data
        try:
            return compute(*args, **kwargs)
        finally:
            self._computing = False
            for part in parts:
                part.process_group = None

    @contextmanager
    def muted(self) -> Iterator[None]:
        """Count nothing: user code runs here only up to its blocks, and once more behind them."""
        updates = [(part, part.__dict__.get("update")) for part in self._parts]
        for part, _ in updates:
            part.__dict__["forward"] = _no_value if isinstance(part, Metric) else _no_values
            part.__dict__["update"] = _no_value
        try:
            yield
        finally:
            for part, update in updates:
                del part.__dict__["forward"], part.__dict__["update"]
                if update is not None:
                    part.__dict__["update"] = update


def _no_value(*args: Any, **kwargs: Any) -> Tensor:
    return torch.tensor(float("nan"))


def _no_values(*args: Any, **kwargs: Any) -> dict[str, Tensor]:
    return {}
