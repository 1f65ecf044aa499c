# SPDX-License-Identifier: Apache-2.0
"""Result files: JSON without NaN, and files written so that a kill leaves old ones or new ones, never halves."""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["json_bytes", "write_files"]


def json_bytes(data: Any) -> bytes:
    r"""Plain data as JSON for people: UTF-8, indented; a number that is not finite becomes null.

    Example:
        >>> json_bytes([float("nan")]).decode()
        '[\n null\n]\n'
    """
    return (json.dumps(_finite(data), indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def write_files(folder: str | Path, content: Mapping[str, bytes]) -> dict[str, Path]:
    """Write files under temporary names and rename them.

    Args:
        folder: Made if it is missing.
        content: By file name.

    Returns:
        The paths by file name.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name, data in content.items():
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        temporary.write_bytes(data)
        temporary.replace(folder / name)
    return {name: folder / name for name in content}
