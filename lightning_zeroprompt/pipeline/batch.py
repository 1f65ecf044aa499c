# SPDX-License-Identifier: Apache-2.0
"""Batches to micro-batches.

A batch is any nesting of mappings, lists, tuples, named tuples and dataclasses. Its tensors are cut on dimension 0, the
batch dimension; everything else (numbers, strings, tensors without dimensions) goes into every micro-batch.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["batch_rows", "choose_micro_batches", "map_leaves", "signature", "split_batch", "split_sizes"]


def _children(part: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield f"[{key!r}]", value
    elif isinstance(part, (list, tuple)):
        for index, value in enumerate(part):
            yield f"[{index}]", value
    elif is_dataclass(part) and not isinstance(part, type):
        for field in fields(part):
            yield f".{field.name}", getattr(part, field.name)


def _tensors(part: Any, path: str = "batch") -> Iterator[tuple[str, Tensor]]:
    if isinstance(part, Tensor):
        yield path, part
    else:
        for name, value in _children(part):
            yield from _tensors(value, path + name)


def batch_rows(batch: Any) -> int:
    """Rows of a batch: the size of dimension 0 of its tensors.

    Raises:
        ValueError: If it has no tensor with dimensions, or tensors disagree.

    >>> batch_rows({"x": torch.zeros(3, 2), "scale": torch.tensor(1.0)})
    3
    """
    sizes = [(path, tensor.shape[0]) for path, tensor in _tensors(batch) if tensor.dim()]
    if not sizes:
        raise ValueError(
            f"a batch of type {type(batch).__name__} holds no tensor that could be split into micro-batches; "
            "use nested dicts, lists, tuples or dataclasses of tensors, or num_microbatches=1"
        )
    for path, size in sizes:
        if size != sizes[0][1]:
            raise ValueError(
                f"{path} has {size} rows, {sizes[0][0]} has {sizes[0][1]}: tensors are split into micro-batches on "
                "dimension 0, the batch dimension; give all tensors of a batch as many rows, or use num_microbatches=1"
            )
    return sizes[0][1]


def split_sizes(rows: int, micro_batches: int) -> list[int]:
    """Rows of each micro-batch; the first ones are larger by one where M does not divide them.

    >>> split_sizes(7, 3)
    [3, 2, 2]
    """
    small, larger = divmod(rows, micro_batches)
    return [small + (index < larger) for index in range(micro_batches)]


def choose_micro_batches(rows: int, ranks: int) -> int:
    """M where none is given: the largest divisor of the rows that is at most four times the ranks.

    >>> choose_micro_batches(24, 2), choose_micro_batches(7, 2), choose_micro_batches(3, 4)
    (8, 7, 3)
    """
    return next(count for count in range(min(rows, 4 * ranks), 0, -1) if rows % count == 0)


def split_batch(batch: Any, sizes: Sequence[int]) -> list[Any]:
    """Cut a batch into micro-batches of the same nesting.

    Args:
        batch: See the module's text.
        sizes: Rows of each micro-batch, in sum those of the batch.

    Returns:
        One batch a micro-batch; tensors are views.

    >>> split_batch([torch.arange(3), "name"], [2, 1])
    [[tensor([0, 1]), 'name'], [tensor([2]), 'name']]
    """
    if len(sizes) == 1:
        return [batch]
    if isinstance(batch, Tensor):
        return list(torch.split(batch, list(sizes))) if batch.dim() else [batch] * len(sizes)
    children = [split_batch(value, sizes) for _, value in _children(batch)]
    if not children:
        return [batch] * len(sizes)
    return [_rebuild(batch, [child[index] for child in children]) for index in range(len(sizes))]


def map_leaves(part: Any, kind: type, change: Callable[[Any], Any]) -> Any:
    """Change what is nested in a batch.

    Args:
        part: See the module's text.
        kind: What to change.
        change: Called with each in turn.

    Returns:
        The same nesting; the rest is what it was.

    >>> map_leaves({"x": [1, 2.0]}, int, str)
    {'x': ['1', 2.0]}
    """
    if isinstance(part, kind):
        return change(part)
    children = [map_leaves(value, kind, change) for _, value in _children(part)]
    return _rebuild(part, children) if children else part


def _rebuild(batch: Any, children: list[Any]) -> Any:
    """A batch like another, holding other things."""
    if isinstance(batch, MutableMapping):
        # A copy, because subclasses keep more than their items: a factory, encodings.
        made = copy.copy(batch)
        made.update(zip(batch, children, strict=True))
        return made
    if isinstance(batch, Mapping):
        return type(batch)(dict(zip(batch, children, strict=True)))  # type: ignore[call-arg]
    if isinstance(batch, tuple):
        return type(batch)(*children) if hasattr(batch, "_fields") else type(batch)(children)
    if isinstance(batch, list):
        return children
    made = copy.copy(batch)
    for field, child in zip(fields(batch), children, strict=True):
        # Frozen dataclasses too, and fields that are no arguments.
        object.__setattr__(made, field.name, child)
    return made


def signature(batch: Any) -> tuple[tuple[str, tuple[int, ...], str], ...]:
    """Where a batch has tensors, of which shapes and types: what decides the shapes of all that is computed from it."""
    return tuple((path, tuple(tensor.shape), str(tensor.dtype)) for path, tensor in _tensors(batch))
