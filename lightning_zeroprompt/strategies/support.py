# SPDX-License-Identifier: Apache-2.0
"""Small things that the strategy needs: seeds, precision, options, results of micro-batches."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from lightning_zeroprompt.pipeline.chain import Chain

__all__ = [
    "compile_options",
    "fsdp_precision",
    "hidden_example",
    "hydra_config",
    "join_results",
    "micro_seed",
    "random_state",
    "set_seed",
    "warn_of_batch_norm",
]


def micro_seed(*parts: int) -> int:
    """Mix whole numbers into a seed below 2**63.

    >>> micro_seed(1, 2) == micro_seed(1, 2), micro_seed(1, 2) == micro_seed(2, 1)
    (True, False)
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def set_seed(seed: int, device: torch.device) -> None:
    """Seed the random numbers of the host and of one device.

    ``torch.manual_seed`` seeds all kinds of devices, and formats the stack for those that are not there: milliseconds,
    several times a micro-batch.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(seed)


@contextmanager
def random_state(device: torch.device) -> Iterator[None]:
    """Leave the random numbers of the surrounding code as they were."""
    host = torch.get_rng_state()
    state = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    finally:
        torch.set_rng_state(host)
        if state is not None:
            torch.cuda.set_rng_state(state, device)


@contextmanager
def hidden_example(module: pl.LightningModule) -> Iterator[None]:
    """Keep summaries and loggers from running a model of which a rank holds a part."""
    example = module.example_input_array
    if example is not None:
        rank_zero_warn("zeropp: no rank can run example_input_array through the whole model; summaries show no sizes")
    module.example_input_array = None
    try:
        yield
    finally:
        module.example_input_array = example


def fsdp_precision(plugin: Precision) -> MixedPrecisionPolicy | None:
    """Types of gathered weights and of gradient reductions for a Trainer's precision.

    Returns:
        None where weights are used and reduced in the type they are kept in.

    Raises:
        ValueError: For precisions that need a loss scaler or change layers.

    >>> fsdp_precision(Precision()) is None
    True
    """
    if isinstance(plugin, MixedPrecision):
        if plugin.precision != "bf16-mixed":
            raise ValueError(
                f"precision={plugin.precision!r} scales the loss, and a step with an overflow would have to be undone "
                "on all stages; use 'bf16-mixed' or 'bf16-true'"
            )
        return MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    if isinstance(plugin, HalfPrecision):
        if plugin.precision != "bf16-true":
            raise ValueError(f"precision={plugin.precision!r} overflows without a loss scaler; use 'bf16-true'")
        return None
    if type(plugin) in (Precision, DoublePrecision):
        return None
    raise ValueError(
        f"precision plugin {type(plugin).__name__} is not supported by zeropp; use 32-true, 64-true, bf16-true or "
        "bf16-mixed"
    )


def compile_options(given: bool | Mapping[str, Any]) -> dict[str, Any] | None:
    """Options of ``torch.compile`` for stages; None where they are not to be compiled.

    Raises:
        ValueError: If it is neither, or asks for CUDA graphs, whose memory is written again before weight gradients are
            made.

    >>> compile_options(True), compile_options({"dynamic": False}), compile_options(False)
    ({}, {'dynamic': False}, None)
    """
    if not isinstance(given, bool | Mapping):
        raise ValueError(f"compile_stages={given!r}: use True, False or a mapping of torch.compile's options")
    if isinstance(given, bool):
        return {} if given else None
    graphs = dict(given.get("options") or {}).get("triton.cudagraphs")
    if graphs or given.get("mode") in ("reduce-overhead", "max-autotune"):
        raise ValueError(
            f"compile_stages={dict(given)}: this uses CUDA graphs, whose memory is written again before weight "
            "gradients are made from it. Use mode='max-autotune-no-cudagraphs', or no mode"
        )
    return dict(given)


def warn_of_batch_norm(chain: Chain, micro_batches: int | str) -> None:
    """Say on rank 0 what BatchNorm does with micro-batches, where there is any.

    Args:
        chain: The model's blocks.
        micro_batches: M, or ``"auto"``.
    """
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
    names = [name for name, part in chain.root.named_modules() if isinstance(part, kinds)]
    if names and micro_batches != 1:
        rank_zero_warn(
            f"{', '.join(names)}: BatchNorm takes its statistics from a micro-batch, not from the whole batch; "
            "use GroupNorm or LayerNorm, or num_microbatches=1"
        )


def hydra_config() -> dict[str, Any] | None:
    """The composed configuration of a Hydra job that this process runs, without importing Hydra.

    Files, defaults and overrides are in it. Interpolations stay text: what they refer to is there too, and the rest
    (the time, the environment, Hydra's own node with the job's folder and name) may differ between ranks.

    Returns:
        Plain containers; None where no job runs.
    """
    module = sys.modules.get("hydra.core.hydra_config")
    if module is None or not module.HydraConfig.initialized():
        return None
    conf = sys.modules["omegaconf"].OmegaConf
    # The node that Hydra keeps is part of the whole.
    config: dict[str, Any] = conf.to_container(conf.select(module.HydraConfig.get(), ".."))
    return {key: value for key, value in config.items() if key != "hydra"}


def join_results(results: Sequence[Mapping[str, Any]], sizes: Sequence[int]) -> dict[str, Any]:
    """What ``training_step`` returned for the micro-batches, as for the whole batch.

    Tensors with a row for each row of the micro-batch are joined, numbers averaged by rows; of the rest the last is
    kept.

    >>> join_results([{"y": torch.zeros(2)}, {"y": torch.ones(1)}], [2, 1])
    {'y': tensor([0., 0., 1.])}
    """
    joined: dict[str, Any] = {}
    for key, last in results[-1].items():
        values = [result[key] for result in results]
        if not isinstance(last, Tensor):
            joined[key] = last
        elif last.dim() == 0:
            weights = torch.tensor(sizes, dtype=torch.float64, device=last.device)
            joined[key] = ((torch.stack(values).double() * weights).sum() / weights.sum()).to(last.dtype)
        elif all(value.dim() and value.shape[0] == size for value, size in zip(values, sizes, strict=True)):
            joined[key] = torch.cat(values)
        else:
            joined[key] = last
    return joined
