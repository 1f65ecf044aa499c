# SPDX-License-Identifier: Apache-2.0
"""Parts and wholes: which rank writes an entry of a checkpoint, and what a rank keeps of a whole one."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.pipeline.torch_compat import shard_like

__all__ = ["OPTIMIZERS", "Path", "Writers", "all_named", "keep_part", "local_state", "merge_aliases", "own_parts"]

Path = tuple[str, ...]
"""Where a value stands in a checkpoint: ``("state_dict", name)`` or ``("optimizer_0", "state", name, key)``."""

OPTIMIZERS = "optimizer_states"


class Writers:
    """Which pipeline rank writes which entry of the module's state.

    A parameter is written by the first rank that holds it. A buffer (or a module's extra state) is written by the rank
    of the stage that its module is in; one outside all stages by the last stage's, where user code runs to its end.
    Data-parallel ranks write their shards of a sharded tensor, and the first of them what is whole.

    Args:
        pipeline: This rank's part of the model.

    Attributes:
        shapes: Of the whole model's tensors, by every name they have.
        aliases: For each further name of a tied parameter its first one.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        root, placement = pipeline.chain.root, pipeline.placement
        owned_names = {id(parameter): name for name, parameter in root.named_parameters()}
        stage_of: dict[int, int] = {}
        for stage in range(placement.stages):
            for module in pipeline.modules_of(stage):
                for part in module.modules():
                    stage_of.setdefault(id(part), stage)
        stages = {name: stage_of.get(id(part)) for name, part in root.named_modules(remove_duplicate=False)}
        self._mine = pipeline.groups.pipeline_rank
        self._leads = pipeline.groups.data_rank == 0
        self._ranks: dict[str, int] = {}
        self._last = placement.rank_of(placement.stages - 1)
        self.shapes: dict[str, torch.Size] = {}
        self.aliases: dict[str, str] = {}
        first: dict[int, str] = {}
        for key, value in root.state_dict(keep_vars=True).items():
            if isinstance(value, Tensor):
                self.shapes[key] = value.shape
            if isinstance(value, nn.Parameter):
                if id(value) in first:
                    self.aliases[key] = first[id(value)]
                first.setdefault(id(value), key)
            if id(value) in owned_names:
                self._ranks[key] = pipeline.owners[owned_names[id(value)]][0]
            else:
                within = stages.get(key.rpartition(".")[0])
                self._ranks[key] = self._last if within is None else placement.rank_of(within)

    def writes(self, name: str, value: Any) -> bool:
        """Whether this rank writes (its shard of) an entry."""
        if self._ranks.get(name, self._last) != self._mine:
            return False
        return self._leads or isinstance(value, DTensor)


def sections(checkpoint: Mapping[str, Any], writers: Writers) -> Iterator[str]:
    """Keys of a checkpoint under which parameters lie by name: ``state_dict``, and what callbacks put beside it."""
    for key, value in checkpoint.items():
        if isinstance(value, Mapping) and (
            key == "state_dict"
            or any(name in writers.shapes and isinstance(part, Tensor) for name, part in value.items())
        ):
            yield key


def own_parts(checkpoint: Mapping[str, Any], writers: Writers) -> tuple[dict[Path, Any], dict[str, Any]]:
    """Take a checkpoint apart.

    Args:
        checkpoint: As Lightning has dumped it on this rank, with optimizer states by name.
        writers: Of this model.

    Returns:
        What this rank writes, and what is left: that is rank 0's to write.

    Raises:
        ValueError: If sharded tensors are where they would be lost.
    """
    parts: dict[Path, Any] = {}
    lost: list[str] = []
    # In the checkpoint's order, which all ranks share: a set of strings has another one in every process.
    named = list(sections(checkpoint, writers))
    for key in named:
        section = checkpoint[key]
        for name, value in section.items():
            if writers.aliases.get(name) in section or not writers.writes(name, value):
                continue
            if isinstance(value, Tensor) and value.is_meta:
                lost.append(f"{key}[{name!r}]")
                continue
            parts[key, name] = value
    for index, states in enumerate(checkpoint.get(OPTIMIZERS, ())):
        for name, values in states["state"].items():
            for key, value in values.items():
                if writers.writes(name, value):
                    parts[f"optimizer_{index}", "state", name, key] = value
    if lost:
        # On the rank that should have it: only a callback with a copy of its own can have lost it.
        warnings.warn(f"not saved, since this rank should hold them but has them on meta: {sorted(lost)}", stacklevel=2)
    rest = {key: value for key, value in checkpoint.items() if key not in (*named, OPTIMIZERS)}
    for key, value in rest.items():
        if any(isinstance(leaf, DTensor) for leaf in tree_leaves(value)):
            raise ValueError(
                f"checkpoint[{key!r}] holds sharded tensors (DTensor) that are not keyed by the names of the module's "
                "parameters, and cannot be saved whole. Store a dict from parameter names to tensors at the top of the "
                "checkpoint, or tensor.full_tensor() on all ranks"
            )
    return parts, rest


def merge_aliases(section: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Give tied parameters all their names back."""
    return {**section, **{name: section[first] for name, first in aliases.items() if first in section}}


def keep_part(whole: Tensor, like: Tensor) -> Tensor:
    """What a rank keeps of a whole tensor: its shard where ``like`` is sharded, nothing where ``like`` is on meta.

    Args:
        whole: On the CPU, perhaps mapped from a file.
        like: The rank's own tensor of the same name.

    Returns:
        A new tensor, or ``whole`` itself where shapes differ.
    """
    if whole.shape != like.shape:
        return whole
    if like.is_meta:
        return whole.to("meta")
    return shard_like(whole, like) if isinstance(like, DTensor) else whole.clone()


def local_state(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Keep this rank's part of a state of the whole module.

    Args:
        module: The module, cut.
        state: Of the whole model, or already this rank's.
    """
    own = module.state_dict()
    return {
        name: keep_part(value, own[name])
        if isinstance(value, Tensor) and not isinstance(value, DTensor) and isinstance(own.get(name), Tensor)
        else value
        for name, value in state.items()
    }


def all_named(problems: Mapping[str, list[str]], limit: int = 8) -> str:
    """Lists of names for a message, the long ones cut."""
    texts = []
    for what, names in problems.items():
        if names:
            more = f" and {len(names) - limit} more" if len(names) > limit else ""
            texts.append(f"{what}: {', '.join(names[:limit])}{more}")
    return "; ".join(texts)
