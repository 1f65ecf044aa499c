# SPDX-License-Identifier: Apache-2.0
"""The only file that touches private names of torch: its schedule runtime, its stage, and FSDP2's gradient state.

Works on torch 2.11 and 2.13. What each part is for:

* ``RuntimeBase`` runs a list of actions with sends, receives, gathers and reductions in it; ``to_actions`` makes that
  list.
* ``StageBase`` is ``PipelineStage`` without its first-step metadata exchange, which runs the user's loss on
  uninitialised tensors (2.13) and allocates one receive buffer a micro-batch for ever (both), and with leaner passes.
* ``reduce_gradients`` is FSDP's post-backward, for once a unit: torch's own action also reshards the stage's weights.
* ``OneGroup`` runs a sharded stage without FSDP's hooks.
* ``gather_stage`` gathers a stage outside of a schedule, also before its first forward pass.
* ``UnshardedGradBuffers`` gives deferred weight gradients the place where FSDP sums unsharded gradients.
* ``saving_is_hooked`` says whether a checkpoint, or offloading, handles what autograd saves.
* ``keep_busy``, ``fused_attention`` and ``storage_key`` are for measuring blocks and for counting them on the meta
  device.
* ``keep_compiled_buffers`` is for tensors that compiled code makes and others read.
* ``map_peers`` gives memory that other processes of the host map too (symmetric memory).
* ``forget_process_groups`` lets a process be a rank of one world after another.
* ``shard_like`` and ``SafeFileSystemReader`` are for checkpoints: shards without messages, folders without pickles.
"""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from torch.autograd import profiler
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.pipelining import PipelineStage, schedules
from torch.distributed.pipelining.schedules import (
    _Action,
    _ComputationType,
    _PipelineScheduleRuntime,
)
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import _clear_sharding_prop_cache as clear_sharding_cache

from lightning_zeroprompt.pipeline.recorder import StepRecorder
from lightning_zeroprompt.pipeline.schedule import Kind, Task
from lightning_zeroprompt.pipeline.timeline import Cause

if TYPE_CHECKING:
    from lightning_zeroprompt.pipeline.weight_grad import GradBuffer

__all__ = [
    "OneGroup",
    "RuntimeBase",
    "SafeFileSystemReader",
    "StageBase",
    "UnshardedGradBuffers",
    "allow_recompilations",
    "finish_reductions",
    "forget_process_groups",
    "fused_attention",
    "gather_stage",
    "is_compiled",
    "keep_busy",
    "keep_compiled_buffers",
    "map_peers",
    "reduce_gradients",
    "saving_is_hooked",
    "shard_like",
    "storage_key",
    "to_actions",
]

_TYPES = {
    Kind.FORWARD: _ComputationType.FORWARD,
    Kind.BACKWARD: _ComputationType.BACKWARD_INPUT,
    Kind.WEIGHT: _ComputationType.BACKWARD_WEIGHT,
    Kind.GATHER: _ComputationType.UNSHARD,
    Kind.RELEASE: _ComputationType.RESHARD,
    Kind.REDUCE: _ComputationType.REDUCE_GRAD,
    Kind.SEND_F: _ComputationType.SEND_F,
    Kind.RECV_F: _ComputationType.RECV_F,
    Kind.SEND_B: _ComputationType.SEND_B,
    Kind.RECV_B: _ComputationType.RECV_B,
}

_TORCH_LOG = logging.getLogger("torch.distributed.pipelining.schedules")


def _drop(record: logging.LogRecord) -> bool:
    return False


class _NoRecord:
    """In the place of ``record_function``."""

    def __init__(self, name: str) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


@contextmanager
def _unrecorded() -> Iterator[None]:
    """Let torch's runtime write no records while no profiler listens: one a task is a third of its time on the host."""
    runtime: Any = schedules
    kept = getattr(runtime, "record_function", None)
    if kept is None or profiler._is_profiler_enabled:
        yield
        return
    runtime.record_function = _NoRecord
    try:
        yield
    finally:
        runtime.record_function = kept


def to_actions(tasks: Sequence[Task]) -> list[_Action]:
    """Our tasks as torch's actions."""
    return [_Action(t.stage, _TYPES[t.kind], t.micro_batch if t.micro_batch >= 0 else None) for t in tasks]


class RuntimeBase(_PipelineScheduleRuntime):
    """torch's runtime, told what to do task by task.

    Args:
        stages: This rank's stages.
        tasks: This rank's tasks, transfers included.
        micro_batches: M.
        train: Whether there are backward tasks.
    """

    def __init__(self, stages: Sequence[StageBase], tasks: Sequence[Task], micro_batches: int, *, train: bool) -> None:
        loss_fn = self._end if train else None
        super().__init__(list(stages), micro_batches, loss_fn=loss_fn, scale_grads=False)  # type: ignore[no-untyped-call]
        self.pipeline_order_with_comms = {self.rank: to_actions(tasks)}
        self.register_custom_function(_ComputationType.BACKWARD_WEIGHT, self._run_weight)
        self.register_custom_function(_ComputationType.REDUCE_GRAD, self._run_reduce)
        self._by_index = {stage.stage_index: stage for stage in stages}
        self._ends: dict[int, Any] = {}
        self._end_call: Callable[[Any, int], Any] | None = None
        self._recorder: StepRecorder | None = None

    def run(self, end: Callable[[Any, int], Any], recorder: StepRecorder | None = None) -> dict[int, Any]:
        """Run the list.

        Args:
            end: ``end(output, micro_batch)``, called behind each forward of the last stage while its weights are there;
                in training it returns the scalar to go backward from.
            recorder: Told of tasks and waits.

        Returns:
            Without training, what ``end`` returned for each micro-batch; in training nothing.
        """
        count, self._end_call, self._recorder = self._n_microbatches, end, recorder
        for stage in self._by_index.values():
            stage.has_backward = self._has_backward
            stage.chunks = count
            stage.clear_runtime_states()
        keywords = [{"micro_batch": index} for index in range(count)]
        # On any error torch logs the whole schedule, page after page, in front of the error.
        _TORCH_LOG.addFilter(_drop)
        try:
            with _unrecorded():
                self._step_microbatches([()] * count, keywords, return_outputs=False)
            ends, self._ends = self._ends, {}
        finally:
            _TORCH_LOG.removeFilter(_drop)
            for stage in self._by_index.values():
                stage.clear_runtime_states()
            self._ends = {}
            self._end_call = self._recorder = None
        return ends

    def _end(self, output: Any, micro_batch: int) -> Any:
        if self._end_call is None:
            raise RuntimeError("a schedule is run without run()")
        return self._end_call(output, micro_batch)

    def _assert_unsharded(self, stage: Any) -> None:
        if self._recorder is None or not self.unshard_ops.get(stage.stage_index):
            super()._assert_unsharded(stage)
            return
        with self._recorder.waiting(Cause.GATHER):
            super()._assert_unsharded(stage)

    def _initialize_stages(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: shapes are agreed on message by message."""

    def _maybe_compute_loss(
        self, stage: Any, output: Any, target_mbs: Any, mb_index: int, loss_kwargs: Any = None
    ) -> None:
        if stage.is_last:
            self._ends[mb_index] = self._end(output, mb_index)
        # Torch calls this behind each forward pass, whatever its stage.
        if self._recorder is not None:
            self._recorder.end()

    def _maybe_get_loss(self, stage: Any, mb_index: int) -> Tensor | None:
        # Torch keeps every micro-batch's loss, and with it a graph, to the end of the step.
        return self._ends.pop(mb_index) if stage.is_last else None

    def _update_losses(self, stages: Any, losses: Any) -> None:
        """Nothing: they have been handed out."""

    def _run_weight(self, action: _Action, ctx: Any) -> None:
        # Without torch's check that the stage is gathered: a deferred gradient needs no weights.
        micro_batch = action.microbatch_index or 0
        if self._recorder is not None:
            self._recorder.begin(Task(Kind.WEIGHT, action.stage_index, micro_batch))
        self._by_index[action.stage_index].backward_weight_one_chunk(micro_batch)
        if self._recorder is not None:
            self._recorder.end()

    def _run_reduce(self, action: _Action, ctx: Any) -> None:
        self._by_index[action.stage_index].reduce()


class StageBase(PipelineStage):
    """``PipelineStage`` without metadata exchange; a subclass moves the tensors.

    Args:
        module: What the stage runs.
        stage: Its index.
        stages: How many there are.
        device: Where it runs.
        group: The pipeline's ranks.
        dw_builder: See ``PipelineStage``.
    """

    def __init__(
        self,
        module: nn.Module,
        stage: int,
        stages: int,
        device: torch.device,
        group: dist.ProcessGroup,
        dw_builder: Any,
    ) -> None:
        super().__init__(module, stage, stages, device, group=group, dw_builder=dw_builder)
        # Torch 2.13 returns as many gradients as there are inputs here; received inputs come first anyway.
        if hasattr(self, "_stage_meta"):
            self._stage_meta.inputs = _Everything()
            self._runtime_validate = False

    def forward_one_chunk(
        self,
        fwd_chunk_id: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any] | None = None,
        save_forward_output: bool = True,
    ) -> Any:
        """Run a forward pass; torch's own method looks for tensors in nested arguments, which takes the host longer."""
        stream = args if self.is_first else self._retrieve_recv_activations(fwd_chunk_id)
        try:
            output = self.forward_maybe_with_nosync(*stream, **(kwargs or {}))  # type: ignore[no-untyped-call]
        except Exception as error:
            error.add_note(f"(in the forward pass of micro-batch {fwd_chunk_id} through stage {self.stage_index})")
            raise
        self.fwd_cache[fwd_chunk_id] = output if isinstance(output, tuple) else (output,), list(stream)
        return output

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False
    ) -> None:
        """Run B, and keep what W will do."""
        if not self.has_backward:
            return
        outputs, inputs = self.fwd_cache.pop(bwd_chunk_id)
        grads: Any = (None,)
        if self.is_last:
            outputs = (loss,)
        else:
            grads = self._retrieve_recv_grads(bwd_chunk_id)
        self.bwd_cache[bwd_chunk_id] = self.propagate(outputs, grads, inputs)
        self.dw_runner[bwd_chunk_id] = self.dw_builder()  # type: ignore[misc]

    def propagate(
        self, outputs: tuple[Tensor, ...], grads: tuple[Tensor | None, ...], inputs: list[Tensor]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of a stage's inputs from those of its outputs."""
        raise NotImplementedError

    def _validate_fwd_input(self, args: Any, kwargs: Any) -> None:
        """Nothing (torch 2.11 compares with the metadata that is not exchanged)."""

    def _validate_fwd_outputs(self, outputs: Any) -> None:
        """Nothing, likewise."""

    def reduce(self) -> None:
        """Run the REDUCE of this stage."""
        raise NotImplementedError


class _Everything(tuple[Any, ...]):
    """A tuple as long as any other, for slicing another one whole."""

    __slots__ = ()

    def __len__(self) -> int:
        return 2**31


def _param_groups(root: FSDPModule) -> list[Any]:
    state = fully_shard.state(root)  # type: ignore[attr-defined]
    groups: list[Any] = []
    for part in state._state_ctx.all_states:
        several = getattr(part, "_fsdp_param_groups", None)
        one = getattr(part, "_fsdp_param_group", None)
        groups += several if several is not None else [one] if one is not None else []
    return groups


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's call is compiled: ``torch.compile(module)`` or ``module.compile()``."""
    return isinstance(module, OptimizedModule) or getattr(module, "_compiled_call_impl", None) is not None


def saving_is_hooked() -> bool:
    """Whether ``torch.autograd.graph.saved_tensors_hooks`` are in force, as they are in a checkpoint's forward pass."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


class OneGroup:
    """A stage that is one FSDP group, run without FSDP's hooks.

    Gathers, releases and reductions are tasks of the schedule, so that all the hooks do for a micro-batch is to find
    nothing to do, on the host's time (docs/pipeline.md).

    Args:
        root: The stage, gathered when it runs.
    """

    def __init__(self, root: FSDPModule) -> None:
        self._root = root
        self._params: list[Any] | None = None

    @staticmethod
    def of(root: nn.Module) -> OneGroup | None:
        """None for a stage that is not sharded, or with parts that are groups of their own."""
        groups = [part for part in root.modules() if isinstance(part, FSDPModule)]
        return OneGroup(groups[0]) if groups == [root] else None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the stage."""
        if self._params is None:
            # What FSDP does in front of a first forward pass.
            fully_shard.state(self._root)._lazy_init()  # type: ignore[attr-defined]
            self._params = [param for group in _param_groups(self._root) for param in group.fsdp_params]
        return self._root.forward(*args, **kwargs)  # type: ignore[attr-defined]

    def backward_done(self) -> None:
        """Behind a backward pass: gradients that autograd has left join those that are summed in another type."""
        for param in self._params or ():
            if param.reduce_dtype is not None and param._unsharded_param.grad is not None:
                param.accumulate_unsharded_grad_if_needed()
                param.to_accumulated_grad_if_needed()


def reduce_gradients(root: FSDPModule) -> None:
    """Reduce-scatter what has been summed for a stage's parameters, without waiting; weights stay as they are."""
    for group in _param_groups(root):
        # As ``set_requires_gradient_sync`` does, without walking over all modules of the stage.
        group.reduce_grads = group.all_reduce_grads = True
        group.post_backward()
        group.reduce_grads = group.all_reduce_grads = False


def finish_reductions(root: FSDPModule) -> None:
    """Make the current stream wait for a stage's reductions, at the end of a step."""
    root.set_is_last_backward(True)
    fully_shard.state(root)._root_post_backward_final_callback()  # type: ignore[attr-defined]
    # Autograd calls it too, behind every backward pass of a micro-batch, which must not wait for reductions.
    root.set_is_last_backward(False)


def forget_process_groups() -> None:
    """Destroy all process groups, and what DTensor remembers of meshes over them."""
    if dist.is_initialized():
        dist.destroy_process_group()
    # Results of operators are remembered with their mesh, and a mesh of a later world equals that of an earlier one.
    clear_sharding_cache()  # type: ignore[no-untyped-call]


def map_peers(size: int, group: dist.ProcessGroup, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """Allocate memory on every rank's GPU that the other ranks' processes can reach; all ranks call this together.

    Args:
        size: Bytes a rank.
        group: Ranks of one host.
        device: This rank's GPU.

    Returns:
        This rank's memory, which the caller keeps, and that of each rank of the group as this process sees it; bytes,
        on ``device``.
    """
    mine = symmetric_memory.empty(size, dtype=torch.uint8, device=device)
    handle = symmetric_memory.rendezvous(mine, group)
    everyone = [handle.get_buffer(rank, (size,), torch.uint8) for rank in range(dist.get_world_size(group))]
    return mine, everyone


def gather_stage(root: FSDPModule) -> None:
    """Gather all weights of a stage and wait for them."""
    # The stage has to be known as the root before one of its blocks runs by itself.
    fully_shard.state(root)._lazy_init()  # type: ignore[attr-defined]
    for part in root.modules():  # type: ignore[attr-defined]
        if isinstance(part, FSDPModule):
            part.unshard()


class UnshardedGradBuffers:
    """Finds, for a gathered parameter, where FSDP sums its gradients between reductions.

    With a reduction type of its own (``MixedPrecisionPolicy(reduce_dtype=...)``), sums are kept in that type; a
    deferred gradient that went to ``.grad`` would be summed in the parameter's type instead.

    Args:
        root: A stage that ``fully_shard`` was called on.
    """

    def __init__(self, root: FSDPModule) -> None:
        self._root = root
        self._buffers: dict[int, _UnshardedGradBuffer] = {}

    def __call__(self, parameter: Tensor) -> GradBuffer | None:
        """The buffer of a gathered parameter; None where ``.grad`` is the place."""
        if not self._buffers:
            for group in _param_groups(self._root):
                for param in group.fsdp_params:
                    # The gathered parameter is one object for good; its storage comes and goes.
                    if param.reduce_dtype is not None and hasattr(param, "_unsharded_param"):
                        self._buffers[id(param._unsharded_param)] = _UnshardedGradBuffer(param)
        return self._buffers.get(id(parameter))


class _UnshardedGradBuffer:
    def __init__(self, param: Any) -> None:
        self._param = param

    def add(self, grad: Tensor) -> None:
        held = self._param.unsharded_accumulated_grad
        if held is None:
            self._param.unsharded_accumulated_grad = grad.to(self._param.reduce_dtype)
        else:
            held += grad


def keep_compiled_buffers() -> None:
    """Let compiled code neither reuse a buffer for another tensor nor write over one that it reads no more.

    For what outlives the code that made it without the compiler's knowing. It holds for all that is compiled from here
    on in this process.
    """
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    for settings, name in (
        (inductor, "allow_buffer_reuse"),
        (inductor, "inplace_buffers"),
        (functorch, "donated_buffer"),
    ):
        setattr(settings, name, False)


def allow_recompilations(count: int) -> None:
    """Let a function be compiled for at least so many kinds of arguments in this process, before it is not any more."""
    import torch._dynamo.config as dynamo

    dynamo.recompile_limit = max(dynamo.recompile_limit, count)


def keep_busy(seconds: float) -> None:
    """Let the current GPU do nothing for about so long, while the host launches what is to be timed."""
    torch.cuda._sleep(round(seconds * 2e9))  # type: ignore[no-untyped-call]


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """``F.scaled_dot_product_attention`` by the kernels that a GPU would run; on the meta device shapes alone."""
    if enable_gqa:
        k, v = (part.repeat_interleave(q.size(-3) // part.size(-3), -3) for part in (k, v))
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        output: Tensor = flash(q, k, v, dropout_p, is_causal, False, scale=scale)[0]
    else:
        efficient = torch.ops.aten._scaled_dot_product_efficient_attention
        bias = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.size(-2))
        output = efficient(q, k, v, bias, True, dropout_p, is_causal, scale=scale)[0]
    return output


def storage_key(tensor: Tensor) -> int:
    """What two tensors have in common that share memory, on the meta device too; while one of them lives."""
    return int(tensor.untyped_storage()._cdata)


def shard_like(whole: Tensor, like: DTensor) -> DTensor:
    """This rank's shard of a tensor that every rank has, without any message.

    Args:
        whole: Of the global shape of ``like``, on any device.
        like: Says how it is sharded, and where shards live.

    Returns:
        A new tensor; it shares no memory with ``whole``.
    """
    chunk = like.__create_chunk_list__()[0]  # type: ignore[no-untyped-call]
    index = tuple(slice(start, start + size) for start, size in zip(chunk.offsets, chunk.sizes, strict=True))
    local = whole[index].to(like.to_local().device, copy=True)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


class SafeFileSystemReader(FileSystemReader):
    """torch's reader of checkpoint folders, which unpickles their index, with an unpickler that knows the index alone.

    Args:
        path: The folder.

    Raises:
        pickle.UnpicklingError: If the index names anything else than what such an index is made of.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        with (path / ".metadata").open("rb") as file:
            self.index: Metadata = _IndexUnpickler(file).load()
        if self.index.storage_meta is None:
            self.index.storage_meta = StorageMeta()

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, read once."""
        return self.index


class _IndexUnpickler(pickle.Unpickler):
    _KNOWN: ClassVar[dict[str, set[str]]] = {
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.serialization": {"_get_layout"},
        "torch": {"Size"},
        "collections": {"OrderedDict"},
        "pathlib": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
        "pathlib._local": {"PosixPath", "PurePosixPath", "PureWindowsPath", "WindowsPath"},
    }

    def find_class(self, module: str, name: str) -> Any:
        if name in self._KNOWN.get(module, ()) or (module == "torch" and isinstance(_torch_name(name), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no index of a checkpoint does")


def _torch_name(name: str) -> Any:
    return getattr(torch, name, None)
