# SPDX-License-Identifier: Apache-2.0
"""A checkpoint folder as one file, without ranks."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from lightning_zeroprompt.strategies.checkpoint.files import Replacement, save_file
from lightning_zeroprompt.strategies.checkpoint.folder import Folder
from lightning_zeroprompt.strategies.checkpoint.single import assemble

__all__ = ["consolidate_checkpoint"]


def consolidate_checkpoint(
    folder: str | os.PathLike[str], file: str | os.PathLike[str], *, weights_only: bool = True
) -> None:
    """Make one Lightning checkpoint file of a folder that ``strategy="zeropp"`` saved.

    Any strategy resumes from the file, optimizer state included. The whole state has to fit into the host's memory.

    Args:
        folder: The checkpoint folder.
        file: Where to write; replaced when the new one is whole.
        weights_only: Refuse Python objects that were stored in the checkpoint; pass False only for a folder from where
            you trust.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is no checkpoint folder or incomplete, or ``file`` is a folder.
    """
    source, target = Path(folder), Path(file)
    if not source.exists():
        raise FileNotFoundError(f"there is no checkpoint folder {source}")
    if target.is_dir():
        raise ValueError(f"{target} is a folder; name the file to write")
    opened = Folder(source, weights_only=weights_only)
    tensors = {path: torch.empty(entry.size, dtype=entry.properties.dtype) for path, entry in opened.entries.items()}
    opened.read(tensors, alone=True)
    checkpoint = assemble(opened.rest, {**tensors, **opened.values}, opened.param_groups, opened.aliases)
    replacement = Replacement(target)
    try:
        save_file(checkpoint, replacement.content)
        replacement.commit()
    except BaseException:
        replacement.discard()
        raise
