# SPDX-License-Identifier: Apache-2.0
"""Lightning strategies. ``lightning_zeroprompt`` itself registers ``Trainer(strategy="zeropp")``."""

from lightning_zeroprompt.strategies.checkpoint import consolidate_checkpoint
from lightning_zeroprompt.strategies.zeropp import ZeroPPStrategy

__all__ = ["ZeroPPStrategy", "consolidate_checkpoint"]
