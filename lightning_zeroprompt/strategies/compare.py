# SPDX-License-Identifier: Apache-2.0
"""Ranks with different code or settings would wait for each other for ever: they are compared before the first step."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch.distributed as dist

__all__ = ["compare_ranks"]


def compare_ranks(described: Mapping[str, Any]) -> None:
    """Exchange hashes of what has to be equal on all ranks.

    Args:
        described: By name, what to compare; anything that is no JSON is taken by its text.

    Raises:
        RuntimeError: On every rank, if one differs, naming what.
    """
    digests = {
        key: hashlib.sha256(json.dumps(value, default=str).encode()).hexdigest()[:12]
        for key, value in described.items()
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, digests)
    for rank, theirs in enumerate(everyone):
        differing = [key for key in digests if theirs[key] != everyone[0][key]]
        if differing:
            raise RuntimeError(
                f"rank {rank} differs from rank 0 in {', '.join(differing)}: "
                + "; ".join(f"{key} {theirs[key]} against {everyone[0][key]}" for key in differing)
                + ". All ranks have to run the same code with the same settings; in a sweep, start every job's ranks "
                "from one resolved configuration"
            )
