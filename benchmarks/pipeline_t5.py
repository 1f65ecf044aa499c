# SPDX-License-Identifier: Apache-2.0
"""Our T5 on a pipeline beside its own no-bubble limit, on real packed batches.

Cases (``--cases``), each for every M of ``--micro-batches``: ``limit``, every rank runs the whole T5 on its share of
each batch's micro-batches in plain autograd and talks to nobody; and ``ZeroPPStrategy`` through the Trainer with the
schedule of that name and ``--stages-per-rank``, or ``auto`` for estimated and ``auto-measured`` for measured costs.
Forward and backward passes alone (the optimizer does nothing), bf16 parameters on GPUs, no dropout. Batches come from
the DataModule, prepared by other processes (``--num-workers``); waiting for them counts in every case. The loss is that
of the last batch that is timed, the token mean over all of it, and equal in all cases up to rounding.

Example:
    zeroprompt-data compile --source parquet --path FOLDER --out corpus
    torchrun --nproc-per-node 2 benchmarks/pipeline_t5.py --corpus corpus --size base
    torchrun --nproc-per-node 2 benchmarks/pipeline_t5.py --tiny --device cpu
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from pipeline_lightning import NoStep, fit
from pipeline_ours import costs_of
from pipeline_support import Bench, Measured
from torch import Tensor

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.sources.builtin import builtin_tasks
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models import Text2TextModule
from lightning_zeroprompt.models.module import token_loss
from lightning_zeroprompt.pipeline.chain import Chain
from lightning_zeroprompt.pipeline.costs import Costs
from lightning_zeroprompt.strategies import ZeroPPStrategy
from lightning_zeroprompt.strategies.auto import RECORDED_BATCH


class _Module(Text2TextModule):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return NoStep(self.parameters(), lr=0.0)


def _module(bench: Bench, corpus: Corpus) -> _Module:
    overrides = {"dropout": 0.0}
    return _Module(vocab_size=corpus.vocab_size, size=bench.args.size, overrides=overrides, compile=bench.args.compile)


def _data(bench: Bench, corpus: Corpus, micro_batches: int, steps: int) -> TaskDataModule:
    args = bench.args
    rows = args.rows * micro_batches
    lengths = {"encoder_length": args.encoder_length, "decoder_length": args.decoder_length}
    workers = {"num_workers": args.num_workers, "pin_memory": bench.cuda}
    return TaskDataModule(corpus, steps=steps, rows_per_batch=rows, **lengths, **workers)


def run_limit(bench: Bench, corpus: Corpus, micro_batches: int) -> Measured:
    """Plain autograd on this rank's share of micro-batches."""
    module = _module(bench, corpus)
    module.configure_model()
    module.to(device=bench.device, dtype=bench.dtype)
    data = _data(bench, corpus, micro_batches, bench.args.warmup + bench.args.steps + 1)
    data.setup("fit")
    batches: Iterator[dict[str, Tensor]] = iter(data.train_dataloader())

    def step() -> Tensor:
        batch = {name: value.to(bench.device) for name, value in next(batches).items()}
        target_tokens = module.loss_weight(batch)
        module.zero_grad()
        total = torch.zeros((), device=bench.device)
        mine = slice(bench.rank, None, bench.world)
        for parts in list(zip(*(value.chunk(micro_batches) for value in batch.values()), strict=True))[mine]:
            part = dict(zip(batch, parts, strict=True))
            loss = token_loss(module(part), part["labels"]) / target_tokens
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    measured = bench.time(step)
    losses = bench.gather(measured.loss)
    measured.loss = sum(losses)
    return measured


def costs(bench: Bench, corpus: Corpus) -> Costs:
    """Of the T5's blocks, for one micro-batch of the first batch."""

    def build() -> tuple[Chain, Callable[[], Tensor]]:
        module = _module(bench, corpus)
        module.configure_model()
        module.to(device=bench.device, dtype=bench.dtype)
        data = _data(bench, corpus, 1, 1)
        data.setup("fit")
        part = {name: value.to(bench.device) for name, value in next(iter(data.train_dataloader())).items()}
        return bench.chain(module), lambda: token_loss(module(part), part["labels"])

    return costs_of(bench, build)


def run_strategy(bench: Bench, corpus: Corpus, micro_batches: int, schedule: str) -> Measured:
    """``ZeroPPStrategy`` through the Trainer."""
    settings: dict[str, Any] = {"schedule": schedule, "num_microbatches": micro_batches}
    settings["compile_stages"] = bench.args.compile_stages
    if schedule == "auto-measured":
        settings |= {"schedule": "auto", "costs": bench.costs}
    elif schedule != "auto":
        settings["stages_per_rank"] = 1 if schedule in ("1f1b", "zb_h1") else bench.args.stages_per_rank
    data = _data(bench, corpus, micro_batches, bench.args.warmup + bench.args.steps + 2)
    strategy = ZeroPPStrategy(bench.world, **settings)
    record = None if bench.args.timeline is None else f"{schedule}_m{micro_batches}"
    return fit(bench, _module(bench, corpus), strategy, data, bench.args.warmup, record)


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--corpus", type=Path, help="compiled; default: the built-in tasks, in bytes")
    parser.add_argument("--size", default="small")
    parser.add_argument("--tiny", action="store_true", help="a tiny T5, few steps: does it run")
    parser.add_argument("--cases", default="limit,zeropp,zbv,1f1b,auto,auto-measured")
    parser.add_argument("--stages-per-rank", type=int, default=2)
    parser.add_argument("--micro-batches", default="8", help="M, comma-separated")
    parser.add_argument("--rows", type=int, default=16, help="of a micro-batch")
    parser.add_argument("--encoder-length", type=int, default=512)
    parser.add_argument("--decoder-length", type=int, default=128)
    parser.add_argument("--num-workers", type=int, default=1, help="processes that prepare batches, on each rank")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=RECORDED_BATCH + 2, help="auto plans anew in it")
    parser.add_argument("--heat-s", type=float, default=2.0, help="of matrix products on GPUs before each case")
    parser.add_argument("--timeline", type=Path, help="write timelines of one more step of each case into a folder")
    parser.add_argument("--compile", action="store_true", help="the layers of all cases")
    parser.add_argument("--compile-stages", action="store_true", help="of our cases, also where costs are measured")
    parser.add_argument("--nccl", action="store_true", help="measure messages by NCCL")
    parser.add_argument("--costs", type=Path, help="costs measured before, instead of measuring them")
    parser.add_argument("--save-costs", type=Path, help="write the costs that were measured")
    parser.add_argument("--timeout-s", type=float, default=300, help="of collectives")
    if parser.parse_known_args(argv)[0].tiny:
        parser.set_defaults(size="nano", rows=2, encoder_length=64, decoder_length=16, steps=2)
        parser.set_defaults(micro_batches="4")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    if "RANK" not in os.environ:
        raise SystemExit("start it with torchrun --nproc-per-node N benchmarks/pipeline_t5.py")
    bench = Bench(args)
    device = torch.cuda.get_device_name(bench.device) if bench.cuda else "cpu"
    bench.say(f"{bench.world} x {device}, torch {torch.__version__}, T5 {args.size}")
    results = []
    with tempfile.TemporaryDirectory() as folder:
        if args.corpus is None:
            tasks = builtin_tasks(num_tasks=10, examples_per_task=100)
            corpus = compile_tasks(tasks, Path(folder) / "corpus", tokenizer=ByteTokenizer(), progress=False)
        else:
            corpus = Corpus.open(args.corpus)
        if "auto-measured" in args.cases.split(","):
            bench.costs = costs(bench, corpus)
        for count in map(int, args.micro_batches.split(",")):
            limit = None
            for case in args.cases.split(","):
                measured = (
                    run_limit(bench, corpus, count) if case == "limit" else run_strategy(bench, corpus, count, case)
                )
                everyone: list[Measured] = bench.gather(measured)
                seconds = [max(times) for times in zip(*(each.seconds for each in everyone), strict=True)]
                median = statistics.median(seconds)
                limit = median if case == "limit" else limit
                result = {"case": case, "micro_batches": count, "ms": round(1e3 * median, 2)}
                result["loss"] = next((round(each.loss, 3) for each in everyone if each.loss is not None), None)
                text = f"M={count:3d} {case:12s} {1e3 * median:8.1f} ms  loss {result['loss']}"
                if limit is not None:
                    result["of_limit"] = round(limit / median, 3)
                    text += f"  of limit {limit / median:.3f}"
                if bench.cuda:
                    result["peak_gib"] = round(max(each.peaks[1] for each in everyone if each.peaks) / 2**30, 2)
                    text += f"  peak {result['peak_gib']:.2f} GiB"
                if measured.predicted is not None:
                    # Of passes alone: waiting for a batch, and what the Trainer does, come on top.
                    predicted, held = 1e3 * measured.predicted[0], measured.predicted[1] / 2**30
                    result |= {"predicted_ms": round(predicted, 2), "predicted_gib": round(held, 2)}
                    text += f"  predicted {predicted:.1f} ms ({predicted / (1e3 * median) - 1:+.1%}), {held:.2f} GiB"
                bench.say(text)
                results.append(result)
                gc.collect()
                if bench.cuda:
                    torch.cuda.empty_cache()
    settings = {name: str(value) if isinstance(value, Path) else value for name, value in vars(args).items()}
    bench.say(
        json.dumps({"benchmark": "pipeline_t5", "device": device, "gpus": bench.world, "settings": settings,
                    "results": results})
    )  # fmt: skip
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
