# SPDX-License-Identifier: Apache-2.0
"""How long parts of a block's run take: measured on a device, or estimated from counted operations.

* :class:`DeviceMeter` times: on a GPU by events, with the GPU kept busy while the host launches, and how long launching
  took by the host's clock; medians of a few repeats. Memory on a GPU is the allocator's. Alone, work meets a GPU at
  rest; how fast it is at work is seen within a second of the same work. Behind matrix products, which draw more power
  than a T5's kernels, its steps were predicted up to 11 % too long (benchmarks/RESULTS.md).
* :class:`FlopMeter` counts operations with ``torch.utils.flop_counter``, on the meta device too, and divides by a rate:
  a model that does not fit, on a machine that one does not have.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_zeroprompt.pipeline.run_ahead import LONGEST_BUSY, Span, mark, reached, run_ahead, seconds_between
from lightning_zeroprompt.pipeline.torch_compat import fused_attention, keep_busy

__all__ = ["DeviceMeter", "FlopMeter", "Meter", "Phase", "medians"]

_SEEN = 5
"""Runs whose hosts say how long the next one may need."""


@dataclass(frozen=True, slots=True)
class Phase:
    """What one part of a block's run took."""

    seconds: float
    host: float
    workspace: int = 0

    def split(self, times: int, alone: Phase, *, once: bool = False) -> tuple[Phase, Phase]:
        """What one of so many blocks in a row takes, and what a call takes besides, however many blocks it runs.

        Args:
            times: Blocks that this was measured with.
            alone: Of one block by itself.
            once: Whether the device makes something once a call; else all that it does counts as the blocks'.
        """
        each = (self.seconds - alone.seconds) / (times - 1) if once else self.seconds / times
        block = Phase(
            max(each, self.seconds / times / 2), max(0.0, self.host - alone.host) / (times - 1), alone.workspace
        )
        return block, Phase(max(0.0, alone.seconds - block.seconds), max(0.0, alone.host - block.host))

    def without(self, call: Phase, *, once: bool = False) -> Phase:
        """What a block alone takes without its call.

        Args:
            call: Of a block that was measured in a row, too.
            once: As for :meth:`split`.
        """
        seconds = max(self.seconds - call.seconds, self.seconds / 2) if once else self.seconds
        return Phase(seconds, max(self.host - call.host, self.host / 2), self.workspace)


class Meter(Protocol):
    """Runs the phases of a block, and says what each took."""

    device: torch.device
    row: int
    """How often a block is run in a row where it takes what it returns."""

    def context(self) -> AbstractContextManager[Any]:
        """What forward passes run in."""

    def measure(self, phases: Sequence[Callable[[], Any]], moved: int) -> list[Phase]:
        """Run phases one after another.

        Args:
            phases: Each relies on the ones before it.
            moved: Bytes that a pass over the block reads or writes besides its operations' factors.
        """

    def under_load(self, phases: Sequence[Callable[[], Any]]) -> list[Phase | None] | None:
        """What each phase takes, one after another, once the device has been busy for a while.

        Args:
            phases: As of :meth:`measure`.

        Returns:
            None for a phase that could not be measured, and for all where that makes no difference.
        """


class DeviceMeter:
    """Measures on a device.

    Args:
        device: Where the blocks are.
        repeats: How often; the median counts.
        warmup: Runs before that.
        row: How often a block is run in a row where it takes what it returns: what a call of autograd, or of a stage,
            costs the host is told from what a block does.
        load: Seconds for which a GPU is kept at work to see how fast it is then: its clocks fall as it reaches the
            power it may draw.
    """

    def __init__(
        self, device: torch.device, repeats: int = 5, warmup: int = 2, row: int = 4, load: float = 1.0
    ) -> None:
        self.device, self.row, self._load = device, row, load
        self._repeats, self._warmup, self._cuda = repeats, warmup, device.type == "cuda"

    def measure(self, phases: Sequence[Callable[[], Any]], moved: int) -> list[Phase]:
        """See :class:`Meter`."""
        every: list[list[_Run]] = [[] for _ in phases]
        run = 0
        while run < self._warmup + self._repeats or (run < 4 * self._repeats and not self._enough(every)):
            for index, phase in enumerate(phases):
                busy = max((2 * seen.host for seen in every[index][-_SEEN:]), default=1e-3)
                every[index].append(self._once(phase, min(busy, LONGEST_BUSY)))
            run += 1
        return [self._phase(runs[self._warmup :]) for runs in every]

    def under_load(self, phases: Sequence[Callable[[], Any]]) -> list[Phase | None] | None:
        """See :class:`Meter`."""
        if not self._cuda or self._load <= 0:
            return None
        return medians(run_ahead(phases, self.device, seconds=self._load), len(phases))

    def context(self) -> AbstractContextManager[Any]:
        """Nothing special."""
        return nullcontext()

    def _enough(self, every: Sequence[Sequence[_Run]]) -> bool:
        return all(sum(run.ahead for run in runs[self._warmup :]) >= self._repeats for runs in every)

    def _phase(self, runs: Sequence[_Run]) -> Phase:
        """Medians, of runs without gaps where there are some."""
        ahead = [run.seconds for run in runs if run.ahead] or [run.seconds for run in runs]
        host = statistics.median(run.host for run in runs) if self._cuda else 0.0
        return Phase(statistics.median(ahead), host, max(run.workspace for run in runs))

    def _once(self, phase: Callable[[], Any], busy: float) -> _Run:
        if not self._cuda:
            start = time.perf_counter()
            phase()
            return _Run(time.perf_counter() - start, 0.0, 0, ahead=True)
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        held = torch.cuda.memory_allocated(self.device)
        # The device is kept busy while the host launches, so that its time has no gaps in it.
        keep_busy(busy)
        begin, launching = mark(), time.perf_counter()
        phase()
        host, ahead = time.perf_counter() - launching, not reached(begin)
        end = mark()
        torch.cuda.synchronize(self.device)
        after = max(held, torch.cuda.memory_allocated(self.device))
        workspace = max(0, torch.cuda.max_memory_allocated(self.device) - after)
        return _Run(seconds_between(begin, end), host, workspace, ahead)


@dataclass(frozen=True, slots=True)
class _Run:
    """Of a phase; ``ahead`` says that the host was through before the device began."""

    seconds: float
    host: float
    workspace: int
    ahead: bool


def medians(spans: Sequence[Span], phases: int) -> list[Phase | None]:
    """What each phase takes, by the later half of its runs ahead; None where there is none.

    Args:
        spans: Of phases that have run.
        phases: How many there are.
    """
    runs: list[list[Span]] = [[] for _ in range(phases)]
    for span in spans:
        runs[span.phase].append(span)
    found: list[Phase | None] = []
    for own in runs:
        ahead = [span.seconds for span in own if span.ahead]
        host = [span.host for span in own]
        found.append(Phase(_late_median(ahead), _late_median(host)) if ahead else None)
    return found


def _late_median(values: Sequence[float]) -> float:
    return statistics.median(values[len(values) // 2 :])


class FlopMeter:
    """Estimates from counted operations.

    Args:
        flops: Operations a second that matrix products reach.
        bandwidth: Bytes a second to and from the device's memory.
        host: Seconds in which the host launches one phase of one block.
        device: Where the blocks are; the meta device runs nothing.
    """

    def __init__(self, flops: float, bandwidth: float, host: float = 0.0, device: torch.device | str = "meta") -> None:
        if flops <= 0 or bandwidth <= 0 or host < 0:
            raise ValueError(f"flops={flops}, bandwidth={bandwidth} have to be above 0, host={host} at least 0")
        self.row = 1
        self._flops, self._bandwidth, self._host, self.device = flops, bandwidth, host, torch.device(device)

    def measure(self, phases: Sequence[Callable[[], Any]], moved: int) -> list[Phase]:
        """See :class:`Meter`."""
        found = []
        for phase in phases:
            with FlopCounterMode(display=False) as counter:
                phase()
            found.append(Phase(counter.get_total_flops() / self._flops + moved / self._bandwidth, self._host))
        return found

    def under_load(self, phases: Sequence[Callable[[], Any]]) -> None:
        """See :class:`Meter`: the rate that was given is what counts."""

    def context(self) -> AbstractContextManager[Any]:
        """Attention as GPUs do it, without the matrix of all scores that it would make on the meta device."""
        return _FusedAttention() if self.device.type == "meta" else nullcontext()


class _FusedAttention(TorchFunctionMode):
    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        run = fused_attention if func is F.scaled_dot_product_attention else func
        return run(*args, **(kwargs or {}))
