# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of a model of which each rank owns a part.

Everything is stored under the names of the whole model, so that a checkpoint knows nothing of stages or shards and a
run continues on any layout, and without zeropp. Two forms:

* a *folder*, written by all ranks through ``torch.distributed.checkpoint``, with what is not a tensor of the model or
  the optimizer in ``meta.pt``;
* a *file*, a plain Lightning checkpoint: rank 0 is sent one tensor after the other and holds all of them in its host's
  memory while it writes. ``strategy="auto"`` resumes from it, ``load_from_checkpoint`` reads it.

``consolidate_checkpoint`` makes a file of a folder without any ranks.

In memory, on every rank, a checkpoint has the module's own ``state_dict``, with other ranks' parameters on the meta
device: hooks that drop or rename entries see all names. Optimizer state is keyed by parameter names. Of every entry one
pipeline rank is the *writer*; copies of tied parameters are written once and read by all that hold them.

Rooms: ``files`` (temporary places, reading without pickles), ``state`` (parts and wholes), ``optimizer`` (names and
numbers), ``folder`` and ``single`` (the two forms), ``trainer`` (what the strategy
calls), ``consolidate``.
"""

from lightning_zeroprompt.strategies.checkpoint.consolidate import consolidate_checkpoint

__all__ = ["consolidate_checkpoint"]
