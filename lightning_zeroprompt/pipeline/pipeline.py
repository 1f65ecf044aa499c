# SPDX-License-Identifier: Apache-2.0
"""A model cut over ranks and ready to run: the one object that holds this rank's part of a pipeline.

Making it goes: find the blocks, cut them into stages, keep what this rank owns, shard it, build the executor. Nothing
here knows of Lightning; the benchmarks run it bare.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, share_comm_ctx
from torch.distributed.tensor import DTensor

from lightning_zeroprompt.pipeline.chain import Calls, Chain
from lightning_zeroprompt.pipeline.chain_check import ChainCopy
from lightning_zeroprompt.pipeline.costs import Costs
from lightning_zeroprompt.pipeline.executor import MicroBatch, PipelineExecutor
from lightning_zeroprompt.pipeline.layout import ProcessGroups
from lightning_zeroprompt.pipeline.partition import balanced_cuts, block_cost, measured_cuts, module_cost
from lightning_zeroprompt.pipeline.schedule import Placement, Schedule
from lightning_zeroprompt.pipeline.stage import (
    StageModule,
    assign_parameters,
    drop_parameters,
    materialize,
    shard_stage,
    to_device,
)
from lightning_zeroprompt.pipeline.timeline import Cause
from lightning_zeroprompt.pipeline.weight_grad import defer_linears, restore_linears

__all__ = ["Pipeline", "cut_chain"]


def cut_chain(chain: Chain, placement: Placement, costs: Costs | None = None) -> list[tuple[int, int]]:
    """Cut a chain into stages, and so ranks, of equal work, what lies outside its blocks included.

    Args:
        chain: The model's.
        placement: Stages to ranks.
        costs: Measured; without them work is estimated from parameters.

    Raises:
        ValueError: If there are fewer blocks than stages, or the costs are of another number of blocks.
    """
    if costs is not None:
        if len(costs.blocks) != len(chain):
            raise ValueError(
                f"costs of {len(costs.blocks)} blocks for a model with {len(chain)}: they were measured for another "
                "model or another configure_pipeline(); measure again"
            )
        return measured_cuts(costs, placement)
    before, behind, _ = chain.outside()
    return balanced_cuts(
        [block_cost(block) for block in chain.blocks],
        placement.stages,
        before=sum(module_cost(module) for module in before),
        behind=sum(module_cost(module) for module in behind),
        rank_of=placement.rank_of,
    )


def _stage_costs(chain: Chain, cuts: Sequence[tuple[int, int]]) -> list[float]:
    before, behind, _ = chain.outside()
    costs = [sum(block_cost(block) for block in chain.blocks[first:end]) for first, end in cuts]
    costs[0] += sum(module_cost(module) for module in before)
    costs[-1] += sum(module_cost(module) for module in behind)
    return costs


class Pipeline:
    """This rank's part of a model.

    Args:
        chain: The model's blocks; the model is cut in place.
        placement: Stages to ranks.
        cuts: For each stage its first block and the one behind its last.
        groups: The ranks.
        device: Where stages run.
        precision: Types of gathered weights and of reductions; None leaves both to the parameters.
        cpu_offload: Keep shards, gradients and optimizer state in the host's memory.
        peer_copies: Let GPUs of one host copy to each other (see ``peer_copy``) where they can.

    Attributes:
        executor: Runs the stages.
        copies: Those of this rank's parameters that other ranks hold too, by name.
        owned: Names of the parameters that this rank holds, as in the whole model.
        stage_costs: Estimated work of each stage (see ``partition``), in the same unit for all.
    """

    def __init__(
        self,
        chain: Chain,
        placement: Placement,
        cuts: Sequence[tuple[int, int]],
        groups: ProcessGroups,
        device: torch.device,
        *,
        precision: MixedPrecisionPolicy | None = None,
        cpu_offload: bool = False,
        peer_copies: bool = True,
    ) -> None:
        self.chain, self.placement, self.cuts, self.groups, self.device = chain, placement, list(cuts), groups, device
        rank = groups.pipeline_rank
        self.stage_costs = _stage_costs(chain, cuts)
        # The first stage's rank alone knows what the chain is called with.
        self._copy = ChainCopy.of(chain) if rank == placement.rank_of(0) and groups.data_rank == 0 else None
        self._ownership = assign_parameters(chain, cuts)
        self._owners = {name: self._ownership.ranks(name, placement) for name in self._ownership.stages}
        self.owned = frozenset(name for name, ranks in self._owners.items() if rank in ranks)
        mine = placement.stages_of(rank)

        drop_parameters(chain.root, set(self.owned))
        self.stages = {stage: StageModule(chain, stage, cuts[stage], self._ownership.modules[stage]) for stage in mine}
        for module in self.stages.values():
            materialize(module, device)
        left = [name for name, p in chain.root.named_parameters() if name in self.owned and p.is_meta]
        if left:
            raise TypeError(
                f"parameters {left} are on the meta device and belong to modules that contain the blocks, which cannot "
                "be initialised alone; build these on a real device"
            )
        to_device(chain.root, device)
        elsewhere = [
            module for stage, modules in enumerate(self._ownership.modules) if stage not in mine for module in modules
        ]
        whole = {name for name in self._owners if self._ownership.is_whole(name, placement)}
        self.sharded = groups.layout.data > 1 or precision is not None or cpu_offload
        released = self._ownership.modules[0] if self.sharded and 0 in mine and placement.stages > 1 else ()
        chain.leave_out(elsewhere, before=0 in mine, behind=placement.stages - 1 in mine, released=released)
        # Copies are summed over all their ranks; shards over those with the same part.
        self._sums = {
            name: (ranks, name in whole or not self.sharded)
            for name, ranks in self._owners.items()
            if name in whole or len(ranks) > 1
        }
        self._sum_groups = groups.of_owners(self._sums.values())
        if self.sharded:
            self._shard(whole, precision or MixedPrecisionPolicy(), CPUOffloadPolicy() if cpu_offload else None)
        named = dict(chain.root.named_parameters())
        # Walking over a model's modules takes milliseconds, and steps ask several times.
        self._parameters = {name: parameter for name, parameter in named.items() if name in self.owned}
        self.copies: dict[str, nn.Parameter] = {name: named[name] for name in sorted(self.owned & set(self._sums))}
        # NCCL makes a group's communicator at its first use, which all of its ranks have to join: no send can be that.
        dist.all_reduce(torch.zeros(1, device=device), group=groups.pipeline)
        peers = groups.peer_copies(device) if peer_copies else None
        self.executor = PipelineExecutor(self.stages, placement, groups.pipeline, device, peers)

    def _shard(self, whole: set[str], precision: MixedPrecisionPolicy, offload: OffloadPolicy | None) -> None:
        root = self.chain.root
        named = dict(root.named_parameters())
        before = {(module, name): p for module in root.modules() for name, p in module._parameters.items()}
        for module in self.stages.values():
            shard_stage(module, self.groups.data_mesh, precision, {named[name] for name in whole}, offload)
        # Or every stage would keep the buffers of its last gather and reduction until its next one.
        share_comm_ctx(list(self.stages.values()))  # type: ignore[arg-type]
        sharded = {
            id(before[part, name]): parameter
            for module in self.stages.values()
            for part in module.modules()
            for name, parameter in part._parameters.items()
            if (part, name) in before and parameter is not before[part, name]
        }
        for (part, name), old in before.items():
            # A tied parameter has places outside this rank's stages too, such as an embedding's beside its head.
            if part._parameters[name] is old and id(old) in sharded:
                part._parameters[name] = sharded[id(old)]

    @property
    def owners(self) -> Mapping[str, tuple[int, ...]]:
        """For each parameter of the whole model, by name, the pipeline ranks that hold it, ascending."""
        return self._owners

    def modules_of(self, stage: int) -> list[nn.Module]:
        """The blocks of any stage and the outside modules that live on it."""
        first, end = self.cuts[stage]
        return [*self.chain.blocks[first:end], *self._ownership.modules[stage]]

    @property
    def last_rank(self) -> int:
        """Global rank of the last stage of this rank's pipeline."""
        return self.groups.layout.global_rank(self.placement.rank_of(self.placement.stages - 1), self.groups.data_rank)

    def state_bytes(self, rank: int) -> tuple[int, int]:
        """Bytes of the parameters that one rank of a pipeline position holds, and of their gradients.

        Args:
            rank: Position in the pipeline.
        """
        shards = self.groups.layout.data // self.groups.layout.replicas if self.sharded else 1
        parameters = gradients = 0
        for name, parameter in self.chain.root.named_parameters():
            if rank in self._owners[name]:
                whole = self._ownership.is_whole(name, self.placement)
                size = parameter.numel() * parameter.element_size() // (1 if whole else shards)
                parameters += size
                gradients += size * parameter.requires_grad
        return parameters, gradients

    def stage_bytes(self, stage: int) -> int:
        """Bytes of a stage's parameters, gathered, in the type they are kept in."""
        named = self.chain.root.named_parameters()
        return sum(p.numel() * p.element_size() for name, p in named if stage in self._ownership.stages[name])

    def check_chain(self, calls: Calls) -> None:
        """Once, on one rank: compare a target with its blocks (see ``chain_check``).

        Raises:
            ValueError: If they compute different things.
        """
        if self._copy is not None:
            self._copy.compare(calls)
            self._copy = None

    def parameters(self) -> dict[str, nn.Parameter]:
        """This rank's parameters under the names of the whole model."""
        return dict(self._parameters)

    def train_step(
        self, schedule: Schedule, micro_batches: Sequence[MicroBatch], loss: Callable[[Any, int], Tensor]
    ) -> None:
        """Run forward and backward passes of a step; gradients are added to what is there.

        Args:
            schedule: Of this placement, with as many micro-batches.
            micro_batches: The step's.
            loss: See ``PipelineExecutor.train_step``.
        """
        # Sums over ranks are of this step's gradients alone: earlier ones have been summed already.
        held = {parameter: parameter.grad for parameter in self.copies.values()}
        for parameter in held:
            parameter.grad = None
        recorder = self.executor.recorder
        if recorder is not None:
            recorder.start()
        self.executor.train_step(schedule, micro_batches, loss)
        with nullcontext() if recorder is None or not self.copies else recorder.waiting(Cause.REDUCE):
            self._sum_copies()
        if recorder is not None:
            recorder.stop()
        for parameter, grad in held.items():
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else parameter.grad.add_(grad)

    def _sum_copies(self) -> None:
        """Sum the gradients of copies over their ranks; where these span data-parallel ranks, take those' mean."""
        buckets: dict[tuple[tuple[int, ...], bool, torch.dtype], list[nn.Parameter]] = {}
        for name, parameter in self.copies.items():
            if parameter.requires_grad and self._sums[name] in self._sum_groups:
                buckets.setdefault((*self._sums[name], parameter.dtype), []).append(parameter)
        for (owners, across, _), parameters in sorted(buckets.items(), key=lambda item: str(item[0])):
            grads = []
            for parameter in parameters:
                grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                parameter.grad = grad
                grads.append(grad.to_local() if isinstance(grad, DTensor) else grad)
            flat = torch.cat([grad.reshape(-1) for grad in grads])
            dist.all_reduce(flat, group=self._sum_groups[owners, across])
            if across:
                flat /= self.groups.layout.data
            for grad, part in zip(grads, torch.split(flat, [grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def grad_norm(self, parameters: Sequence[Tensor] | None = None, norm_type: float = 2.0) -> Tensor:
        """The norm of the whole model's gradients, copies counted once; all ranks call this together.

        Args:
            parameters: This rank's, such as those of the optimizer; None is all of them.
            norm_type: As in ``torch.nn.utils.clip_grad_norm_``.

        Returns:
            A scalar, equal on all ranks.
        """
        parameters = list(self.parameters().values()) if parameters is None else parameters
        elsewhere = {p for name, p in self.copies.items() if self._owners[name][0] != self.groups.pipeline_rank}
        grads = [p.grad for p in parameters if p.grad is not None and p not in elsewhere]
        norms = [
            torch.nn.utils.get_total_norm(part, norm_type)
            for part in ([g for g in grads if isinstance(g, DTensor)], [g for g in grads if not isinstance(g, DTensor)])
            if part
        ]
        whole = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
        dtype = torch.float64 if any(norm.dtype == torch.float64 for norm in whole) else torch.float32
        mine = torch.stack([norm.to(self.device, dtype) for norm in whole] or [torch.zeros((), device=self.device)])
        if norm_type == float("inf"):
            largest = mine.max()
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.groups.pipeline)
            return largest
        total = (mine**norm_type).sum()
        dist.all_reduce(total, group=self.groups.pipeline)
        return total ** (1.0 / norm_type)

    def grad_norms(self, norm_type: float = 2.0) -> dict[str, Tensor]:
        """The norm of each parameter's gradient, for the whole model; all ranks of the pipeline call this together.

        Args:
            norm_type: p, or infinity.

        Returns:
            A scalar for each parameter that has a gradient, by name, equal on all ranks of the pipeline.
        """
        largest = norm_type == float("inf")
        names = list(self._owners)
        held = {
            name: parameter.grad
            for name, parameter in self.parameters().items()
            if parameter.grad is not None and self._owners[name][0] == self.groups.pipeline_rank
        }
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in held.values()]
        dtype = torch.float64 if any(part.dtype == torch.float64 for part in local) else torch.float32
        found = [torch.linalg.vector_norm(part, norm_type).to(self.device, dtype) for part in local]
        powers = torch.stack(found) if found else torch.zeros(0, dtype=dtype, device=self.device)
        powers = powers if largest else powers**norm_type
        sharded = [index for index, grad in enumerate(held.values()) if isinstance(grad, DTensor)]
        if sharded:
            mesh = self.groups.data_mesh
            shards = powers[sharded]
            dist.all_reduce(
                shards,
                op=dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM,
                group=mesh.get_group(mesh.ndim - 1),
            )
            powers[sharded] = shards
        # One rank speaks for each parameter.
        table = torch.zeros(2, len(names), dtype=torch.float64, device=self.device)
        positions = [names.index(name) for name in held]
        table[0, positions] = powers.double()
        table[1, positions] = 1.0
        dist.all_reduce(table, group=self.groups.pipeline)
        norms = table[0] if largest else table[0] ** (1.0 / norm_type)
        return {name: norms[index].to(dtype) for index, name in enumerate(names) if table[1, index] > 0}

    def clip_grad_value(self, parameters: Sequence[Tensor], limit: float) -> None:
        """Clamp this rank's gradients to plus and minus a limit."""
        for part in _alike(parameters):
            torch.nn.utils.clip_grad_value_(part, limit)

    def clip_grad_norm(self, parameters: Sequence[Tensor], max_norm: float) -> Tensor:
        """Scale this rank's gradients so that the norm of the whole model's is at most ``max_norm``.

        Returns:
            The norm before.
        """
        norm = self.grad_norm(parameters)
        for part in _alike(parameters):
            torch.nn.utils.clip_grads_with_norm_(part, max_norm, norm)
        return norm

    def prepare(self) -> None:
        """Make Linears able to defer their gradients, after ``restore``."""
        for module in self.stages.values():
            defer_linears(module)

    def restore(self) -> None:
        """Give Linears their class back; the model stays cut."""
        for module in self.stages.values():
            restore_linears(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """None: process groups cannot be copied, and a copy of the model is no part of this pipeline."""


def _alike(parameters: Sequence[Tensor]) -> list[list[Tensor]]:
    """Parameters with gradients, sharded ones apart: kernels over many tensors take the one or the other."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    parts = [[parameter for parameter in held if isinstance(parameter.grad, DTensor) is kind] for kind in (True, False)]
    return [part for part in parts if part]
