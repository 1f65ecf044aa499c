# SPDX-License-Identifier: Apache-2.0
"""Lightning's own callbacks that hold parameters, on a rank that holds some."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch.callbacks import BaseFinetuning, Callback, StochasticWeightAveraging, WeightAveraging
from torch import nn

__all__ = ["cut_averages", "refuse_callbacks"]


def refuse_callbacks(callbacks: Iterable[Callback]) -> None:
    """Say which callbacks cannot work, before training.

    Raises:
        ValueError: If there is one.
    """
    for callback in callbacks:
        if isinstance(callback, StochasticWeightAveraging):
            raise ValueError(
                f"{type(callback).__name__} moves a copy of the whole model, of which a rank of a pipeline has a part; "
                "use WeightAveraging, with a scheduler for the learning rate"
            )
        if isinstance(callback, BaseFinetuning):
            raise ValueError(
                f"{type(callback).__name__} compares the values of parameters, of which a rank of a pipeline has some; "
                "give the optimizer all parameters and set requires_grad in on_train_epoch_start"
            )


def cut_averages(callbacks: Iterable[Callback], module: nn.Module) -> None:
    """Give weight averages the parts that this rank holds.

    ``WeightAveraging`` has copied the whole module before it was cut, and goes through the parameters of both side by
    side.

    Args:
        callbacks: The Trainer's.
        module: Cut; its parameters are what it was copied with.
    """
    for callback in callbacks:
        average = callback._average_model if isinstance(callback, WeightAveraging) else None
        if average is None:
            continue
        copied: dict[int, nn.Parameter] = {}
        for part, own in zip(average.module.modules(), module.modules(), strict=True):
            for name, parameter in own._parameters.items():
                if parameter is None:
                    continue
                if id(parameter) not in copied:
                    copied[id(parameter)] = nn.Parameter(parameter.detach().clone(), parameter.requires_grad)
                part._parameters[name] = copied[id(parameter)]
