# SPDX-License-Identifier: Apache-2.0
"""A checkpoint as a folder: tensors through ``torch.distributed.checkpoint``, everything else in ``meta.pt``."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path as FilePath
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor

from lightning_zeroprompt.pipeline.torch_compat import SafeFileSystemReader
from lightning_zeroprompt.strategies.checkpoint.files import load_file, save_file
from lightning_zeroprompt.strategies.checkpoint.state import OPTIMIZERS, Path, all_named
from lightning_zeroprompt.strategies.optimizers import OwnedOptimizers

__all__ = ["META", "Folder", "write_folder"]

META = "meta.pt"
_INDEX = ".metadata"
_OURS = "zeropp"


def write_folder(
    folder: FilePath,
    parts: Mapping[Path, Any],
    rest: Mapping[str, Any],
    values: Mapping[Path, Any],
    param_groups: Sequence[Any],
    aliases: Mapping[str, str],
) -> None:
    """Write a folder; all ranks together.

    Args:
        folder: Where to; not there yet.
        parts: What this rank writes; of it the tensors.
        rest: On rank 0: everything else, for ``meta.pt``.
        values: On rank 0: what all ranks have that is no tensor.
        param_groups: Of each optimizer, by name.
        aliases: Further names of tied parameters.

    Raises:
        RuntimeError: If a rank could not write.
    """
    try:
        save(_nested(parts), storage_writer=FileSystemWriter(folder))
    except CheckpointException as error:
        raise RuntimeError(_told(error, "write")) from error
    if dist.get_rank() == 0:
        ours = {"version": 1, "aliases": dict(aliases), "values": dict(values), "param_groups": list(param_groups)}
        save_file({**rest, _OURS: ours}, folder / META)


class Folder:
    """A checkpoint folder, opened; tensors are read later.

    Args:
        path: The folder.
        weights_only: For ``meta.pt``, see ``load_file``.

    Attributes:
        rest: The checkpoint but for states of modules and optimizers.
        entries: The tensors.
        values: What is no tensor in states.
        param_groups: Of each optimizer, by name.
        aliases: For further names of tied parameters the name under which they were saved.

    Raises:
        ValueError: If it is no such folder, or incomplete.
    """

    def __init__(self, path: FilePath, *, weights_only: bool | None = None) -> None:
        self.path = path
        absent = [name for name in (META, _INDEX) if not (path / name).is_file()]
        if absent:
            raise ValueError(
                f"{path} is no checkpoint folder, or a part of one: {' and '.join(absent)} missing. Give the folder "
                "that was saved; a copy has to have all its files, also hidden ones"
            )
        self.rest: dict[str, Any] = load_file(path / META, weights_only=weights_only)
        ours = self.rest.pop(_OURS, None) if isinstance(self.rest, dict) else None
        if ours is None:
            raise ValueError(
                f"{path} was saved by another strategy than zeropp; have that one save one file "
                "(save_distributed_checkpoint=False), which all can read"
            )
        self.values: dict[Path, Any] = ours["values"]
        self.param_groups: list[Any] = ours["param_groups"]
        self.aliases: dict[str, str] = ours["aliases"]
        try:
            self._reader = SafeFileSystemReader(path)
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, TypeError) as error:
            raise ValueError(f"{path / _INDEX} is no index of a checkpoint folder, or damaged: {error}") from error
        index = self._reader.index
        self.entries: dict[Path, TensorStorageMetadata] = {
            index.planner_data[name]: entry
            for name, entry in index.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }
        self._check_files()

    def _check_files(self) -> None:
        sizes: dict[str, int] = {}
        for info in self._reader.index.storage_data.values():
            sizes[info.relative_path] = max(sizes.get(info.relative_path, 0), info.offset + info.length)
        foreign = [name for name in sizes if FilePath(name).name != name]
        if foreign:
            raise ValueError(f"{self.path / _INDEX} points out of its folder: {foreign}")
        for name, size in sorted(sizes.items()):
            file = self.path / name
            found = file.stat().st_size if file.is_file() else None
            if found is None or found < size:
                state = "missing" if found is None else f"of {found} bytes, {size} are needed"
                raise ValueError(f"the checkpoint folder {self.path} is incomplete: {name} is {state}. Copy it again")

    def sections(self) -> list[str]:
        """Keys under which parameters lie by name; ``state_dict`` is one."""
        return sorted({path[0] for path in (*self.entries, *self.values) if len(path) == 2})

    def read(self, targets: Mapping[Path, Tensor], *, alone: bool = False) -> None:
        """Fill tensors.

        Args:
            targets: To fill; of a sharded one the shard.
            alone: Without the other ranks; else all ranks together, each with its own targets.

        Raises:
            RuntimeError: If a rank could not read.
        """
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "torch.distributed is disabled")
                load(_nested(targets), storage_reader=self._reader, no_dist=alone)
        except CheckpointException as error:
            raise RuntimeError(f"{self.path}: {_told(error, 'read')}") from error

    def load(self, module: nn.Module, optimizer: OwnedOptimizers | None, *, strict: bool) -> dict[str, Any]:
        """Load this rank's part; all ranks together.

        Args:
            module: The module, cut: its own tensors are filled.
            optimizer: Whose state to read; None for none.
            strict: Whether names have to be the same.

        Returns:
            The checkpoint, with this rank's part of all states, other ranks' tensors on the meta device.

        Raises:
            ValueError: If names or shapes differ from the module's; nothing is loaded then.
        """
        own = module.state_dict()
        self._compare(own, strict)
        targets: dict[Path, Tensor] = {}
        checkpoint = dict(self.rest)
        for key in self.sections():
            checkpoint[key] = section = {}
            for name, mine in own.items():
                source = (key, name if (key, name) in self.entries else self.aliases.get(name, name))
                if source in self.values:
                    section[name] = self.values[source]
                elif source in self.entries and isinstance(mine, Tensor):
                    if mine.is_meta:
                        section[name] = mine
                        continue
                    if source not in targets:
                        dtype = self.entries[source].properties.dtype
                        targets[source] = mine if key == "state_dict" else torch.empty_like(mine, dtype=dtype)
                    section[name] = targets[source]
        if optimizer is not None and self.param_groups:
            checkpoint[OPTIMIZERS] = [self._optimizer_targets(module, targets)]
        self.read(targets)
        return checkpoint

    def _optimizer_targets(self, module: nn.Module, targets: dict[Path, Tensor]) -> dict[str, Any]:
        parameters = dict(module.named_parameters())
        state: dict[str, dict[str, Any]] = {}
        for path, entry in self.entries.items():
            if len(path) != 4:
                continue
            _, _, name, key = path
            parameter = parameters.get(name)
            if parameter is None or parameter.is_meta:
                continue
            if isinstance(parameter, DTensor) and entry.size == parameter.shape:
                targets[path] = torch.empty_like(parameter, dtype=entry.properties.dtype, requires_grad=False)
            else:
                targets[path] = torch.empty(entry.size, dtype=entry.properties.dtype)
            state.setdefault(name, {})[key] = targets[path]
        for path, value in self.values.items():
            if len(path) == 4:
                state.setdefault(path[2], {})[path[3]] = value
        return {"state": state, "param_groups": self.param_groups[0]}

    def _compare(self, own: Mapping[str, Any], strict: bool) -> None:
        stored = {path[1]: entry.size for path, entry in self.entries.items() if path[0] == "state_dict"}
        stored |= {name: stored[first] for name, first in self.aliases.items() if first in stored and name in own}
        extra = {path[1] for path in self.values if path[0] == "state_dict"}
        shapes = {name: value.shape for name, value in own.items() if isinstance(value, Tensor)}
        problems = {
            "of other shapes": [
                f"{name} ({tuple(stored[name])} in the checkpoint, {tuple(shape)} in the module)"
                for name, shape in shapes.items()
                if name in stored and stored[name] != shape
            ]
        }
        if strict:
            problems["missing in the checkpoint"] = [name for name in own if name not in stored and name not in extra]
            problems["not in the module"] = sorted((set(stored) | extra) - set(own))
        if any(problems.values()):
            raise ValueError(
                f"the parameters in {self.path} are not the module's: {all_named(problems)}. Build the module that was "
                "saved; set its strict_loading = False to load what both have; or make one file with "
                "lightning_zeroprompt.strategies.consolidate_checkpoint, whose names on_load_checkpoint can change"
            )


def _nested(parts: Mapping[Path, Any]) -> dict[str, Any]:
    """Tensors in nested dicts: torch's index keeps such paths apart, whatever dots are in names."""
    tree: dict[str, Any] = {}
    for path, value in parts.items():
        if isinstance(value, Tensor):
            node = tree
            for step in path[:-1]:
                node = node.setdefault(step, {})
            node[path[-1]] = value
    return tree


def _told(error: CheckpointException, what: str) -> str:
    failures = {rank: f"{type(cause).__name__}: {cause}" for rank, (cause, _) in error.failures.items()}
    return f"could not {what} the checkpoint on " + "; ".join(f"rank {rank}: {t}" for rank, t in failures.items())
