# SPDX-License-Identifier: Apache-2.0
"""Averaged weights follow the cut.

``WeightAveraging`` copies the whole module before it is cut and goes through the parameters of both side by side.
"""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn
from torch.optim.swa_utils import AveragedModel

__all__ = ["cut_averages"]


def cut_averages(callbacks: Iterable[Callback], module: nn.Module) -> None:
    """Give the averages of Lightning's callbacks the parts that this rank holds.

    Args:
        callbacks: The Trainer's.
        module: Cut; its parameters are what it was copied with.
    """
    for callback in callbacks:
        if not isinstance(callback, (WeightAveraging, StochasticWeightAveraging)):
            continue
        average = getattr(callback, "_average_model", None)
        if average is None:
            continue
        copied: dict[int, nn.Parameter] = {}
        copy = average.module if isinstance(average, AveragedModel) else average
        for part, own in zip(copy.modules(), module.modules(), strict=True):
            for name, parameter in own._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in copied:
                    copied[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                part._parameters[name] = copied[id(parameter)]
