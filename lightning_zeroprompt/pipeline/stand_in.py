# SPDX-License-Identifier: Apache-2.0
"""What is in a module's place while user code runs without it.

Where a rank lacks a module outside the blocks, its stand-in returns NaN in the right shape: code that really needed it
cannot go unnoticed. An empty key-value cache (what ``transformers`` models make where ``use_cache`` is not switched
off) is not passed on to blocks: it would fill with keys that nobody reads, and once more when a checkpointed block runs
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

__all__ = ["StandIn", "nothing_of", "without_caches"]


class StandIn(nn.Module):
    """In a module's place while user code runs; attributes are the module's.

    Args:
        block: Whose place it is.
        call: What its call does.

    Raises:
        RuntimeError: If an attribute is read whose value is on another rank.
    """

    def __init__(self, block: nn.Module, call: Callable[..., Any]) -> None:
        super().__init__()
        object.__setattr__(self, "_block", block)
        object.__setattr__(self, "_call", call)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.__dict__["_block"], name)
        if isinstance(value, nn.Parameter) and value.is_meta:
            raise RuntimeError(
                f"user code reads the parameter {name!r} of {type(self.__dict__['_block']).__name__}, which another "
                "rank holds. A tied weight has to be a parameter of both modules (self.head.weight = "
                "self.embedding.weight); for anything else return blocks that hold what they use from "
                "configure_pipeline()"
            )
        if isinstance(value, Tensor) and name in vars(self.__dict__["_block"]):
            raise RuntimeError(
                f"user code reads {name!r} of {type(self.__dict__['_block']).__name__}, a tensor that the block makes "
                "when it runs, on another rank perhaps. Return (target, blocks) from configure_pipeline() with blocks "
                "that pass it on"
            )
        return value

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call ``call``."""
        return self.__dict__["_call"](*args, **kwargs)


def nothing_of(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a module that is not here would return, with NaN (or zeros) for numbers.

    Args:
        module: Its parameters may be on the meta device.
        args: What it is called with.
        kwargs: Likewise.
    """
    device = next((leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
    # Copies of tied parameters may be real, or sharded, on this rank.
    weights = {name: torch.empty(p.shape, dtype=p.dtype, device="meta") for name, p in module.named_parameters()}
    with torch.no_grad():
        shapes = functional_call(module, weights, _to_meta(args), _to_meta(kwargs))
    return tree_map_only(Tensor, lambda shape: _nothing(shape, device), shapes)


def _is_cache(part: Any) -> bool:
    return hasattr(type(part), "get_seq_length") and hasattr(type(part), "update")


def without_caches(given: Any) -> Any:
    """What blocks are given, without key-value caches, which are none of a micro-batch's data.

    Raises:
        ValueError: If one is not empty.
    """

    def leave_out(part: Any) -> Any:
        if not _is_cache(part):
            return part
        if part.get_seq_length():
            raise ValueError(
                f"blocks are given a {type(part).__name__} of {part.get_seq_length()} earlier positions, which cannot "
                "reach other stages: pass the whole sequence and use_cache=False"
            )
        return None

    return tree_map(leave_out, given, is_leaf=_is_cache)


def _to_meta(part: Any) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.to("meta"), part)


def _nothing(shape: Tensor, device: torch.device | None) -> Tensor:
    filled = torch.empty(shape.shape, dtype=shape.dtype, device=device)
    return filled.fill_(float("nan")) if filled.is_floating_point() else filled.zero_()
