# SPDX-License-Identifier: Apache-2.0
"""Where the costs of ``zeroprompt-plan`` come from: a file, a GPT of a known size, or a user's LightningModule.

The last two are never allocated: they are built on the meta device, where operations are counted and divided by what
the GPU reaches.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_zeroprompt.pipeline.costs import Costs, Link
from lightning_zeroprompt.pipeline.find_chain import find_chain
from lightning_zeroprompt.pipeline.invented import GPT_SHAPES, GptShape, gpt_costs
from lightning_zeroprompt.pipeline.meters import FlopMeter
from lightning_zeroprompt.pipeline.profiler import profile_chain

__all__ = ["costs_of", "parse_bandwidth", "parse_batch", "parse_bytes", "parse_operations", "parse_seconds"]

_LARGE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SMALL = {"": 1.0, "m": 1e-3, "u": 1e-6, "n": 1e-9}
_HOST = 8
"""GPUs that one host has, between which messages go by copy engines."""


def _quantity(text: str, units: Mapping[str, float], prefixes: Mapping[str, float], example: str) -> float:
    match = re.fullmatch(r"\s*(\d+\.?\d*(?:[eE][+-]?\d+)?)\s*([A-Za-z/]*)\s*", text)
    for unit, factor in units.items() if match else ():
        number, written = match.groups() if match else ("", "")
        prefix = written.removesuffix(unit)
        if written.endswith(unit) and prefix in prefixes:
            return float(number) * prefixes[prefix] * factor
    raise argparse.ArgumentTypeError(f"{text!r} is no such quantity; write it like {example}")


def parse_bytes(text: str) -> int:
    """Bytes with their unit.

    >>> parse_bytes("80GiB") == 80 * 2**30, parse_bytes("1.5 GB")
    (True, 1500000000)
    """
    return round(_quantity(text, {"B": 1.0}, _LARGE | _BINARY, "80GiB or 80GB"))


def parse_bandwidth(text: str) -> float:
    """Bytes a second, written in bytes or (small b) bits.

    >>> parse_bandwidth("25GB/s"), parse_bandwidth("200Gb/s")
    (25000000000.0, 25000000000.0)
    """
    units = {"B/s": 1.0, "b/s": 0.125, "bit/s": 0.125}
    return _quantity(text, units, _LARGE | _BINARY, "25GB/s or 200Gb/s")


def parse_operations(text: str) -> float:
    """Operations a second, in their unit or as a bare number.

    >>> parse_operations("500TFLOPS"), parse_operations("5e14")
    (500000000000000.0, 500000000000000.0)
    """
    return _quantity(text, {"FLOPS": 1.0, "FLOP/s": 1.0, "": 1.0}, _LARGE, "500TFLOPS or 5e14")


def parse_seconds(text: str) -> float:
    """Seconds with their unit.

    >>> parse_seconds("0.5ms")
    0.0005
    """
    return _quantity(text, {"s": 1.0}, _SMALL, "20us")


_TENSOR = re.compile(r"(?:(\w+)=)?(\w+)\[([\d,\s]*)\]")


def parse_batch(text: str) -> Any:
    """A micro-batch on the meta device, from types and shapes: a dictionary, a tuple, or one tensor.

    >>> parse_batch("ids=int64[2,8] mask=bool[2,8]")["ids"].shape
    torch.Size([2, 8])
    >>> len(parse_batch("float32[4,16] float32[4,1]"))
    2

    Raises:
        ValueError: If it is not written so.
    """
    example = 'write it like "input_ids=int64[8,512] labels=int64[8,512]" or "float32[8,16] float32[8,1]"'
    parts = _TENSOR.findall(text)
    if not parts or _TENSOR.sub("", text).strip():
        raise ValueError(f"--batch {text!r} is no list of tensors; {example}")
    tensors = []
    for _, name, sizes in parts:
        dtype = getattr(torch, name, None)
        if not isinstance(dtype, torch.dtype):
            raise ValueError(f"--batch {text!r}: {name!r} is no type of torch; {example}")
        shape = [int(size) for size in sizes.split(",") if size.strip()]
        tensors.append(torch.empty(shape, dtype=dtype, device="meta"))
    names = [name for name, _, _ in parts]
    if all(names):
        if len(set(names)) < len(names):
            raise ValueError(f"--batch {text!r} names a tensor twice")
        return dict(zip(names, tensors, strict=True))
    if any(names):
        raise ValueError(f"--batch {text!r}: either all tensors have names or none has; {example}")
    return tensors[0] if len(tensors) == 1 else tuple(tensors)


def _module(path: str, arguments: str | None) -> nn.Module:
    """A user's module on the meta device."""
    name, found, kind = path.partition(":")
    if not found or not kind:
        raise ValueError(f"--module {path!r}: write it like package.module:Class")
    try:
        given = json.loads(arguments) if arguments else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"--arguments {arguments!r} is no JSON ({error}); write it like '{{\"layers\": 4}}'") from None
    if not isinstance(given, dict):
        raise ValueError(f"--arguments {arguments!r} is no JSON object; write it like '{{\"layers\": 4}}'")
    # Console scripts do not look where they are called, ``python -m`` does.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(importlib.import_module(name), kind)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--module {path!r} cannot be imported: {error}") from None
    try:
        with torch.device("meta"):
            module = made(**given)
            if hasattr(module, "configure_model"):
                module.configure_model()
    except Exception as error:
        raise ValueError(
            f"--module {path!r} cannot be built on the meta device with {given}: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(module, nn.Module) or not hasattr(module, "training_step"):
        raise ValueError(f"--module {path!r} is a {type(module).__name__} without training_step, no LightningModule")
    module.to("meta")
    return module


def _attach_trainer(module: Any) -> None:
    """Give a module the Trainer that its step may ask for steps and epochs, and nowhere to log to."""
    from lightning.pytorch import LightningModule, Trainer

    if not isinstance(module, LightningModule):
        return
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    quiet: dict[str, Any] = dict.fromkeys(
        ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False
    )
    module.trainer = Trainer(accelerator="cpu", devices=1, **quiet)
    for name in ("log", "log_dict"):
        setattr(module, name, lambda *args, **kwargs: None)


def _module_costs(args: argparse.Namespace, meter: FlopMeter, message: Link, gather: Link | None) -> Costs:
    if not args.batch:
        raise ValueError('--module needs --batch, one micro-batch, such as "input_ids=int64[8,512]"')
    batch = parse_batch(args.batch)
    module = _module(args.module, args.arguments)
    if args.dtype is not None:
        module.to(getattr(torch, args.dtype))
    chain = find_chain(module, max(2, args.ranks or 0))
    training_step: Any = module.training_step
    _attach_trainer(module)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return profile_chain(chain, lambda: training_step(batch, 0), meter, message=message, gather=gather)
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(
            f"training_step of {args.module} cannot be followed on the meta device, where tensors have shapes and no "
            f"values: {type(error).__name__}: {error}. Correct --batch, or measure with "
            "lightning_zeroprompt.pipeline.profiler.profile_chain on a device and give the file as --costs"
        ) from error


def _shape(args: argparse.Namespace) -> GptShape:
    if args.model is None:
        return GptShape(args.layers, args.width, 1)
    if args.model not in GPT_SHAPES:
        raise ValueError(f"--model {args.model!r} is unknown; there are {', '.join(GPT_SHAPES)}")
    shape = GPT_SHAPES[args.model]
    if args.width is not None:
        # How many heads share a width changes no count.
        shape = replace(shape, width=args.width, heads=1)
    return shape if args.layers is None else replace(shape, layers=args.layers)


def costs_of(args: argparse.Namespace, gpus: int) -> Costs:
    """Costs as the arguments say.

    Args:
        args: Of the command line.
        gpus: The most that are planned for.

    Raises:
        ValueError: If the arguments contradict one another or the model cannot be followed, with the remedy.
    """
    sources = [name for name in ("costs", "model", "module") if getattr(args, name) is not None]
    if not sources and args.layers is not None and args.width is not None:
        sources = ["layers"]
    if len(sources) != 1:
        given = " and ".join(f"--{name}" for name in sources) or "none"
        raise ValueError(
            f"{given} given: costs come from one of --costs FILE, --model SIZE (or --layers and --width), "
            "--module package.module:Class"
        )
    bandwidth, latency = args.interconnect or 25e9, args.latency
    message = Link(2e-5 if latency is None else latency, bandwidth)
    gather = None if args.collectives is None else replace(message, bandwidth=args.collectives)
    if args.costs is not None:
        costs = Costs.load(args.costs)
        for name in ("message", "gather", "reduce"):
            link: Link = getattr(costs, name)
            wanted = args.interconnect if name == "message" else args.collectives or args.interconnect
            link = replace(link, bandwidth=link.bandwidth if wanted is None else wanted)
            link = replace(link, latency=link.latency if latency is None else latency)
            costs = replace(costs, **{name: link})  # type: ignore[arg-type]
    else:
        meter = FlopMeter(args.flops, args.memory_bandwidth)
        if args.module is not None:
            costs = _module_costs(args, meter, message, gather)
        else:
            costs = gpt_costs(
                _shape(args),
                meter,
                message=message,
                gather=gather,
                rows=args.rows,
                sequence=args.sequence,
                vocabulary=args.vocabulary,
                dtype=getattr(torch, args.dtype or "bfloat16"),
            )
        costs = replace(costs, transport="copy_engine" if gpus <= _HOST else "nccl")
    return costs if args.transport is None else replace(costs, transport=args.transport)
