# SPDX-License-Identifier: Apache-2.0
"""Training step of our T5 against ``transformers``' T5: tokens/s and peak memory, same shapes, same process.

Forward, backward and fused AdamW on bf16 parameters; batch 64 x (512 in, 64 out), no padding, vocabulary 32,128, gated
GELU, tied head, dropout 0; three sizes. The peer runs with each attention it offers; its best one counts. Both compute
the cross-entropy on bf16 logits, as the peer does. Each step is timed alone between two synchronisations; the median
counts.

Variants (``--variants``, each for all sizes, in the order given) are a base and ``+`` options. Bases: ``ours``, and
``hf-eager``, ``hf-sdpa``, ``hf-flex_attention``, the peer with that attention. Options:
``compiled`` (the whole model under ``torch.compile``); for ours also ``blocks`` (layers compiled one by one,
:meth:`T5.compile_blocks`), ``graphs`` (``compiled``, mode ``reduce-overhead``: CUDA graphs), ``packed`` (8 examples a
row, kept apart by masks), ``math``, ``cudnn`` (that SDPA backend) and ``flex`` (compiled blocks with FlexAttention in
place of SDPA).

Example:
    python benchmarks/t5_step.py                       # one CUDA GPU, some five minutes
    python benchmarks/t5_step.py --device cpu --tiny   # smoke run
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import statistics
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lightning_zeroprompt.models import t5
from lightning_zeroprompt.models.attention import SelfAttention, segment_mask
from lightning_zeroprompt.models.hf import state_dict_from_hf
from lightning_zeroprompt.models.t5 import T5, T5Config

BASES = ("ours", "hf-sdpa", "hf-eager", "hf-flex_attention")
OPTIONS = ({"blocks", "compiled", "graphs", "packed", "math", "cudnn", "flex"}, {"compiled"})
DEFAULT = (
    "hf-sdpa,hf-eager,ours,ours+packed,"  # seconds each; those that compile for long come last
    "ours+blocks,ours+packed+blocks,ours+compiled,hf-sdpa+compiled"
)
EXTRA = "ours+graphs,ours+flex,ours+packed+flex,ours+math,ours+cudnn,hf-flex_attention,hf-eager+compiled"


@dataclasses.dataclass(frozen=True)
class Shape:
    """Of one training batch."""

    batch: int
    inputs: int
    targets: int
    vocab: int
    examples_per_row: int = 8

    @property
    def tokens(self) -> int:
        """Tokens of a step, as the ledger counts them: both sides."""
        return self.batch * (self.inputs + self.targets)


def build_peer(config: T5Config, attention: str) -> nn.Module:
    peer = transformers.T5Config(
        vocab_size=config.vocab_size,
        d_model=config.d_model,
        d_kv=config.d_kv,
        d_ff=config.d_ff,
        num_layers=config.num_encoder_layers,
        num_heads=config.num_heads,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        decoder_start_token_id=0,
        attn_implementation=attention,
    )
    model: nn.Module = transformers.T5ForConditionalGeneration(peer)
    used = getattr(model.config, "_attn_implementation", "?")
    if used != attention:
        raise RuntimeError(f"asked transformers for {attention}, got {used}")
    return model


BLOCK_MASKS: dict[int, Any] = {}
"""FlexAttention's block mask of the packed rows of the variant at hand, by row length; empty: plain rows."""


def flex_output(self: SelfAttention, query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Stand in for ``SelfAttention._output``: the bias enters through a score_mod, segments through a block mask."""

    def score_mod(score: Tensor, _b: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return score + bias[0, head, i, j]

    block_mask = BLOCK_MASKS.get(query.shape[2])
    out = flex_attention(query, key, value, score_mod=score_mod, block_mask=block_mask, scale=1.0)
    projected: Tensor = self.o(out.transpose(1, 2).flatten(2))
    return projected


def flex_segment_mask(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    """Stand in for ``segment_mask``: self-attention's segments are in the block mask already."""
    if queries is keys:
        return torch.zeros(1, 1, 1, 1, dtype=dtype, device=keys.device)
    return segment_mask(queries, keys, dtype)


def block_mask_of(segments: Tensor) -> Any:
    def same(b: Tensor, _h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return segments[b, i] == segments[b, j]

    rows, length = segments.shape
    return create_block_mask(same, rows, None, length, length, device=segments.device)


@contextlib.contextmanager
def attention_of(options: set[str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if "math" in options:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if "cudnn" in options:
            stack.enter_context(
                sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION], set_priority=True)
            )
        if "flex" in options:
            stack.enter_context(mock.patch.object(SelfAttention, "_output", flex_output))
            stack.enter_context(mock.patch.object(t5, "segment_mask", flex_segment_mask))
            stack.callback(BLOCK_MASKS.clear)
        yield


def make_step(variant: str, config: T5Config, shape: Shape, device: str, dtype: torch.dtype) -> Callable[[], Tensor]:
    """Return a function that does one training step and returns the loss."""
    name, *rest = variant.split("+")
    options = set(rest)
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randint(2, shape.vocab, (shape.batch, shape.inputs), generator=generator).to(device)
    labels = torch.randint(2, shape.vocab, (shape.batch, shape.targets), generator=generator).to(device)
    torch.manual_seed(0)
    forward: Callable[[], Tensor]
    if name.startswith("hf-"):
        with torch.device(device):
            model = build_peer(config, name.removeprefix("hf-"))
        model.to(dtype).train()
        called: Any = torch.compile(model, dynamic=False) if "compiled" in options else model

        def forward() -> Tensor:
            loss: Tensor = called(input_ids=inputs, labels=labels).loss
            return loss

    else:
        with torch.device("meta"):
            ours = T5(config)
        with torch.device(device):
            weights = build_peer(config, "eager").state_dict()
        ours.load_state_dict(state_dict_from_hf(weights, config), assign=True)
        ours.to(dtype)
        model = ours.train()
        if options & {"blocks", "flex"}:
            ours.compile_blocks()
        mode = "reduce-overhead" if "graphs" in options else None
        called = torch.compile(ours, dynamic=False, mode=mode) if options & {"compiled", "graphs"} else ours
        shifted = F.pad(labels[:, :-1], (1, 0))
        segments: dict[str, Tensor] = {}
        if "packed" in options:
            segments = {
                f"{side}_segments": (torch.arange(length, device=device) * shape.examples_per_row // length + 1)
                .int()
                .expand(shape.batch, length)
                for side, length in (("input", shape.inputs), ("decoder", shape.targets))
            }
            if "flex" in options:
                BLOCK_MASKS.update({rows.shape[1]: block_mask_of(rows) for rows in segments.values()})

        def forward() -> Tensor:
            logits = called(inputs, shifted, **segments)
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = forward()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def measure(variant: str, config: T5Config, shape: Shape, args: argparse.Namespace) -> dict[str, Any]:
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    started = time.perf_counter()
    with attention_of(set(variant.split("+"))):
        step = make_step(variant, config, shape, args.device, dtype)
        first_loss = float(step())
        for _ in range(args.warmup - 1):
            step()
        synchronize(args.device)
        warm = time.perf_counter() - started
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(args.steps):
            synchronize(args.device)
            start = time.perf_counter()
            step()
            synchronize(args.device)
            times.append(time.perf_counter() - start)
        seconds = statistics.median(times)
        result = {
            "variant": variant,
            "ms": round(seconds * 1e3, 2),
            "ms_min": round(min(times) * 1e3, 2),
            "ms_max": round(max(times) * 1e3, 2),
            "tokens_per_s": round(shape.tokens / seconds),
            "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if args.device == "cuda" else None,
            "first_loss": round(first_loss, 4),
            "warmup_s": round(warm, 1),
        }
        if args.profile:
            profile(step, args.device)
    return result


def profile(step: Callable[[], Tensor], device: str) -> None:
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as prof:
        step()
        synchronize(device)
    key = "self_cuda_time_total" if device == "cuda" else "self_cpu_time_total"
    print(prof.key_averages().table(sort_by=key, row_limit=25, max_name_column_width=70), flush=True)


def summarise(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios per size: ours over the peer's best attention, each side eager and each side at its best."""
    ratios: dict[str, Any] = {}
    for size in dict.fromkeys(result["size"] for result in results):
        rows = [result for result in results if result["size"] == size and "tokens_per_s" in result]

        def best(rows: list[dict[str, Any]], prefix: str, compiled: bool) -> dict[str, Any] | None:
            marks = ("+blocks", "+compiled", "+graphs", "+flex")
            chosen = [
                row
                for row in rows
                if row["variant"].startswith(prefix)
                and "packed" not in row["variant"]
                and any(mark in row["variant"] for mark in marks) <= compiled
            ]
            return max(chosen, key=lambda row: row["tokens_per_s"], default=None)

        entry: dict[str, Any] = {}
        peer, peer_best = best(rows, "hf-", False), best(rows, "hf-", True)
        for label, row in (("eager", best(rows, "ours", False)), ("best", best(rows, "ours", True))):
            if row is None or peer is None or peer_best is None:
                continue
            entry[label] = {
                "ours": row["variant"],
                "peer": peer["variant"],
                "speed_ratio": round(row["tokens_per_s"] / peer["tokens_per_s"], 3),
                "speed_ratio_to_compiled_peer": round(row["tokens_per_s"] / peer_best["tokens_per_s"], 3),
                "compiled_peer": peer_best["variant"],
                # Equal weights and batch: the two must be the same function, up to bf16.
                "first_loss_difference": round(row["first_loss"] - peer["first_loss"], 4),
                "memory_ratio": round(row["peak_gib"] / peer["peak_gib"], 3) if peer["peak_gib"] else None,
            }
        ratios[size] = entry
    return ratios


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--tiny", action="store_true", help="a small batch of a small model: does it run")
    parser.add_argument("--sizes", default="mini,small,base", help="comma-separated preset names")
    parser.add_argument("--variants", default=DEFAULT, help=f"also useful: {EXTRA}")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--budget-s", type=float, default=330, help="start nothing after this many seconds")
    parser.add_argument("--profile", action="store_true", help="print the top kernels of one step of each variant")
    args = parser.parse_args(argv)
    for variant in args.variants.split(","):
        base, *options = variant.split("+")
        if base not in BASES or not set(options) <= OPTIONS[base != "ours"]:
            parser.error(f"unknown variant {variant!r}; bases {BASES}; options {sorted(OPTIONS[0])} (hf-: compiled)")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    torch.set_float32_matmul_precision("high")
    shape = Shape(4, 64, 16, 512) if args.tiny else Shape(64, 512, 64, 32128)
    sizes = ["nano"] if args.tiny else args.sizes.split(",")
    device_name = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    print(f"{device_name}, torch {torch.__version__}, transformers {transformers.__version__}, {shape}", flush=True)
    started, results = time.perf_counter(), []
    for variant in args.variants.split(","):
        for size in sizes:
            if time.perf_counter() - started > args.budget_s:
                print(f"{size:6} {variant:24} skipped: {args.budget_s:.0f} s are over", flush=True)
                results.append({"size": size, "variant": variant, "error": "budget"})
                continue
            config = T5Config.preset(size, shape.vocab)
            try:
                result = {"size": size, **measure(variant, config, shape, args)}
                memory = f"{result['peak_gib']:7.2f} GiB" if result["peak_gib"] is not None else ""
                print(
                    f"{size:6} {variant:24} {result['ms']:8.2f} ms {result['tokens_per_s']:10,} tokens/s {memory}"
                    f"  loss {result['first_loss']:.3f}  (warm-up {result['warmup_s']} s)",
                    flush=True,
                )
            except Exception as error:  # one variant that a version lacks must not cost the others
                traceback.print_exc(limit=-3)
                print(f"{size:6} {variant:24} failed: {type(error).__name__}: {str(error)[:300]}", flush=True)
                result = {"size": size, "variant": variant, "error": f"{type(error).__name__}: {str(error)[:200]}"}
            results.append(result)
            torch._dynamo.reset()
            gc.collect()
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(
        json.dumps(
            {
                "benchmark": "t5_step",
                "device": device_name,
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "shape": dataclasses.asdict(shape),
                "dtype": "bfloat16" if args.device == "cuda" else "float32",
                "ratios": summarise(results),
                "results": results,
            }
        )
    )


if __name__ == "__main__":
    main()
