# SPDX-License-Identifier: Apache-2.0
"""What the Trainer asks of the strategy: save all ranks' parts, load this rank's."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import lightning.pytorch as pl
import torch.distributed as dist
from torch import nn

from lightning_zeroprompt.pipeline.pipeline import Pipeline
from lightning_zeroprompt.strategies.checkpoint.files import Replacement, finish_replacement, load_file, save_file
from lightning_zeroprompt.strategies.checkpoint.folder import META, Folder, write_folder
from lightning_zeroprompt.strategies.checkpoint.single import assemble, gather_tensors, gather_values
from lightning_zeroprompt.strategies.checkpoint.state import OPTIMIZERS, Writers, local_state, own_parts
from lightning_zeroprompt.strategies.optimizers import OwnedOptimizers

__all__ = ["load_checkpoint", "load_module_state", "save_checkpoint"]

T = TypeVar("T")


def save_checkpoint(checkpoint: dict[str, Any], target: Path, pipeline: Pipeline, *, as_folder: bool) -> None:
    """Save a checkpoint; all ranks together. What stands at the place is replaced when the new one is whole.

    Args:
        checkpoint: As Lightning has dumped it on this rank, optimizer states by name.
        target: The place, the same on all ranks.
        pipeline: This rank's part of the model.
        as_folder: A folder, or one file.

    Raises:
        IsADirectoryError: If the place of a file is a folder that is no checkpoint.
        RuntimeError: If another rank has failed.
    """
    groups, zero = pipeline.groups, dist.get_rank() == 0
    writers = Writers(pipeline)
    param_groups = [states["param_groups"] for states in checkpoint.get(OPTIMIZERS, ())]
    parts, rest = _together(lambda: own_parts(checkpoint, writers), target)

    def prepare() -> Replacement | None:
        if target.is_dir() and not (target / META).is_file():
            raise IsADirectoryError(f"{target} is a folder that is no checkpoint; it is not replaced")
        return Replacement(target) if zero else None

    replacement = _together(prepare, target)
    try:
        values = gather_values(parts, groups)
        if as_folder:
            content = Replacement.content_for(target)
            _together(lambda: write_folder(content, parts, rest, values, param_groups, writers.aliases), target)
        else:
            tensors = gather_tensors(parts, groups)

            def write() -> None:
                if replacement is not None:
                    order = list(checkpoint["state_dict"])
                    whole = assemble(rest, {**tensors, **values}, param_groups, writers.aliases, order)
                    save_file(whole, replacement.content)

            _together(write, target)
        _together(lambda: replacement.commit() if replacement is not None else None, target)
    except BaseException:
        if replacement is not None:
            replacement.discard()
        raise


def _together(action: Callable[[], T], target: Path) -> T:
    """Run something on every rank; where it fails on one, it fails on all."""
    result: T | None = None
    failure: Exception | None = None
    try:
        result = action()
    except Exception as error:
        failure = error
    texts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, f"{type(failure).__name__}: {failure}" if failure is not None else None)
    if failure is not None:
        raise failure
    for rank, text in enumerate(texts):
        if text is not None:
            raise RuntimeError(f"rank {rank} could not save to {target}; what was there is untouched: {text}")
    return result  # type: ignore[return-value]


def load_checkpoint(
    path: Path,
    pipeline: Pipeline,
    optimizer: OwnedOptimizers | None,
    *,
    strict: bool,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Load a checkpoint of either form; all ranks together.

    Args:
        path: The same on all ranks, and seen by all.
        pipeline: This rank's part of the model. Of a folder its tensors are filled at once; a file is mapped, and
            ``load_module_state`` takes from it what ``on_load_checkpoint`` hooks have left.
        optimizer: Whose state is to be restored; None for none.
        strict: Whether names have to be the same.
        weights_only: As the strategy was told; None also looks at what the Trainer was told.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is no checkpoint, not of this module, incomplete, or lacks optimizer state that is asked for.
    """
    if dist.get_rank() == 0:
        finish_replacement(path)
    dist.barrier()
    if not path.exists():
        raise FileNotFoundError(
            f"there is no checkpoint at {path}"
            + (f" on rank {dist.get_rank()}; all ranks have to see it" if dist.get_world_size() > 1 else "")
        )
    if weights_only is None:
        weights_only = _trainers_weights_only()
    if path.is_dir():
        folder = Folder(path, weights_only=weights_only)
        has_optimizer = bool(folder.param_groups)
    else:
        checkpoint = load_file(path, weights_only=weights_only)
        if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
            raise ValueError(f"{path} is no Lightning checkpoint: it has no state_dict at its top")
        has_optimizer = bool(checkpoint.get(OPTIMIZERS))
    if optimizer is not None and not has_optimizer:
        raise ValueError(
            f"{path} holds no optimizer state (save_weights_only=True?), so training cannot go on from it. Load the "
            "weights alone (load_from_checkpoint, or load_state_dict in configure_model) and fit without ckpt_path"
        )
    return folder.load(pipeline.chain.root, optimizer, strict=strict) if path.is_dir() else checkpoint


def load_module_state(module: nn.Module, state: Mapping[str, Any], *, strict: bool) -> None:
    """Load this rank's part of a state; every rank finds the same names and shapes at fault.

    Args:
        module: The module, cut.
        state: Of the whole model, or this rank's part.
        strict: Whether names have to be the same.

    Raises:
        ValueError: If names or shapes differ.
    """
    try:
        module.load_state_dict(local_state(module, state), strict=strict)
    except RuntimeError as error:
        raise ValueError(
            f"{error}\nBuild the module that was saved, change names in on_load_checkpoint, or set its "
            "strict_loading = False to load what both have"
        ) from error


def _trainers_weights_only() -> bool | None:
    """What ``trainer.fit(weights_only=...)`` was given: Lightning 2.6 drops it where states are loaded after set-up."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_code is not pl.Trainer._run.__code__:
        frame = frame.f_back
    return None if frame is None else frame.f_locals.get("weights_only")
