# SPDX-License-Identifier: Apache-2.0
"""``zeroprompt-data``: compile a source, check and describe a compiled folder, compare a mixture with its draws."""

import argparse
import collections
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lightning_zeroprompt.data.corpus import Corpus, TaskInfo
from lightning_zeroprompt.data.describe import corpus_summary, folder_size, task_counts, training_summary

__all__ = ["main"]


def _compile(args: argparse.Namespace) -> None:
    from lightning_zeroprompt.data.prepare import compile_source

    options: dict[str, Any] = {}
    if args.source == "parquet":
        options = {"include_noncommercial": args.include_noncommercial, "include_bigbench": args.include_bigbench}
    elif args.source == "promptsource":
        options = {"split": args.split, **({"data_folder": args.data} if args.data else {})}
    elif args.source == "builtin" and args.examples_per_task is not None:
        options = {"examples_per_task": args.examples_per_task}
    elif args.source == "hub" and args.load:
        options = {"load": dict(_pair(pair) for pair in args.load)}
    start = time.perf_counter()
    corpus = compile_source(
        args.source,
        args.path,
        args.out,
        tokenizer=args.tokenizer,
        vocab_size=args.vocab_size,
        num_tasks=args.num_tasks,
        seed=args.seed,
        options=options,
        existing="replace" if args.replace else "reuse",
        max_input_tokens=args.max_input_tokens,
        long_inputs=args.long_inputs,
        max_examples_per_task=args.max_examples_per_task,
        max_examples_per_class=args.max_examples_per_class,
        max_heldout_examples=args.max_heldout_examples,
        heldout_max=args.heldout_max,
        num_workers=args.num_workers,
        progress=not args.quiet,
    )
    print(f"{corpus_summary(corpus)}; {time.perf_counter() - start:.1f} s")


def _pair(text: str) -> tuple[str, Any]:
    key, found, value = text.partition("=")
    if not found:
        raise ValueError(f"--load {text!r} is no KEY=VALUE")
    return key, value if value != "null" else None


def _cap(text: str) -> int | None:
    return None if text == "all" else int(text)


def _verify(args: argparse.Namespace) -> None:
    corpus = Corpus.open(args.folder)
    corpus.verify()
    print(f"{corpus.path}: all files are as the manifest says; fingerprint {corpus.fingerprint}")


def _grouped(tasks: Sequence[TaskInfo], key: Callable[[TaskInfo], str]) -> list[tuple[str, list[TaskInfo]]]:
    groups: dict[str, list[TaskInfo]] = collections.defaultdict(list)
    for task in tasks:
        groups[key(task)].append(task)
    return sorted(groups.items(), key=lambda entry: (-sum(task.num_rows for task in entry[1]), entry[0]))


def _table(title: str, tasks: Sequence[TaskInfo], key: Callable[[TaskInfo], str]) -> Any:
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(title.split()[-1], overflow="fold")
    for name in ("tasks", "held out", "rows", "held out", "in", "out", "cut", "dropped"):
        table.add_column(name, justify="right", no_wrap=True)
    for name, members in [*_grouped(tasks, key), ("all", list(tasks))]:
        rows = sum(task.num_rows for task in members)
        train = sum(task.num_train_rows for task in members)
        means = [
            sum(task.num_rows * task.mean_input_tokens for task in members) / max(rows, 1),
            sum(task.num_rows * task.mean_output_tokens for task in members) / max(rows, 1),
        ]
        trained = sum(task.role == "train" for task in members)
        cells = [trained, len(members) - trained, train, rows - train]
        cut, dropped = (sum(getattr(task, key) for task in members) for key in ("num_truncated", "num_dropped"))
        table.add_row(name, *(f"{n:,}" for n in cells), *(f"{m:.1f}" for m in means), f"{cut:,}", f"{dropped:,}")
    return table


def _describe(args: argparse.Namespace) -> None:
    from rich.console import Console

    corpus = Corpus.open(args.folder)
    # Eight columns of numbers leave names no room on the 80 columns that a pipe is taken for.
    console = Console(width=max(Console().width, 104))
    counts = corpus.counts
    tokenizer = json.loads((corpus.path / "manifest.json").read_text(encoding="utf-8"))["tokenizer"]
    console.print(f"{corpus.path}  {folder_size(corpus)}  fingerprint {corpus.fingerprint[:16]}", highlight=False)
    console.print(f"{task_counts(corpus.tasks)}; {len(corpus.templates):,} templates", highlight=False)
    console.print(
        f"{counts['rows']:,} rows, {counts['tokens']:,} tokens in {counts['segments']:,} segments; tokeniser "
        f"{tokenizer['name']} "
        f"({tokenizer['vocab_size']:,} ids); left out by caps: {counts['capped']:,}. Below: training and held-out "
        f"tasks and rows, mean tokens "
        "of inputs and first outputs, rows cut and dropped for their length.",
        highlight=False,
    )
    for title, key in (
        ("By category", lambda task: task.category),
        ("By kind", lambda task: task.kind + (", closed labels" if task.labels else "")),
        ("By licence", lambda task: task.licence),
    ):
        console.print(_table(title, corpus.tasks, key))


def _mixture(args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    from lightning_zeroprompt.data.evaluation_plan import split_tasks
    from lightning_zeroprompt.data.mixture import Mixture, MixtureSettings, select_tasks

    if args.draws < 1:
        raise ValueError(f"--draws is {args.draws}; give the number of draws to count, 1 or more")
    corpus = Corpus.open(args.folder)
    candidates, heldout = split_tasks(
        corpus.tasks, args.holdout_categories, drop_shared_families=args.drop_shared_families
    )
    chosen = select_tasks(corpus.tasks, args.num_tasks, args.seed, among=candidates)
    settings = MixtureSettings(
        max_per_class=args.max_per_class,
        max_per_task=args.max_per_task,
        temperature=args.temperature,
        category_exponent=args.category_exponent,
        class_balance=args.class_balance,
        denoising=args.denoising,
    )
    mixture = Mixture(corpus, chosen, seed=args.seed, settings=settings)
    start = time.perf_counter()
    realised = mixture.realised(0, args.draws)
    seconds = time.perf_counter() - start
    targets = mixture.targets() * args.draws
    table = Table(title=f"{len(chosen):,} tasks, {args.draws:,} draws in {seconds:.2f} s", title_justify="left")
    table.add_column("task", overflow="fold")
    for name in ("rows", "target", "realised", "difference"):
        table.add_column(name, justify="right")
    order = sorted(range(len(chosen)), key=lambda i: -abs(float(realised[i] - targets[i])))
    for i in order[: args.show]:
        task = corpus.tasks[chosen[i]]
        difference = float(realised[i] - targets[i])
        cells = (f"{task.num_train_rows:,}", f"{targets[i]:.2f}", f"{realised[i]:,}", f"{difference:+.2f}")
        table.add_row(task.task_id, *cells)
    console = Console()
    console.print(training_summary(corpus, chosen, candidates, heldout), highlight=False, soft_wrap=True)
    console.print(table)
    counted = min(args.draws, 65_536)
    noised = float(mixture.draws(0, counted).denoise.mean())
    console.print(f"span corruption: target {args.denoising:.3f}, {noised:.3f} of {counted:,} draws", highlight=False)
    worst = max(abs(float(r - t)) for r, t in zip(realised, targets, strict=True))
    console.print(f"largest difference between target and realised count: {worst:.3f} examples", highlight=False)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zeroprompt-data", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("compile", help="turn a source into a compiled folder")
    command.set_defaults(run=_compile)
    command.add_argument("--source", required=True, choices=("builtin", "parquet", "hub", "promptsource"))
    command.add_argument("--path", help="folder (parquet), mapping file (hub), templates folder (promptsource)")
    command.add_argument("--out", required=True, type=Path, help="folder to make")
    command.add_argument("--tokenizer", default="bpe", help="byte, bpe, or a pretrained one (default: bpe)")
    command.add_argument("--vocab-size", type=int, default=32_000, help="ids of a trained BPE (default: 32000)")
    command.add_argument("--num-tasks", type=int, help="training tasks to choose (builtin, parquet; default: all)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--max-input-tokens", type=int, default=1024)
    command.add_argument("--long-inputs", choices=("truncate", "drop"), default="truncate")
    command.add_argument("--max-examples-per-task", type=int, help="most training rows of a task (default: all)")
    command.add_argument("--max-examples-per-class", type=int, help="most training rows of a class (default: all)")
    command.add_argument("--max-heldout-examples", type=int, help="most rows of a held-out task (default: all)")
    command.add_argument(
        "--heldout-max", type=int, default=50, help="most held-out rows of a training task (default: 50)"
    )
    command.add_argument("--include-noncommercial", action="store_true", help="parquet: heldout_noncommercial too")
    command.add_argument("--include-bigbench", action="store_true", help="parquet: heldout_bigbench too")
    command.add_argument("--data", type=Path, help="promptsource: folder of NAME/SPLIT.parquet")
    command.add_argument("--split", default="validation", help="promptsource: which split (default: validation)")
    command.add_argument("--examples-per-task", type=int, help="builtin: inputs a task")
    command.add_argument("--load", action="append", metavar="KEY=VALUE", help="hub: replaces an entry of 'load'")
    command.add_argument("--num-workers", type=int, default=2)
    command.add_argument("--replace", action="store_true", help="replace a corpus of other settings in --out")
    command.add_argument("--quiet", action="store_true", help="no progress bar")

    command = commands.add_parser("verify", help="check all hashes of a compiled folder")
    command.set_defaults(run=_verify)
    command.add_argument("folder", type=Path)

    command = commands.add_parser("describe", help="counts, lengths, categories and licences of a compiled folder")
    command.set_defaults(run=_describe)
    command.add_argument("folder", type=Path)

    command = commands.add_parser("mixture", help="target against realised counts of a mixture")
    command.set_defaults(run=_mixture)
    command.add_argument("folder", type=Path)
    command.add_argument("--num-tasks", type=int, help="training tasks (default: all)")
    command.add_argument("--draws", type=int, default=131_072, help="draws to count (default: 131072, whole blocks)")
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--max-per-class", type=_cap, default=128, help="cap of a class, or all (default: 128)")
    command.add_argument("--max-per-task", type=_cap, default=256, help="cap of a task without classes, or all")
    command.add_argument("--temperature", type=float, default=math.inf, help="default: inf, every task alike")
    command.add_argument(
        "--category-exponent", type=float, help="first draw a category, weighted by its size to this power"
    )
    command.add_argument(
        "--class-balance",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="draw the classes of a task alike, or by their rows (default: alike)",
    )
    command.add_argument("--denoising", type=float, default=0.15, help="share of span corruption (default: 0.15)")
    command.add_argument(
        "--holdout-categories", nargs="+", default=[], metavar="CATEGORY", help="categories to hold out too"
    )
    command.add_argument(
        "--drop-shared-families", action="store_true", help="drop training tasks of held-out families, not refuse them"
    )
    command.add_argument("--show", type=int, default=20, help="tasks to list, largest difference first (default: 20)")
    return parser


def main(argv: list[str] | None = None) -> None:
    """Run ``zeroprompt-data``.

    Args:
        argv: Arguments; those of the process when None.

    Raises:
        SystemExit: With 2 and one line on stderr where the input cannot be used.
    """
    args = _parser().parse_args(argv)
    try:
        args.run(args)
    except (ValueError, OSError) as error:
        print(f"zeroprompt-data: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
