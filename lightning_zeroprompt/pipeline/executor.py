# SPDX-License-Identifier: Apache-2.0
"""Runs schedules on ``torch.distributed.pipelining``: one step of training, or one forward pass.

Torch's runtime walks a rank's list; the stage below moves the tensors. Messages carry no header once their shapes are
known: the first time a stage meets micro-batches of a new *signature* (the shapes in the batch), each sender tells the
receiver what will come, and both remember. Every rank of a pipeline is given the same batch, so they agree on when that
is. Receive buffers live from the receive to the task that uses them, sent tensors until the message has gone, so memory
does not grow with the number of micro-batches.

Cost: one blocking message a stage and signature, once. The alternatives are torch's own exchange (shapes fixed for
ever, and the user's loss is run on uninitialised memory) and a header a message (a wait for the GPU each time).
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from lightning_zeroprompt.pipeline.chain import Calls
from lightning_zeroprompt.pipeline.lowering import add_collectives, add_transfers, has_transfers
from lightning_zeroprompt.pipeline.peer_copy import PeerCopies
from lightning_zeroprompt.pipeline.recorder import StepRecorder
from lightning_zeroprompt.pipeline.schedule import Kind, Placement, Schedule, Task
from lightning_zeroprompt.pipeline.stage import StageModule
from lightning_zeroprompt.pipeline.timeline import Cause
from lightning_zeroprompt.pipeline.torch_compat import (
    OneGroup,
    RuntimeBase,
    StageBase,
    UnshardedGradBuffers,
    finish_reductions,
    reduce_gradients,
)
from lightning_zeroprompt.pipeline.weight_grad import WeightGradStore

__all__ = ["MicroBatch", "PipelineExecutor", "forward_schedule"]

_HEADER = 256
_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What the executor asks of the code around it, for one micro-batch.

    Attributes:
        signature: Equal for two micro-batches whose tensors have equal shapes on every stage.
        capture: Runs user code up to the blocks; called once a rank, in its first forward.
        seed: Seeds random numbers; called with -1 before user code and with a stage's index before its blocks.
        context: What forward passes run in, such as autocast.
    """

    signature: Hashable
    capture: Callable[[], Calls]
    seed: Callable[[int], None] = lambda stage: None
    context: Callable[[], AbstractContextManager[Any]] = nullcontext


@dataclass(frozen=True, slots=True)
class _Meta:
    """Shape and type of a message's tensor, and whether a gradient comes back for it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self, device: torch.device) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device=device)


class _Work(Protocol):
    """A message under way."""

    def is_completed(self) -> bool:
        """Whether it is over."""

    def wait(self) -> Any:
        """Make the current stream wait for it."""


class _Stage(StageBase):
    """One stage on torch's runtime."""

    def __init__(self, executor: PipelineExecutor, module: StageModule, stages: int) -> None:
        self._executor = executor
        self._sharded = isinstance(module, FSDPModule)
        self.store = WeightGradStore(UnshardedGradBuffers(module) if isinstance(module, FSDPModule) else None)
        super().__init__(module, module.stage, stages, executor.device, executor.group, self.store.take)
        self._group = OneGroup.of(module)
        self._run: Callable[..., Any] = module if self._group is None else self._group.forward
        self._inputs: dict[int, tuple[Tensor, ...]] = {}
        self._output_grads: dict[int, tuple[Tensor | None, ...]] = {}
        self._works: dict[tuple[Kind, int], Sequence[_Work]] = {}
        self._sent: deque[tuple[Sequence[_Work], list[Tensor]]] = deque()
        self._outputs: dict[int, list[_Meta]] = {}

    # -- forward --------------------------------------------------------------------------------------------------

    def forward_maybe_with_nosync(self, *stream: Any, micro_batch: int) -> Any:
        executor = self._executor
        given = executor.micro_batch(micro_batch)
        if executor.recorder is not None:
            executor.recorder.begin(Task(Kind.FORWARD, self.stage_index, micro_batch))

        def calls() -> Calls:
            found = executor.calls(micro_batch)
            given.seed(self.stage_index)
            return found

        with given.context(), self.store.record():
            output = self._run(*stream, calls=calls)
        executor.forward_done(self.stage_index, micro_batch)
        outputs = output if isinstance(output, tuple) else (output,)
        if not self.is_last:
            for out in outputs:
                if not isinstance(out, Tensor):
                    raise TypeError(
                        f"stage {self.stage_index} returns {type(out).__name__}; tensors alone travel between stages"
                    )
            self._outputs[micro_batch] = [_Meta(tuple(o.shape), o.dtype, o.requires_grad) for o in outputs]
        return output

    def _retrieve_recv_activations(self, fwd_chunk_id: int) -> tuple[Tensor, ...]:
        self._wait(Kind.RECV_F, fwd_chunk_id)
        return self._inputs.pop(fwd_chunk_id)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        metas = self._executor.metas(self, fwd_chunk_id)
        tensors = tuple(meta.empty(self.device) for meta in metas)
        self._receive(Kind.RECV_F, fwd_chunk_id, tensors, self.stage_index - 1)
        train = self.has_backward and torch.is_grad_enabled()
        self._inputs[fwd_chunk_id] = tuple(
            tensor.requires_grad_() if meta.requires_grad and train else tensor
            for tensor, meta in zip(tensors, metas, strict=True)
        )
        return []

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        outputs = [out.detach() for out in self.fwd_cache[fwd_chunk_id][0]]
        self._executor.announce(self, fwd_chunk_id, self._outputs[fwd_chunk_id])
        self._send(outputs, self.stage_index + 1)
        return []

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        outputs = prev_stage_outputs if isinstance(prev_stage_outputs, tuple) else (prev_stage_outputs,)
        train = self.has_backward and torch.is_grad_enabled()
        self._inputs[mb_index] = tuple(out.detach().requires_grad_(out.requires_grad and train) for out in outputs)

    # -- backward -------------------------------------------------------------------------------------------------

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        self._outputs.pop(bwd_chunk_id, None)
        recorder = self._executor.recorder
        if recorder is not None:
            recorder.begin(Task(Kind.BACKWARD, self.stage_index, bwd_chunk_id))
        # A checkpointed block runs its forward pass here, and has to find what it found then.
        with self.store.record():
            super().backward_one_chunk(bwd_chunk_id, loss, full_backward, last_backward)
        if self._group is not None:
            self._group.backward_done()
        if recorder is not None:
            recorder.end()

    def _retrieve_recv_grads(self, bwd_chunk_id: int) -> tuple[Tensor | None, ...]:
        self._wait(Kind.RECV_B, bwd_chunk_id)
        return self._output_grads.pop(bwd_chunk_id)

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        grads = tuple(meta.empty(self.device) if meta.requires_grad else None for meta in self._outputs[bwd_chunk_id])
        tensors = [grad for grad in grads if grad is not None]
        self._receive(Kind.RECV_B, bwd_chunk_id, tensors, self.stage_index + 1)
        self._output_grads[bwd_chunk_id] = grads
        return []

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        tensors = [grad.contiguous() for grad in self.get_local_bwd_output(bwd_chunk_id) if grad is not None]
        self._send(tensors, self.stage_index - 1)
        return []

    def get_local_bwd_output(self, mb_index: int) -> tuple[Tensor | None, ...]:
        grads: tuple[Tensor | None, ...] = self.bwd_cache.pop(mb_index)
        return grads

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[Tensor | None, ...], mb_index: int) -> None:
        self._output_grads[mb_index] = next_stage_bwd_outputs

    def propagate(
        self, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], inputs: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        pairs = [(out, grad) for out, grad in zip(outputs, grads, strict=True) if out.requires_grad]
        if pairs:
            torch.autograd.backward([out for out, _ in pairs], [grad for _, grad in pairs])
        # Zeros where a stage does not use what it is given: the stage before waits for a gradient.
        return tuple((torch.zeros_like(x) if x.grad is None else x.grad) if x.requires_grad else None for x in inputs)

    def reduce(self) -> None:
        if self._sharded:
            with self._waiting(Cause.REDUCE):
                reduce_gradients(self.submod)  # type: ignore[arg-type]

    def finish(self) -> None:
        """Wait, on the current stream, for what this step's stage has under way."""
        if self._sharded and self.has_backward:
            with self._waiting(Cause.REDUCE):
                finish_reductions(self.submod)  # type: ignore[arg-type]
        while self._sent:
            self._drop_sent(self._sent.popleft())

    # -- messages -------------------------------------------------------------------------------------------------

    def _receive(self, kind: Kind, micro_batch: int, tensors: Sequence[Tensor], neighbour: int) -> None:
        peer, copies = self._executor.global_rank_of(neighbour), self._executor.peer_copies
        if copies is not None:
            self._works[kind, micro_batch] = [copies.receive(tensor, peer) for tensor in tensors]
        else:
            self._works[kind, micro_batch] = self._collective(dist.irecv, tensors, peer)

    def _send(self, tensors: Sequence[Tensor], neighbour: int) -> None:
        peer, copies = self._executor.global_rank_of(neighbour), self._executor.peer_copies
        works: Sequence[_Work] = (
            [copies.send(tensor, peer) for tensor in tensors]
            if copies is not None
            else self._collective(dist.isend, tensors, peer)
        )
        self._sent.append((works, list(tensors)))
        while self._sent and all(work.is_completed() for work in self._sent[0][0]):
            self._drop_sent(self._sent.popleft())

    def _collective(self, operation: Any, tensors: Sequence[Tensor], peer: int) -> Sequence[_Work]:
        if not tensors:
            return []
        return dist.batch_isend_irecv([dist.P2POp(operation, tensor, peer, self.group) for tensor in tensors])

    def _waiting(self, cause: Cause) -> AbstractContextManager[None]:
        recorder = self._executor.recorder
        return nullcontext() if recorder is None else recorder.waiting(cause)

    def _wait(self, kind: Kind, micro_batch: int) -> None:
        works = self._works.pop((kind, micro_batch), ())
        if not works:
            return
        with self._waiting(Cause.RECEIVE):
            try:
                for work in works:
                    work.wait()
            except RuntimeError as error:
                error.add_note("(the rank at the other end has failed, or waits for something else: see what it says)")
                raise

    @staticmethod
    def _drop_sent(entry: tuple[Sequence[_Work], list[Tensor]]) -> None:
        # NCCL keeps a message's tensors until its work is waited for.
        for work in entry[0]:
            work.wait()

    def clear_runtime_states(self) -> None:
        self.fwd_cache.clear()
        self.bwd_cache.clear()
        self.output_chunks.clear()
        self.dw_runner.clear()
        self.store.take()
        for held in (self._inputs, self._output_grads, self._works, self._outputs):
            held.clear()


class PipelineExecutor:
    """Runs a rank's stages.

    Args:
        modules: This rank's stages, by index; sharded already where they are to be.
        placement: Stages to ranks.
        group: The ranks of the pipeline, in order.
        device: Where stages run.
        peer_copies: How messages travel; None is the group's own sends and receives.

    Attributes:
        recorder: Told of tasks and waits while it is set.
    """

    def __init__(
        self,
        modules: Mapping[int, StageModule],
        placement: Placement,
        group: dist.ProcessGroup,
        device: torch.device,
        peer_copies: PeerCopies | None = None,
    ) -> None:
        self.group, self.device, self.peer_copies = group, device, peer_copies
        self.placement = placement
        self.recorder: StepRecorder | None = None
        self._stages = {index: _Stage(self, module, placement.stages) for index, module in sorted(modules.items())}
        self._runtimes: dict[tuple[int, bool], tuple[Schedule, RuntimeBase]] = {}
        self._metas: dict[tuple[int, Hashable, bool], list[_Meta]] = {}
        self._announced: set[tuple[int, Hashable, bool]] = set()
        self._micro_batches: Sequence[MicroBatch] = ()
        self._calls: dict[int, Calls] = {}
        self._last_stage = max(self._stages)
        self._training = False
        self._forward_schedule = functools.cache(functools.partial(forward_schedule, placement))

    @property
    def is_last(self) -> bool:
        """Whether the last stage is here."""
        return self.placement.stages - 1 in self._stages

    def train_step(
        self,
        schedule: Schedule,
        micro_batches: Sequence[MicroBatch],
        loss: Callable[[Any, int], Tensor],
    ) -> None:
        """Run a schedule; gradients are added to the parameters'.

        Args:
            schedule: With as many micro-batches as there are; transfers are added where it has none.
            micro_batches: The step's.
            loss: ``loss(output, index)`` on the last stage: a scalar to go backward from, scaled as it should be.
        """
        self._run(schedule, micro_batches, loss, train=True)

    def forward(self, micro_batches: Sequence[MicroBatch], end: Callable[[Any, int], Any]) -> list[Any]:
        """Run forward passes alone.

        Args:
            micro_batches: In the order in which they run.
            end: ``end(output, index)`` on the last stage, while its weights are gathered.

        Returns:
            What ``end`` returned, one a micro-batch, on the last stage's rank; nothing elsewhere.
        """
        with torch.no_grad():
            ends = self._run(self._forward_schedule(len(micro_batches)), micro_batches, end, train=False)
        return [ends[index] for index in sorted(ends)]

    def _run(
        self, schedule: Schedule, micro_batches: Sequence[MicroBatch], end: Callable[[Any, int], Any], *, train: bool
    ) -> dict[int, Any]:
        # By identity: hashing thousands of tasks would cost more than walking them.
        key = id(schedule), train
        if key not in self._runtimes:
            whole = schedule if has_transfers(schedule) else add_transfers(schedule)
            tasks = whole.tasks[dist.get_rank(self.group)]
            runtime = RuntimeBase(list(self._stages.values()), tasks, schedule.micro_batches, train=train)
            self._runtimes[key] = schedule, runtime
        self._micro_batches, self._training = micro_batches, train
        self._calls.clear()
        try:
            ends = self._runtimes[key][1].run(end, self.recorder)
            for stage in self._stages.values():
                stage.finish()
        finally:
            self._calls.clear()
            self._micro_batches = ()
        return ends

    # -- what stages ask ------------------------------------------------------------------------------------------

    def micro_batch(self, index: int) -> MicroBatch:
        """The step's micro-batch."""
        return self._micro_batches[index]

    def calls(self, index: int) -> Calls:
        """What user code gave to the blocks; user code is run where nothing is known yet."""
        if index not in self._calls:
            self._micro_batches[index].seed(-1)
            self._calls[index] = self._micro_batches[index].capture()
        return self._calls[index]

    def forward_done(self, stage: int, index: int) -> None:
        """Forget a micro-batch's notes behind this rank's last forward of it."""
        if stage == self._last_stage:
            self._calls.pop(index, None)

    def global_rank_of(self, stage: int) -> int:
        """The rank, in the world, that holds a stage."""
        return dist.get_global_rank(self.group, self.placement.rank_of(stage))

    def _key(self, stage: int, index: int) -> tuple[int, Hashable, bool]:
        return stage, self._micro_batches[index].signature, self._training

    def metas(self, stage: _Stage, index: int) -> list[_Meta]:
        """What a stage will receive; waits for the sender's announcement the first time."""
        key = self._key(stage.stage_index, index)
        if key not in self._metas:
            header = torch.empty(_HEADER, dtype=torch.int64, device=self.device)
            dist.recv(header, self.global_rank_of(stage.stage_index - 1), self.group)
            self._metas[key] = _decode(header.tolist())
        return self._metas[key]

    def announce(self, stage: _Stage, index: int, metas: list[_Meta]) -> None:
        """Tell the next stage what it will receive, the first time."""
        key = self._key(stage.stage_index, index)
        if key not in self._announced:
            header = torch.tensor(_encode(metas), dtype=torch.int64, device=self.device)
            dist.send(header, self.global_rank_of(stage.stage_index + 1), self.group)
            self._announced.add(key)


def forward_schedule(placement: Placement, micro_batches: int) -> Schedule:
    """Forward passes alone, micro-batch by micro-batch; at most two of a rank's stages are gathered at once."""
    resident = min(2, placement.stages_per_rank)
    lists = []
    for rank in range(placement.ranks):
        stages = placement.stages_of(rank)
        forwards = [Task(Kind.FORWARD, s, m) for m in range(micro_batches) for s in stages]
        lists.append(tuple(add_collectives(forwards, micro_batches, resident, prefetch=resident > 1)))
    return Schedule("forward", placement, micro_batches, micro_batches, resident, tuple(lists))


def _encode(metas: Sequence[_Meta]) -> list[int]:
    numbers = [len(metas)]
    for meta in metas:
        if meta.dtype not in _DTYPES:
            raise TypeError(f"a tensor of {meta.dtype} cannot travel between stages; it can be one of {_DTYPES}")
        numbers += [_DTYPES.index(meta.dtype), int(meta.requires_grad), len(meta.shape), *meta.shape]
    if len(numbers) > _HEADER:
        raise ValueError(f"a stage passes on {len(metas)} tensors; some {_HEADER // 7} are the most: join them")
    return numbers + [0] * (_HEADER - len(numbers))


def _decode(numbers: Sequence[int]) -> list[_Meta]:
    rest = iter(numbers)
    metas = []
    for _ in range(next(rest)):
        dtype, requires_grad, dims = next(rest), next(rest), next(rest)
        metas.append(_Meta(tuple(next(rest) for _ in range(dims)), _DTYPES[dtype], bool(requires_grad)))
    return metas
