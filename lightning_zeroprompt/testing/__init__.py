# SPDX-License-Identifier: Apache-2.0
"""Helpers for tests of distributed code, for this package's tests and its users'."""

from lightning_zeroprompt.testing.distributed import run_distributed

__all__ = ["run_distributed"]
