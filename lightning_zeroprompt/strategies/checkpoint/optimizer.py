# SPDX-License-Identifier: Apache-2.0
"""Optimizer state by name and by number.

torch numbers an optimizer's parameters over its groups. A rank's optimizer holds its own parameters alone, so its
numbers mean nothing elsewhere: between ranks and in folders state is keyed by name, in files by the numbers that the
whole model's optimizer would have.

``{"state": {name or number: {key: value}}, "param_groups": [{"params": [name or number], ...}]}``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from lightning_zeroprompt.strategies.checkpoint.state import all_named, keep_part
from lightning_zeroprompt.strategies.optimizers import OwnedOptimizers

__all__ = ["load_named_state", "named_state", "names_to_numbers", "numbers_to_names"]

_KERNELS = ("foreach", "fused")


def named_state(optimizer: Optimizer, owned: OwnedOptimizers) -> dict[str, Any]:
    """This rank's state by name, with the groups of the whole model.

    Raises:
        ValueError: If the state of a sharded parameter is neither sharded like it nor one number.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    stored = optimizer.state_dict()
    state: dict[str, dict[str, Any]] = {}
    for number, values in stored["state"].items():
        parameter = parameters[number]
        name = owned.names[id(parameter)]
        for key, value in values.items():
            plain = isinstance(value, Tensor) and not isinstance(value, DTensor) and value.numel() > 1
            if plain and isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1:
                raise ValueError(
                    f"{type(optimizer).__name__} keeps {key!r} of the sharded parameter {name} as a plain tensor of "
                    f"shape {tuple(value.shape)}: it cannot be told whose part that is. Save with "
                    "save_weights_only=True, or use data_parallel_size=1 or another optimizer"
                )
        if values:
            state[name] = dict(values)
    groups = [
        {**group, **kernels, "params": list(names)}
        for group, kernels, names in zip(stored["param_groups"], owned.kernels, owned.groups, strict=True)
    ]
    return {"state": state, "param_groups": groups}


def names_to_numbers(named: Mapping[str, Any]) -> dict[str, Any]:
    """The form of torch, for the optimizer of a whole model."""
    numbers: dict[str, int] = {}
    groups = []
    for group in named["param_groups"]:
        for name in group["params"]:
            numbers[name] = len(numbers)
        groups.append({**group, "params": [numbers[name] for name in group["params"]]})
    state = sorted((numbers[name], values) for name, values in named["state"].items())
    return {"state": dict(state), "param_groups": groups}


def numbers_to_names(numbered: Mapping[str, Any], groups: Sequence[Sequence[str]]) -> dict[str, Any]:
    """The state of a whole model's optimizer by name.

    Args:
        numbered: torch's form, or already by name.
        groups: For each group the names of its parameters, as ``configure_optimizers`` made them.

    Raises:
        ValueError: If the groups are others.
    """
    stored = numbered["param_groups"]
    sizes, expected = [len(group["params"]) for group in stored], [len(names) for names in groups]
    if sizes != expected:
        raise ValueError(
            f"the checkpoint's optimizer has parameter groups of {sizes} parameters, configure_optimizers makes "
            f"groups of {expected}: make the same groups, or load the weights alone (load_from_checkpoint) and fit "
            "without ckpt_path"
        )
    names: dict[Any, str] = {}
    for group, known in zip(stored, groups, strict=True):
        if group["params"] and isinstance(group["params"][0], str):
            if set(group["params"]) != set(known):
                differing = sorted(set(group["params"]) ^ set(known))
                raise ValueError(
                    "the checkpoint's optimizer has other parameters in its groups than configure_optimizers makes: "
                    + all_named({"in one of the two alone": differing})
                    + ". Make the same groups, or load the weights alone (load_from_checkpoint) and fit without "
                    "ckpt_path"
                )
            names.update((name, name) for name in known)
        else:
            names.update(zip(group["params"], known, strict=True))
    return {"state": {names[key]: values for key, values in numbered["state"].items()}, "param_groups": stored}


def load_named_state(optimizer: Optimizer, named: Mapping[str, Any], owned: OwnedOptimizers) -> None:
    """Load this rank's part of a state by name.

    Args:
        optimizer: This rank's.
        named: Tensors of the whole model, or this rank's shards.
        owned: Names of its parameters.

    Raises:
        ValueError: If the state of a sharded parameter is neither of its shape nor one number.
    """
    state: dict[int, dict[str, Any]] = {}
    groups: list[dict[str, Any]] = []
    count = 0
    for group, stored in zip(optimizer.param_groups, named["param_groups"], strict=True):
        first = count
        for parameter in group["params"]:
            values = named["state"].get(owned.names[id(parameter)])
            if values is not None:
                state[count] = {key: _part(key, value, parameter, owned) for key, value in values.items()}
            count += 1
        # Which kernels run is this run's choice, and for groups that are sharded in part no choice.
        kernels = {key: group[key] for key in _KERNELS if key in group}
        groups.append({**stored, **kernels, "params": list(range(first, count))})
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _part(key: str, value: Any, parameter: Tensor, owned: OwnedOptimizers) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, DTensor):
        return value
    if value.shape == parameter.shape:
        return keep_part(value, parameter)
    if isinstance(parameter, DTensor) and parameter.device_mesh.size() > 1 and value.numel() > 1:
        raise ValueError(
            f"the optimizer state {key!r} of {owned.names[id(parameter)]} has shape {tuple(value.shape)}, the "
            f"parameter {tuple(parameter.shape)}: it cannot be sharded like it. Resume with data_parallel_size=1"
        )
    return value.clone()
