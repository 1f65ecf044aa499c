# SPDX-License-Identifier: Apache-2.0
"""The folder in which a compilation happens: its lock, its unfinished parts, what errors leave of it, and its bar."""

import contextlib
import errno
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lightning_zeroprompt.data.corpus import CorpusError

__all__ = ["clear_errors", "held", "open_partial", "progress_bar", "write_json"]

_log = logging.getLogger(__name__)
_MARKER = "compiling.json"
_TEMPORARY_MARKER = "compiling.tmp"


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the lock on compiling into ``folder``, waiting for another process that has it.

    Raises:
        CorpusError: The folder's parent cannot be made.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CorpusError(f"could not make {folder.parent}: {error}; check the path and its rights") from error
    # The system frees this lock when its process dies, so a kill leaves nothing that would block the next run.
    lock = FileLock(folder.parent / f".{folder.name}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        _log.warning("another process compiles into %s; waiting for it", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def write_json(content: Any, path: Path) -> None:
    """Write JSON under a temporary name and rename it."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")
    os.replace(temporary, path)


def open_partial(partial: Path, key: Mapping[str, Any]) -> None:
    """Make the folder of unfinished parts, or take up one that was left with the same ``key``; drop one with another.

    Raises:
        CorpusError: Something else is in the way.
        OSError: The folder cannot be written.
    """
    if partial.exists():
        try:
            found = json.loads((partial / _MARKER).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            # A kill right after the folder was made leaves nothing, or the marker's temporary file.
            if not partial.is_dir() or {path.name for path in partial.iterdir()} - {_TEMPORARY_MARKER}:
                raise CorpusError(
                    f"{partial} is in the way and was not left by a compilation; delete it or use another folder"
                ) from None
            found = None
        if found == key:
            _log.info("taking up the compilation that was cut off in %s", partial)
        elif found is not None:
            _log.warning("%s was left by another compilation or an unknown source; its parts are discarded", partial)
            shutil.rmtree(partial)
    try:
        partial.mkdir(exist_ok=True)
        write_json(key, partial / _MARKER)
        (partial / "parts").mkdir(exist_ok=True)
    except OSError:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def clear_errors(folder: Path, partial: Path) -> Iterator[None]:
    """Turn disk errors into one clear error and leave nothing half-written after any error.

    Raises:
        CorpusError: The disk is full, or the folder cannot be written.
    """
    try:
        yield
    except OSError as error:
        used = sum(file.stat().st_size for file in partial.rglob("*") if file.is_file()) if partial.is_dir() else 0
        shutil.rmtree(partial, ignore_errors=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CorpusError(
                f"the disk filled while compiling into {folder}: {used / 2**20:.1f} MiB were written and are removed; "
                "a corpus needs about twice its size meanwhile: free space, lower the caps, or use another disk"
            ) from error
        raise CorpusError(f"could not write {folder}: {error}; check the folder's rights and the disk") from error
    except Exception:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextlib.contextmanager
def progress_bar(show: bool, total: int) -> Iterator[Callable[[str], None]]:
    """A bar of ``total`` steps; what is yielded takes the name of a finished step."""
    if not show:
        yield lambda _: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("compile"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, transient=True) as bar:
        ticket = bar.add_task("", total=total)
        yield lambda name: bar.update(ticket, advance=1, description=name[-48:].replace("[", "("))
