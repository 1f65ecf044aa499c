# SPDX-License-Identifier: Apache-2.0
"""Is a target's call what its blocks compute one after another? Asked once, of a copy, on the first micro-batch.

``configure_pipeline() -> (target, blocks)`` promises it, and a forgotten norm or a wrong order would train another
model without any error. Once a model is cut no rank can run it whole, so a copy is kept on the CPU from before the cut
until the first micro-batch. Not checked: models above ``LARGEST`` parameters (check a small configuration of them),
models on the meta device, and what cannot be copied; in evaluation mode, so dropout is none of it.
"""

from __future__ import annotations

import copy
import warnings
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from lightning_zeroprompt.pipeline.chain import Calls, Chain

__all__ = ["LARGEST", "ChainCopy"]

LARGEST = 50_000_000
"""Parameters: 200 MB, and a second or so for the two passes."""


class ChainCopy:
    """A target and its blocks, for one comparison.

    Args:
        chain: With a target; not cut yet.
    """

    def __init__(self, chain: Chain) -> None:
        if chain.target is None:
            raise ValueError("blocks without a target have nothing to be compared with")
        target, blocks = copy.deepcopy((chain.target, chain.blocks))
        self._target = target.cpu().eval()
        self._chain = Chain(target, blocks, target, chain.name)

    @classmethod
    def of(cls, chain: Chain) -> ChainCopy | None:
        """A copy; None where there is nothing to check, or it is not affordable."""
        target = chain.target
        if target is None or (type(target) is nn.Sequential and list(target) == chain.blocks):
            return None
        tensors = [*target.parameters(), *target.buffers()]
        if any(tensor.is_meta for tensor in tensors) or sum(tensor.numel() for tensor in tensors) > LARGEST:
            return None
        try:
            return cls(chain)
        except Exception as error:
            warnings.warn(
                f"{chain.name} could not be copied ({error}), so it is not checked that they compute what "
                f"{type(target).__name__} does",
                stacklevel=2,
            )
            return None

    def compare(self, calls: Calls) -> None:
        """Run both.

        Args:
            calls: What user code called the target with.

        Raises:
            ValueError: If they return different numbers.
        """
        target = self._target
        dtype = next((p.dtype for p in target.parameters() if p.is_floating_point()), torch.get_default_dtype())

        def to_copy(tensor: Tensor) -> Tensor:
            tensor = tensor.detach().cpu()
            return tensor.to(dtype) if tensor.is_floating_point() else tensor.clone()

        args, kwargs = tree_map_only(Tensor, to_copy, (calls.args, calls.kwargs))
        with torch.no_grad():
            whole = tree_leaves(target(*args, **kwargs))
            chained = tree_leaves(self._chain.run(0, len(self._chain), args, replace(calls, args=args, kwargs=kwargs)))
        problem = f"{len(whole)} values against {len(chained)}" if len(whole) != len(chained) else ""
        for one, other in zip(whole, chained, strict=False):
            if isinstance(one, Tensor) and isinstance(other, Tensor) and not problem:
                try:
                    torch.testing.assert_close(other, one, equal_nan=True)
                except AssertionError as error:
                    problem = str(error)
        if problem:
            raise ValueError(
                f"{self._chain.name}: called one after another they do not return what {type(target).__name__} "
                f"returns for the same input ({problem}). Whatever its forward does has to be in a block, in the order "
                "of the list"
            )
