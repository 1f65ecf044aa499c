# SPDX-License-Identifier: Apache-2.0
"""Where a checkpoint is written until it is whole, and how files are read without running code that is in them."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout

__all__ = ["Replacement", "finish_replacement", "load_file", "save_file"]

_PREFIX, _SUFFIX = ".", ".partial"


class Replacement:
    """A checkpoint in the making: a hidden folder beside the place that it is for.

    What a killed save left in the same folder is removed first. The folder is locked by the system for as long as its
    process lives, so that a save that still runs is left alone.

    Args:
        target: The place; a file, a folder, or nothing yet.

    Attributes:
        content: Where to write.

    Raises:
        RuntimeError: If another process is saving to the same place.
        OSError: If the folder cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self._folder = _partial(target)
        self.content = self.content_for(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        for folder in target.parent.glob(f"{_PREFIX}*{_SUFFIX}"):
            _remove_leftover(folder)
        try:
            self._folder.mkdir()
        except FileExistsError:
            raise RuntimeError(
                f"another process is saving a checkpoint to {target}: give every run a folder of its own"
            ) from None
        self._lock = FileLock(self._folder / "lock")
        self._lock.acquire(timeout=0)

    @staticmethod
    def content_for(target: Path) -> Path:
        """Where the ranks that did not make the replacement write."""
        return _partial(target) / "content"

    def commit(self) -> None:
        """Put the content in its place; what was there is removed when it stands."""
        if self.target.is_dir() or self.content.is_dir():
            # A folder cannot be renamed onto something: see finish_replacement for a kill between the two.
            if self.target.is_symlink():
                self.target.unlink()
            elif self.target.exists():
                os.replace(self.target, self._folder / "replaced")
        os.replace(self.content, self.target)
        self.discard()

    def discard(self) -> None:
        """Remove what has been written."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._lock.release()


def finish_replacement(target: Path) -> None:
    """Put in its place what a save was killed over while doing so; nothing to do but then."""
    folder = _partial(target)
    # Content is whole before anything is replaced.
    if (folder / "replaced").exists() and not target.exists():
        os.replace(folder / "content", target)


def _partial(target: Path) -> Path:
    return target.parent / f"{_PREFIX}{target.name}{_SUFFIX}"


def _remove_leftover(folder: Path) -> None:
    if not folder.is_dir():
        return
    lock = FileLock(folder / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return
    finish_replacement(folder.parent / folder.name.removeprefix(_PREFIX).removesuffix(_SUFFIX))
    shutil.rmtree(folder)
    lock.release()


def save_file(content: Any, path: Path) -> None:
    """``torch.save``, and wait until the disk has it."""
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())


def load_file(path: Path, *, weights_only: bool | None = None) -> Any:
    """Load what ``torch.save`` wrote; tensors are mapped from the file, on the CPU.

    Args:
        path: The file.
        weights_only: Load tensors and plain data alone; None is torch's default, which is that.

    Raises:
        ValueError: If it holds other objects, or is no such file, or a part of one.
    """
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=weights_only)
    except (pickle.UnpicklingError, RuntimeError, EOFError, AttributeError, ModuleNotFoundError) as error:
        try:
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
        except Exception:
            unsafe = []
        if unsafe and isinstance(error, pickle.UnpicklingError):
            raise ValueError(
                f"{path} holds objects that are not tensors or plain data: {', '.join(sorted(unsafe))}. Loading them "
                "can run code. If you trust where the checkpoint comes from, pass weights_only=False to the Trainer's "
                "fit, validate, test or predict, or allow these classes with torch.serialization.add_safe_globals; "
                "to store none, keep such objects out of hyper-parameters, callbacks' states and on_save_checkpoint"
            ) from error
        raise ValueError(
            f"{path} cannot be read as a checkpoint: {_first_line(error)}. Is it another kind of file, or was it cut "
            "off while it was copied?"
        ) from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
