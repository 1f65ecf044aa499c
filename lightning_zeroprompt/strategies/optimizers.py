# SPDX-License-Identifier: Apache-2.0
"""One optimizer over a model of which each rank owns a part.

``configure_optimizers`` is the user's and sees the whole model, on every rank. What a rank does not own is shown to it
as one number, expanded to the right shape, so that grouping by name or by shape works, and is taken out of the groups
afterwards. The names of the whole groups are kept: a checkpoint in one file numbers parameters by them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_zeroprompt.pipeline.pipeline import Pipeline

__all__ = ["OwnedOptimizers"]


class OwnedOptimizers:
    """Keeps an optimizer to this rank's parameters.

    Args:
        pipeline: This rank's part of the model.

    Attributes:
        groups: Once ``keep_owned`` has run: for each parameter group the names of all its parameters in the whole
            model.
        names: Likewise, names of this rank's parameters by their ids.
        kernels: Likewise, the user's choice of kernels for each group.
    """

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self._placeholders: dict[int, str] = {}
        self._alive: list[nn.Parameter] = []
        self.groups: list[list[str]] = []
        self.names: dict[int, str] = {}
        self.kernels: list[dict[str, Any]] = []

    @contextmanager
    def placeholders(self) -> Iterator[None]:
        """Show tensors without memory in place of other ranks' parameters, which are on the meta device."""
        swapped: list[tuple[nn.Module, str, nn.Parameter]] = []
        made: dict[int, nn.Parameter] = {}
        names = {id(parameter): name for name, parameter in self._pipeline.chain.root.named_parameters()}
        for module in self._pipeline.chain.root.modules():
            for name, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta:
                    continue
                if id(parameter) not in made:
                    # Not on the meta device, which fused optimizers refuse.
                    number = torch.zeros((), dtype=parameter.dtype, device=self._pipeline.device)
                    made[id(parameter)] = nn.Parameter(number.expand(parameter.shape), parameter.requires_grad)
                    self._placeholders[id(made[id(parameter)])] = names[id(parameter)]
                swapped.append((module, name, parameter))
                module._parameters[name] = made[id(parameter)]
        # Ids stand for the placeholders until the groups have been read.
        self._alive = list(made.values())
        try:
            yield
        finally:
            for module, name, parameter in swapped:
                module._parameters[name] = parameter

    def keep_owned(self, optimizer: Optimizer) -> None:
        """Take other ranks' parameters out of an optimizer's groups.

        Raises:
            ValueError: If it holds a parameter that is none of the module's, or needs to see more than a rank has.
        """
        if isinstance(optimizer, torch.optim.LBFGS):
            raise ValueError(
                "LBFGS needs the gradients of all stages at once; use an optimizer that works by parameter"
            )
        names = {id(parameter): name for name, parameter in self._pipeline.chain.root.named_parameters()}
        self.groups, self.names, self.kernels = [], names, []
        for group in optimizer.param_groups:
            known = []
            for parameter in group["params"]:
                name = names.get(id(parameter)) or self._placeholders.get(id(parameter))
                if name is None:
                    raise ValueError(
                        f"the optimizer holds a parameter of shape {tuple(parameter.shape)} that is not one of the "
                        "module's: register it as a parameter of the LightningModule"
                    )
                known.append(name)
            self.groups.append(known)
            self.kernels.append({key: group[key] for key in ("foreach", "fused") if key in group})
            for parameter in group["params"]:
                if id(parameter) in self._placeholders:
                    optimizer.state.pop(parameter, None)
            group["params"] = [p for p in group["params"] if id(p) not in self._placeholders]
            if isinstance(optimizer, torch.optim.Adafactor) and any(isinstance(p, DTensor) for p in group["params"]):
                raise ValueError(
                    "torch.optim.Adafactor cannot work on sharded parameters, which data_parallel_size > 1, bf16-mixed "
                    "and cpu_offload make of a stage's: use another optimizer, or data_parallel_size=1 with 32-true or "
                    "bf16-true"
                )
            if len({isinstance(parameter, DTensor) for parameter in group["params"]}) > 1:
                # Kernels over many tensors at once take sharded or whole ones, not both.
                group.update({key: False for key in ("foreach", "fused") if key in group})
        self._alive = []
