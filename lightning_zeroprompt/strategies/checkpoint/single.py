# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as one file, as Lightning writes it without any strategy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from lightning_zeroprompt.pipeline.layout import ProcessGroups
from lightning_zeroprompt.strategies.checkpoint.optimizer import names_to_numbers
from lightning_zeroprompt.strategies.checkpoint.state import OPTIMIZERS, Path, merge_aliases

__all__ = ["assemble", "gather_tensors", "gather_values"]


def gather_values(parts: Mapping[Path, Any], groups: ProcessGroups) -> dict[Path, Any]:
    """Send what is no tensor to rank 0; all ranks together.

    Returns:
        On rank 0 what all ranks have, elsewhere nothing.
    """
    mine = {path: value for path, value in parts.items() if not isinstance(value, Tensor)}
    if groups.data_rank:
        return {}
    everyone: list[Any] | None = [None] * groups.layout.pipeline if groups.pipeline_rank == 0 else None
    dist.gather_object(mine, everyone, dst=0, group=groups.control)
    return {path: value for values in everyone or [] for path, value in values.items()}


def gather_tensors(parts: Mapping[Path, Any], groups: ProcessGroups) -> dict[Path, Tensor]:
    """Send tensors to rank 0, one after the other; all ranks together.

    Shards are put together on the device, by the ranks that have them; whole tensors travel and are kept on the CPU. At
    no time is more than one whole tensor on a device.

    Args:
        parts: What this rank writes.
        groups: The ranks.

    Returns:
        On rank 0 all tensors, in pipeline order; elsewhere nothing.
    """
    mine = {path: value for path, value in parts.items() if isinstance(value, Tensor)}
    leads, first = groups.data_rank == 0, groups.pipeline_rank == 0
    announced: list[Any] = [None] * groups.layout.pipeline
    if leads:
        shapes = [(path, value.shape, value.dtype) for path, value in mine.items()]
        dist.gather_object(shapes, announced if first else None, dst=0, group=groups.control)
    gathered: dict[Path, Tensor] = {}
    for path, value in mine.items():
        whole = _whole(value)
        if leads and first:
            gathered[path] = whole.cpu()
        elif leads and whole.numel():
            dist.send(whole.cpu().contiguous(), dst=0, group=groups.control)
    if leads and first:
        for rank in range(1, groups.layout.pipeline):
            for path, shape, dtype in announced[rank]:
                gathered[path] = torch.empty(shape, dtype=dtype)
                if gathered[path].numel():
                    dist.recv(gathered[path], src=groups.layout.global_rank(rank, 0), group=groups.control)
    return gathered


def _whole(value: Tensor) -> Tensor:
    if isinstance(value, DTensor):
        # Offloaded shards are gathered where the data-parallel ranks can talk to each other.
        gathered: DTensor = value.to(value.device_mesh.device_type)  # type: ignore[assignment]
        return gathered.full_tensor()
    return value.detach()


def assemble(
    rest: Mapping[str, Any],
    parts: Mapping[Path, Any],
    param_groups: Sequence[Any],
    aliases: Mapping[str, str],
    order: Sequence[str] = (),
) -> dict[str, Any]:
    """Put a Lightning checkpoint together.

    Args:
        rest: All but states.
        parts: Whole tensors, and what is no tensor, in their places.
        param_groups: Of each optimizer, by name.
        aliases: Further names of tied parameters.
        order: Names of the module's state in order; the others come behind.
    """
    sections: dict[str, dict[str, Any]] = {"state_dict": {}}
    states: list[dict[str, dict[str, Any]]] = [{} for _ in param_groups]
    for path, value in parts.items():
        if len(path) == 2:
            sections.setdefault(path[0], {})[path[1]] = value
        else:
            states[int(path[0].removeprefix("optimizer_"))].setdefault(path[2], {})[path[3]] = value
    checkpoint = dict(rest)
    for key, section in sections.items():
        named = merge_aliases(section, aliases)
        checkpoint[key] = {name: named.pop(name) for name in order if name in named} | named
    if param_groups:
        checkpoint[OPTIMIZERS] = [
            names_to_numbers({"state": state, "param_groups": groups})
            for state, groups in zip(states, param_groups, strict=True)
        ]
    return checkpoint
