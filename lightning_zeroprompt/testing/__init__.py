# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of distributed code, for this package's tests and its users'."""

from lightning_zeroprompt.testing.distributed import run_distributed
from lightning_zeroprompt.testing.pool import RankPool

__all__ = ["RankPool", "run_distributed"]
