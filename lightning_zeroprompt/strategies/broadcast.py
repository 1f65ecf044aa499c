# SPDX-License-Identifier: Apache-2.0
"""Values that one rank of a pipeline has and all need: batches, and what steps return.

The first stage reads inputs, the last one labels. Their data loaders are different processes: another seed, a random
augmentation in a worker, a callback that draws a number on rank 0, and inputs no longer belong to labels, without any
error. So a pipeline trains on what its first rank has drawn. Cost: one small message on the CPU a batch, and the
batch's tensors once over the pipeline's links.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_zeroprompt.pipeline.batch import map_leaves
from lightning_zeroprompt.pipeline.layout import ProcessGroups

__all__ = ["broadcast_nested"]


def broadcast_nested(value: Any, source: int, groups: ProcessGroups, device: torch.device) -> Any:
    """Give every rank of a pipeline what one of them has.

    Args:
        value: Nested as batches are; tensors in it are sent as such, anything else is pickled. Ignored on other ranks.
        source: Global rank that has it.
        groups: The ranks.
        device: Of this rank; tensors that are not on the CPU arrive here.

    Returns:
        The source's value.
    """
    if groups.layout.pipeline == 1:
        return value
    here = dist.get_rank() == source
    tensors: list[Tensor] = []

    def describe(tensor: Tensor) -> _Shape:
        tensors.append(tensor.detach())
        return _Shape(tuple(tensor.shape), tensor.dtype, tensor.device.type == "cpu")

    message = [map_leaves(value, Tensor, describe) if here else None]
    dist.broadcast_object_list(message, source, group=groups.control)
    received: list[Tensor] = []

    def prepare(shape: _Shape) -> Tensor:
        received.append(torch.empty(shape.shape, dtype=shape.dtype, device="cpu" if shape.on_cpu else device))
        return received[-1]

    result = value if here else map_leaves(message[0], _Shape, prepare)
    for tensor in tensors if here else received:
        if tensor.numel():
            # Bytes: gloo knows some types only.
            content = tensor.contiguous().view(-1).view(torch.uint8)
            dist.broadcast(content, source, group=groups.control if tensor.device.type == "cpu" else groups.pipeline)
    return result


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype, on_cpu: bool) -> None:
        self.shape, self.dtype, self.on_cpu = shape, dtype, on_cpu
