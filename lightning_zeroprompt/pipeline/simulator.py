# SPDX-License-Identifier: Apache-2.0
"""What a schedule takes with given costs: seconds, memory and bytes, before anything has run.

Lists are walked as the executor's machine does it. Every rank has a *host* that walks its list and launches work, and
three resources that it launches onto, each running its work in order: *computations*, *collectives* (gathers and
reductions of sharded weights), *messages*. Nothing blocks the host; a computation waits for its input and its weights.

* **Host.** A task can start once the host has come to it and ends no sooner than the host has launched its last kernel:
  short tasks then take the host's time, long ones hide it.
* **Messages.** By copy engines, a queue for each direction of each pair of ranks: a copy starts when its tensor is
  made; the receiver takes it out once its computations have come to the receive. By NCCL, one queue a rank: a message
  starts when both ranks' queues have come to it.
* **Collectives** start when the rank's computations have come to them. The ranks that share a stage's weights do the
  same at the same time, so one of them is simulated. FSDP's packing runs between computations: shards in front of a
  gather, weights in front of the first task that uses them, gradients in front of a reduction.
* **Contention.** Communication slows computations down (``Link.contention``). Which share of a task runs beside
  communication is taken from a first walk without any; a second walk stretches the tasks by it.
* **Memory** depends on lists alone, since allocations follow the host's order: exact counters, see ``peak_bytes``.

Lists depend on one another only through inputs and messages, so they are walked rank by rank, each as far as it gets:
no event queue, one visit an entry. Alternatives: a queue of events in global time is several times slower in Python
and is needed only if rates changed while a task runs; a graph's longest path cannot express NCCL's matching order.

Cost: some 2 microseconds an entry to make ready, and 0.6 an entry for each walk with copy engines (docs/pipeline.md).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from lightning_zeroprompt.pipeline.costs import Costs, stage_costs
from lightning_zeroprompt.pipeline.lowering import add_transfers, has_transfers
from lightning_zeroprompt.pipeline.memory import peak_bytes
from lightning_zeroprompt.pipeline.schedule import COMPUTE, Kind, Schedule, Task
from lightning_zeroprompt.pipeline.timeline import Cause, Lane, TaskSpan, Timeline, WaitSpan

__all__ = ["Simulation", "Simulator", "simulate"]

_COMPUTE, _SEND, _RECEIVE, _GATHER, _REDUCE, _HOST = range(6)
_Entry = tuple[int, int, int, int, float]
"""Of a rank's list: code, number of the task or stage, number of the message needed, stage whose weights are needed,
seconds (of the host for a computation, else of the transfer); numbers are -1 where there is nothing."""
_Spans = list[tuple[float, float]]


@dataclass(frozen=True)
class Simulation:
    """One step.

    Attributes:
        schedule: What ran, transfers included.
        seconds: From the step's start to the end of the last rank's optimizer step.
        busy: For each rank its seconds in F, B and W.
        peak_bytes: For each rank the most memory held: state, gathered weights, whole gradients, activations, inputs
            of weight gradients, receive buffers, workspace. An allocator's rounding comes on top.
        message_bytes: Of all messages between pipeline ranks.
        collective_bytes: Sent by all ranks of one pipeline in gathers and reductions.
    """

    schedule: Schedule
    seconds: float
    busy: tuple[float, ...]
    peak_bytes: tuple[int, ...]
    message_bytes: int
    collective_bytes: int
    _spans: list[_Spans] = field(repr=False)
    _waits: list[list[WaitSpan]] = field(repr=False)

    @property
    def bubble_share(self) -> float:
        """Share of the ranks' time in which they do not compute, the optimizer's step included; from 0 to 1."""
        return max(0.0, 1.0 - sum(self.busy) / (len(self.busy) * self.seconds))

    @property
    def bytes_moved(self) -> int:
        """Messages and collectives."""
        return self.message_bytes + self.collective_bytes

    @cached_property
    def timeline(self) -> Timeline:
        """When each rank did what; the optimizer's step is not drawn."""
        lanes = []
        for tasks, spans, waits, peak in zip(
            self.schedule.tasks, self._spans, self._waits, self.peak_bytes, strict=True
        ):
            computed = (task for task in tasks if task.kind in COMPUTE)
            done = tuple(TaskSpan(task, *span) for task, span in zip(computed, spans, strict=True))
            lanes.append(Lane(done, tuple(waits), peak))
        return Timeline(tuple(lanes))


class Simulator:
    """A schedule made ready to be simulated many times.

    Args:
        schedule: With or without transfers; they are added as the executor does.
        costs: Of the model and the machine.
        cuts: For each stage its first block and the one behind its last.
        data_parallel: D, ranks that share each stage's weights; with 1 nothing is sharded.

    Raises:
        ValueError: If the cuts do not fit the costs or the schedule, or a rank waits for what never comes.
    """

    def __init__(
        self, schedule: Schedule, costs: Costs, cuts: Sequence[tuple[int, int]], *, data_parallel: int = 1
    ) -> None:
        if len(cuts) != schedule.stages:
            raise ValueError(f"{len(cuts)} cuts for the {schedule.stages} stages of schedule {schedule.name!r}")
        if data_parallel < 1:
            raise ValueError(f"data_parallel={data_parallel}: at least 1 rank holds a stage")
        self.schedule = schedule if has_transfers(schedule) else add_transfers(schedule)
        self.costs, self.data_parallel = costs, data_parallel
        self.stages = stage_costs(costs, cuts)
        self.message_bytes = self.collective_bytes = 0
        self._nccl = costs.transport == "nccl"
        self._ranks = schedule.ranks
        count = len(self.stages) * schedule.micro_batches
        self._backward, self._weight = count, 2 * count
        self._peers = [-1] * (2 * count)
        self._transfer = [0.0] * (2 * count)
        self._entries = [self._prepare(rank, tasks) for rank, tasks in enumerate(self.schedule.tasks)]
        self._tails = [
            sum(self.stages[stage].optimizer for stage in schedule.placement.stages_of(rank)) / data_parallel
            for rank in range(self._ranks)
        ]
        self._seconds = [stage.forward for stage in self.stages for _ in range(schedule.micro_batches)]
        self._seconds += [stage.backward for stage in self.stages for _ in range(schedule.micro_batches)]
        self._seconds += [stage.weight for stage in self.stages for _ in range(schedule.micro_batches)]
        gather, reduce = costs.gather, costs.reduce
        self._launch = [
            tuple(costs.host_action + link.host + link.host_tensor * stage.tensors for link in (gather, reduce))
            for stage in self.stages
        ]
        self._pack = [
            (gather.copy * stage.parameters / data_parallel, reduce.copy * stage.gradients) for stage in self.stages
        ]
        self._unpack = [gather.copy * stage.parameters for stage in self.stages]
        self._contended = (self._nccl and costs.message.contention > 1) or (
            data_parallel > 1 and max(costs.gather.contention, costs.reduce.contention) > 1
        )

    def _prepare(self, rank: int, tasks: Sequence[Task]) -> list[_Entry]:
        """A rank's list as numbers."""
        costs, placement, micro_batches = self.costs, self.schedule.placement, self.schedule.micro_batches
        action, last, share = costs.host_action, self.schedule.stages - 1, (self.data_parallel - 1) / self.data_parallel
        shared = self.data_parallel > 1
        owners = [placement.rank_of(stage) for stage in range(last + 1)]
        entries: list[_Entry] = []
        for task in tasks:
            kind, stage = task.kind, task.stage
            number = stage * micro_batches + task.micro_batch
            block = self.stages[stage]
            if kind is Kind.FORWARD:
                needed = number - micro_batches if stage and owners[stage - 1] != rank else -1
                entries.append((_COMPUTE, number, needed, stage, action + block.host_forward))
            elif kind is Kind.BACKWARD:
                needed = self._backward + number + micro_batches
                needed = needed if stage < last and owners[stage + 1] != rank else -1
                entries.append((_COMPUTE, self._backward + number, needed, stage, action + block.host_backward))
            elif kind is Kind.WEIGHT:
                entries.append((_COMPUTE, self._weight + number, -1, -1, action + block.host_weight))
            elif kind is Kind.SEND_F or kind is Kind.SEND_B:
                forward = kind is Kind.SEND_F
                message = number if forward else self._backward + number
                size = block.output if forward else self.stages[stage - 1].output
                self._peers[message] = owners[stage + 1 if forward else stage - 1]
                self._transfer[message] = costs.message.seconds(size)
                self.message_bytes += size
                entries.append((_SEND, message, -1, -1, action))
            elif kind is Kind.RECV_F or kind is Kind.RECV_B:
                forward = kind is Kind.RECV_F
                message = number - micro_batches if forward else self._backward + number + micro_batches
                entries.append((_RECEIVE, message, owners[stage - 1 if forward else stage + 1], -1, action))
            elif kind is Kind.GATHER and shared:
                size = round(share * block.parameters)
                self.collective_bytes += size
                entries.append((_GATHER, stage, -1, -1, costs.gather.seconds(size)))
            elif kind is Kind.REDUCE and shared:
                size = round(share * block.gradients)
                self.collective_bytes += size
                entries.append((_REDUCE, stage, -1, -1, costs.reduce.seconds(size)))
            else:
                entries.append((_HOST, stage, -1, -1, action))
        return entries

    def _jittered(self, jitter: float, seed: int) -> list[float]:
        draw = random.Random(seed).gauss
        seconds = [value * max(0.1, draw(1.0, jitter)) for value in self._seconds]
        count = self.schedule.micro_batches
        for rank in range(self._ranks):
            runs = [
                range(first, first + count)
                for stage in self.schedule.placement.stages_of(rank)
                for first in range(stage * count, len(seconds), len(self.stages) * count)
            ]
            drawn = sum(seconds[number] for run in runs for number in run)
            factor = sum(self._seconds[number] for run in runs for number in run) / drawn if drawn else 1.0
            for run in runs:
                for number in run:
                    seconds[number] *= factor
        return seconds

    @cached_property
    def peak_bytes(self) -> tuple[int, ...]:
        """For each rank the most memory that it holds; see :class:`Simulation`."""
        return tuple(
            peak_bytes(tasks, self.stages, self.schedule.placement.stages_of(rank), self.data_parallel)
            for rank, tasks in enumerate(self.schedule.tasks)
        )

    def run(self, *, jitter: float = 0.0, seed: int = 0, slower_hosts: float = 1.0) -> Simulation:
        """Simulate a step.

        Args:
            jitter: Standard deviation of each task's time, as a share of it. A rank's work as a whole stays the same,
                so that what is compared under the same jitter differs by how an order bears it, not by luck.
            seed: Of the jitter.
            slower_hosts: Times as long as the costs say that hosts take.

        Raises:
            ValueError: If a rank waits for what never comes.
        """
        seconds = self._jittered(jitter, seed) if jitter else self._seconds
        walk = _Walk(self, seconds, slower_hosts)
        if self._contended:
            walk = _Walk(self, walk.stretched(), slower_hosts)
        busy = tuple(sum(end - start for start, end in spans) for spans in walk.spans)
        return Simulation(
            self.schedule,
            walk.duration(self._tails),
            busy,
            self.peak_bytes,
            self.message_bytes,
            self.collective_bytes,
            walk.spans,
            walk.waits,
        )


class _Walk:
    """One walk over all lists."""

    def __init__(self, simulator: Simulator, seconds: Sequence[float], slower_hosts: float) -> None:
        self._simulator, self._seconds, self._slower = simulator, seconds, slower_hosts
        ranks = simulator._ranks
        self.spans: list[_Spans] = [[] for _ in range(ranks)]
        self.waits: list[list[WaitSpan]] = [[] for _ in range(ranks)]
        self._clock, self._host, self._collectives = [0.0] * ranks, [0.0] * ranks, [0.0] * ranks
        self._arrival = [-1.0] * len(simulator._transfer)
        # When communication occupies a rank's multiprocessors: gathers, reductions, and messages by NCCL.
        self._gathers: list[_Spans] = [[] for _ in range(ranks)]
        self._reductions: list[_Spans] = [[] for _ in range(ranks)]
        self._messages: list[_Spans] = [[] for _ in range(ranks)]
        self._waiting: dict[int, int] = {}
        self._copied = [-1.0] * len(simulator._transfer)
        self._posted = [-1.0] * len(simulator._transfer)
        self._copying: dict[int, float] = {}
        self._streams: list[deque[tuple[int, int, float]]] = [deque() for _ in range(ranks)]
        self._free = [0.0] * ranks
        self._run()

    def _run(self) -> None:
        simulator, seconds, arrival, slower = self._simulator, self._seconds, self._arrival, self._slower
        ranks, nccl = simulator._ranks, simulator._nccl
        position = [0] * ranks
        gathered, unpack = [0.0] * len(simulator.stages), [0.0] * len(simulator.stages)
        todo = list(range(ranks))
        while todo:
            rank = todo.pop()
            entries, at = simulator._entries[rank], position[rank]
            clock, host, collectives = self._clock[rank], self._host[rank], self._collectives[rank]
            spans = self.spans[rank]
            while at < len(entries):
                code, number, needed, stage, time = entries[at]
                begin = clock if clock > host else host
                if code == _COMPUTE:
                    if needed >= 0:
                        there = arrival[needed]
                        if there < 0:
                            self._waiting[needed] = rank
                            break
                        if there > begin:
                            self.waits[rank].append(WaitSpan(Cause.RECEIVE, begin, there))
                            begin = there
                    if stage >= 0 and gathered[stage] > begin:
                        self.waits[rank].append(WaitSpan(Cause.GATHER, begin, gathered[stage]))
                        begin = gathered[stage]
                    if stage >= 0 and unpack[stage]:
                        begin += unpack[stage]
                        unpack[stage] = 0.0
                    host += slower * time
                    clock = begin + seconds[number]
                    if host > clock:
                        clock = host
                    spans.append((begin, clock))
                elif code == _SEND:
                    host += slower * time
                    send = self._enqueue if nccl else self._copy
                    todo.extend(send(rank, simulator._peers[number], number, begin))
                elif code == _RECEIVE:
                    host += slower * time
                    if nccl:
                        todo.extend(self._enqueue(rank, needed, number, begin))
                    else:
                        self._posted[number] = begin
                        if self._copied[number] >= 0:
                            self._arrive(number)
                elif code == _HOST:
                    host += slower * time
                else:
                    host += slower * simulator._launch[number][code == _REDUCE]
                    packed = simulator._pack[number][code == _REDUCE]
                    if packed:
                        clock = begin = begin + packed
                    begin = max(begin, collectives)
                    collectives = begin + time
                    if code == _GATHER:
                        gathered[number], unpack[number] = collectives, simulator._unpack[number]
                        self._gathers[rank].append((begin, collectives))
                    else:
                        self._reductions[rank].append((begin, collectives))
                at += 1
            position[rank], self._clock[rank], self._host[rank] = at, clock, host
            self._collectives[rank] = collectives
        stuck = [
            f"rank {rank} at {tasks[at]} (entry {at + 1} of {len(tasks)})"
            for rank, (tasks, at) in enumerate(zip(simulator.schedule.tasks, position, strict=True))
            if at < len(tasks)
        ]
        if stuck:
            raise ValueError(f"schedule {simulator.schedule.name!r} waits for itself: {'; '.join(stuck)}")

    def _copy(self, rank: int, peer: int, message: int, begin: float) -> list[int]:
        """Send by a copy engine; returns the rank that has waited for it."""
        queue = rank * self._simulator._ranks + peer
        done = max(begin, self._copying.get(queue, 0.0)) + self._simulator._transfer[message]
        self._copying[queue] = self._copied[message] = done
        if self._posted[message] < 0:
            return []
        self._arrive(message)
        return [self._waiting.pop(message)] if message in self._waiting else []

    def _arrive(self, message: int) -> None:
        # What lies in the receiver's ring already still has to be copied out of it.
        self._arrival[message] = max(
            self._copied[message], self._posted[message] + self._simulator.costs.message.latency
        )

    def _enqueue(self, rank: int, peer: int, message: int, begin: float) -> list[int]:
        """Put one end of a message on a rank's stream; returns the ranks that have waited for what can now run."""
        streams, woken = self._streams, []
        streams[rank].append((message, peer, begin))
        heads = [rank]
        while heads:
            one = heads.pop()
            if not streams[one]:
                continue
            message, other, mine = streams[one][0]
            if not streams[other] or streams[other][0][0] != message:
                continue
            theirs = streams[other][0][2]
            launched = {one: max(mine, self._free[one]), other: max(theirs, self._free[other])}
            end = max(launched.values()) + self._simulator._transfer[message]
            for side, start in launched.items():
                streams[side].popleft()
                self._free[side] = end
                self._messages[side].append((start, end))
            self._arrival[message] = end
            if message in self._waiting:
                woken.append(self._waiting.pop(message))
            heads += [one, other]
        return woken

    def stretched(self) -> list[float]:
        """Seconds of tasks, longer by what communication beside them costs."""
        costs, seconds = self._simulator.costs, list(self._seconds)
        for rank, spans in enumerate(self.spans):
            kinds = (
                (costs.gather, self._gathers),
                (costs.reduce, self._reductions),
                (costs.message, self._messages),
            )
            shares = [0.0] * len(spans)
            for link, occupied in kinds:
                if link.contention > 1:
                    for index, share in enumerate(_shares(spans, occupied[rank])):
                        shares[index] += (link.contention - 1) * share
            numbers = (number for code, number, *_ in self._simulator._entries[rank] if code == _COMPUTE)
            for number, share in zip(numbers, shares, strict=True):
                seconds[number] *= 1 + share
        return seconds

    def duration(self, tails: Sequence[float]) -> float:
        """When the last rank has done everything, its optimizer's step included."""
        ends = map(max, self._clock, self._host, self._collectives)
        return max(end + tail for end, tail in zip(ends, tails, strict=True))


def _shares(spans: _Spans, occupied: _Spans) -> list[float]:
    """Which share of each span lies in others; both are in order and do not overlap among themselves."""
    shares, at = [], 0
    for start, end in spans:
        while at < len(occupied) and occupied[at][1] <= start:
            at += 1
        inside, each = 0.0, at
        while each < len(occupied) and occupied[each][0] < end:
            inside += min(end, occupied[each][1]) - max(start, occupied[each][0])
            each += 1
        shares.append(inside / (end - start) if end > start else 0.0)
    return shares


def simulate(
    schedule: Schedule,
    costs: Costs,
    cuts: Sequence[tuple[int, int]],
    *,
    data_parallel: int = 1,
    jitter: float = 0.0,
    seed: int = 0,
) -> Simulation:
    """Simulate one step of a schedule.

    Args:
        schedule: With or without transfers; they are added as the executor does.
        costs: Of the model and the machine.
        cuts: For each stage its first block and the one behind its last, as ``balanced_cuts`` gives them.
        data_parallel: D, ranks that share each stage's weights; with 1 nothing is sharded.
        jitter: Standard deviation of each task's time, as a share of it.
        seed: Of the jitter.

    Raises:
        ValueError: If the cuts do not fit the costs or the schedule, or a rank waits for what never comes.

    >>> from lightning_zeroprompt.pipeline.catalogue import build_schedule
    >>> costs = Costs.uniform(2, forward=1.0, backward=1.0, weight=1.0)
    >>> step = simulate(build_schedule("1f1b", ranks=2, micro_batches=4), costs, [(0, 1), (1, 2)])
    >>> step.seconds, step.busy
    (14.0, (12.0, 12.0))
    """
    return Simulator(schedule, costs, cuts, data_parallel=data_parallel).run(jitter=jitter, seed=seed)
