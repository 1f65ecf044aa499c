# SPDX-License-Identifier: Apache-2.0
"""Lightning strategies. Importing this package registers ``Trainer(strategy="zeropp")``."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_zeroprompt.strategies.checkpoint import consolidate_checkpoint
from lightning_zeroprompt.strategies.zeropp import ZeroPPStrategy

__all__ = ["ZeroPPStrategy", "consolidate_checkpoint"]

ZeroPPStrategy.register_strategies(StrategyRegistry)
