# SPDX-License-Identifier: Apache-2.0
"""One batch for all ranks of a pipeline.

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
from torch.utils._pytree import tree_flatten, tree_unflatten

from lightning_zeroprompt.pipeline.layout import ProcessGroups

__all__ = ["broadcast_batch"]


def broadcast_batch(batch: Any, groups: ProcessGroups) -> Any:
    """Give every rank of a pipeline the batch of its first rank.

    Args:
        batch: On the device; nested as ``torch.utils._pytree`` knows it, anything else is one leaf and is pickled.
        groups: The ranks.

    Returns:
        The first rank's batch.
    """
    source = groups.layout.global_rank(0, groups.data_rank)
    leaves, spec = tree_flatten(batch)
    device = next((leaf.device for leaf in leaves if isinstance(leaf, Tensor)), torch.device("cpu"))
    here = groups.pipeline_rank == 0
    message: list[Any] = [None]
    if here:
        described = [_Shape(tuple(leaf.shape), leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        message = [(described, spec)]
    dist.broadcast_object_list(message, source, group=groups.control)
    described, spec = message[0]
    received = []
    for index, leaf in enumerate(described):
        if isinstance(leaf, _Shape):
            tensor = leaves[index].contiguous() if here else torch.empty(leaf.shape, dtype=leaf.dtype, device=device)
            dist.broadcast(tensor, source, group=groups.pipeline)
            received.append(tensor)
        else:
            received.append(leaf)
    return tree_unflatten(received, spec)


class _Shape:
    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype
