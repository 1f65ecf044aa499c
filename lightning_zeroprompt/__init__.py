# SPDX-License-Identifier: Apache-2.0
"""Multitask prompted pretraining and zero-shot evaluation on PyTorch Lightning.

The halves live in subpackages and are imported from there: :mod:`lightning_zeroprompt.data`, :mod:`lightning_zeroprompt.models`,
:mod:`lightning_zeroprompt.metrics`. Importing this module loads nothing else.
"""

__version__ = "0.1.0"
