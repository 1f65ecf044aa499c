# SPDX-License-Identifier: Apache-2.0
"""Multitask prompted pretraining and zero-shot evaluation on PyTorch Lightning.

Import from the subpackages: :mod:`lightning_zeroprompt.data`, :mod:`lightning_zeroprompt.models`,
:mod:`lightning_zeroprompt.metrics`, :mod:`lightning_zeroprompt.callbacks`. Importing this module loads none of them;
it makes the name ``"zeropp"`` known to Lightning: ``Trainer(strategy="zeropp")``.
"""

from lightning_zeroprompt.registration import register_when_imported

__version__ = "0.1.0"

register_when_imported()
