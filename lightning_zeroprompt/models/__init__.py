# SPDX-License-Identifier: Apache-2.0
"""Models: T5 as a list of blocks, soft prompts, checkpoints in and out, and the LightningModule that trains them.

The public names are loaded when they are first used, so that a data job or a plain T5 does not import Lightning.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_zeroprompt.models.hf import load_t5, save_t5
    from lightning_zeroprompt.models.module import SoftPromptSettings, Text2TextModule
    from lightning_zeroprompt.models.optim import OptimizerSettings
    from lightning_zeroprompt.models.t5 import T5, T5Config

__all__ = ["T5", "OptimizerSettings", "SoftPromptSettings", "T5Config", "Text2TextModule", "load_t5", "save_t5"]

_HOMES = {
    "OptimizerSettings": "optim",
    "SoftPromptSettings": "module",
    "T5": "t5",
    "T5Config": "t5",
    "Text2TextModule": "module",
    "load_t5": "hf",
    "save_t5": "hf",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has: {', '.join(__all__)}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
