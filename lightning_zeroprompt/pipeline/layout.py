# SPDX-License-Identifier: Apache-2.0
"""How ranks are laid out, and the process groups that follow from it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lightning_zeroprompt.pipeline.peer_copy import PeerCopies

__all__ = ["Layout", "ProcessGroups"]

_P2P_CTAS = 4
"""NCCL's send and receive kernels occupy a multiprocessor a channel while they wait. With a prototype of this
engine on two H200, 4 channels gave looped schedules 4 to 6 per cent over the default; 1 was slightly worse than 4.
Gathers and reductions of shards keep the default: 4 and 8 channels made a step 3 per cent longer than 32 there."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of the two parallelisms; the pipeline is outermost, so that data-parallel ranks are neighbours.

    Attributes:
        pipeline: P.
        data: D, ranks that hold the same stages and share their weights and gradients.
        replicas: Groups within D that each hold all shards (HSDP).

    Raises:
        ValueError: If a size is below 1 or the replicas do not divide D.
    """

    pipeline: int
    data: int = 1
    replicas: int = 1

    def __post_init__(self) -> None:
        for name in ("pipeline", "data", "replicas"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: sizes are at least 1")
        if self.data % self.replicas:
            raise ValueError(
                f"{self.data} data-parallel ranks cannot hold {self.replicas} replicas: {self.replicas} does not "
                f"divide {self.data}"
            )

    def global_rank(self, pipeline_rank: int, data_rank: int) -> int:
        """The rank in the world."""
        return pipeline_rank * self.data + data_rank


class ProcessGroups:
    """A layout's groups; all ranks make them together.

    Args:
        layout: Sizes.
        device_type: ``"cuda"`` or ``"cpu"``.

    Attributes:
        data_mesh: For FSDP: one dimension, or two (replicate, shard).
        pipeline_rank: This rank's position in its pipeline.
        data_rank: This rank's position among those that hold the same stages.
        pipeline: This rank's pipeline, for messages between stages.
        control: The same ranks on the CPU, for small Python objects.
        data: The ranks that hold the same stages.
        everyone: All ranks, on the CPU.

    Raises:
        ValueError: If the world has another size than P * D.
    """

    def __init__(self, layout: Layout, device_type: str) -> None:
        world = dist.get_world_size()
        if layout.pipeline * layout.data != world:
            raise ValueError(
                f"{layout.pipeline} pipeline ranks x {layout.data} data-parallel ranks = "
                f"{layout.pipeline * layout.data}, but {world} processes run: set devices x num_nodes to the first, or "
                "choose sizes whose product is the second"
            )
        self.layout = layout
        mesh = init_device_mesh(
            device_type,
            (layout.pipeline, layout.replicas, layout.data // layout.replicas),
            mesh_dim_names=("pipeline", "replicate", "shard"),
        )
        self.data_mesh: DeviceMesh = mesh["replicate", "shard"] if layout.replicas > 1 else mesh["shard"]
        self.pipeline_rank, self.data_rank = divmod(dist.get_rank(), layout.data)
        options = None
        if device_type == "cuda":
            options = dist.ProcessGroupNCCL.Options()
            options.config.max_ctas = _P2P_CTAS
        for data_rank in range(layout.data):
            ranks = [layout.global_rank(p, data_rank) for p in range(layout.pipeline)]
            group = dist.new_group(ranks, pg_options=options)
            control = dist.new_group(ranks, backend="gloo")
            if data_rank == self.data_rank:
                self.pipeline: dist.ProcessGroup = group
                self.control: dist.ProcessGroup = control
        for pipeline_rank in range(layout.pipeline):
            data = dist.new_group([layout.global_rank(pipeline_rank, d) for d in range(layout.data)])
            if pipeline_rank == self.pipeline_rank:
                self.data: dist.ProcessGroup = data
        self.everyone: dist.ProcessGroup = dist.new_group(backend="gloo")
        self._peers: PeerCopies | None = None
        self._peers_made = False
        self._made: set[tuple[tuple[int, ...], bool]] = set()
        self._owners: dict[tuple[tuple[int, ...], bool], dist.ProcessGroup] = {}

    def peer_copies(self, device: torch.device) -> PeerCopies | None:
        """How the pipeline's GPUs copy to each other without NCCL; None where they cannot. All ranks ask together.

        Args:
            device: This rank's.
        """
        if not self._peers_made:
            self._peers_made = True
            self._peers = PeerCopies.make(self.pipeline, self.control, device)
        return self._peers

    def release(self) -> None:
        """Let no GPU wait for a rank that has failed; behind an error, and the end of these groups' use."""
        if self._peers is not None:
            self._peers.release()

    def of_owners(
        self, owners: Iterable[tuple[tuple[int, ...], bool]]
    ) -> dict[tuple[tuple[int, ...], bool], dist.ProcessGroup]:
        """Groups of the ranks at given positions of their pipelines; every rank asks for the same ones.

        Args:
            owners: Positions, ascending, and whether the group spans the data-parallel ranks or is one for each of
                them.

        Returns:
            Those groups that this rank is in and that have more than one rank.
        """
        for positions, across in sorted(set(owners) - self._made):
            self._made.add((positions, across))
            data = [range(self.layout.data)] if across else [range(d, d + 1) for d in range(self.layout.data)]
            for part in data:
                ranks = [self.layout.global_rank(p, d) for p in positions for d in part]
                if len(ranks) > 1:
                    group = dist.new_group(ranks)
                    if dist.get_rank() in ranks:
                        self._owners[positions, across] = group
        return dict(self._owners)
