# SPDX-License-Identifier: Apache-2.0
"""Prompt search: how much better are the prompts, at one budget of (prompt, example) scorings, than the manual ones?

Our genetic search, random search over its operators, GPS's procedure and, with ``--peers gepa``, a library, all driven
by one model (``prompt_search_peers.py`` says how). A task has 64 labelled rows, and a test part that decides nothing.
Gains are in points of test accuracy (free answers: exact match or ROUGE-L, whose generated texts no budget counts) over
the manual prompt that is best on all 64 by outcome, then fitness; by two rules: ``top``, the first prompt of the
method's ranking, as GPS and GEPA choose; ``confirmed``, the exact test of :mod:`lightning_zeroprompt.prompts.confirm`
among the first three of it, else the manual prompt that is best on the search part. A method whose own rule is the
first searches on 32 rows, as in GPS, and leaves 32 that only say what its prompt is worth; the others search on as many
as the package does. Intervals are bootstrapped over tasks.

``--setting builtin``: held-out built-in tasks in wordings that no training draws. ``t0``: T0's evaluation sets with
promptsource templates; ``heldout``: other held-out tasks (both with ``--data``, a folder of ``heldout.parquet``,
``tasks.jsonl``, ``t0/`` and ``templates_t0/``). The last line is one JSON object.

A task that cannot be searched is left out, with the reason in ``left_out``.

    zeroprompt-train experiment=demo hydra.run.dir=RUN
    python benchmarks/prompt_search.py --setting builtin --checkpoint RUN/checkpoints/final.ckpt --peers gepa
    python benchmarks/prompt_search.py --setting builtin --checkpoint RUN/checkpoints/final.ckpt --overhead
    python benchmarks/prompt_search.py --setting t0 --data FOLDER --checkpoint RUN/checkpoints/final.ckpt --device cuda

The library is no dependency: ``pip install --no-deps --target FOLDER gepa`` and ``PYTHONPATH=FOLDER``.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import itertools
import json
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import numpy as np
import torch
from omegaconf import OmegaConf
from prompt_search_peers import METHODS, Arena, Ranking, ranked_with_manual
from prompt_search_tasks import Found, LeaveOut, builtin_pools, real_pools, t0_pools

from lightning_zeroprompt.cli.prompts import Loaded
from lightning_zeroprompt.prompts.confirm import Evidence, confirm
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.prompts.generators import SpanInfiller
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.parts import CONFIRM_SHARE
from lightning_zeroprompt.prompts.problem import build_problem, corpus_donors
from lightning_zeroprompt.prompts.rounds import build_operators
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings
from lightning_zeroprompt.prompts.significance import beats_chance, bootstrap_interval

OWN_RULE = {
    "genetic": "confirmed",
    "random": "confirmed",
    "random+race": "confirmed",
    "gps": "top",
    "gps+operators": "top",
    "gepa": "top",
}
"""How each method chooses by itself."""
CONFIRMATIONS: dict[str, tuple[int, Literal["fitness", "outcome"]]] = {
    "confirmed": (3, "outcome"),
    "confirmed_alone": (1, "outcome"),
    "confirmed_by_fitness": (3, "fitness"),
    "confirmed_alone_by_fitness": (1, "fitness"),
}
"""Finalists, and what the test compares. The first is the search's own; the others say what it costs and saves."""
RULES = ("top", *CONFIRMATIONS)
LIBRARIES = ("gepa",)
SHARES = {"confirmed": CONFIRM_SHARE, "top": 0.5}
"""Of the labelled rows, by a method's own rule: what is kept to confirm."""
FEWEST = 8
"""Tasks with a manual prompt above chance that a conclusion needs."""


class Judge:
    """What prompts of a task are worth beside manual ones.

    Args:
        arena: The task, with the parts that a rule has.
        best: The manual prompt that gains are over.
    """

    def __init__(self, arena: Arena, best: PromptGenome) -> None:
        problem = arena.problem
        self._own = {genome.fingerprint for genome in arena.manual}
        self._confirm, self._test = (
            PromptScorer(pool, arena.forward, arena.encoding, max_tokens=arena.max_tokens)
            for pool in (problem.confirm, problem.test)
        )
        self.manual = ranked_with_manual(arena.scorer(), arena.manual, arena)[0]
        pool = problem.test
        self.chance = 0.0
        if pool.kind == "choice":
            right = np.add.reduceat(pool.right.astype(np.float64), pool.option_offsets[:-1])
            self.chance = float((right / pool.num_options).mean())
        outcome = self._test.score([best], outcomes=True).outcome[0]
        self.manual_test, self.manual_confirm = float(outcome.mean()), self._outcome(self._confirm, self.manual)
        self.beats_chance = beats_chance(int(outcome.sum()), len(outcome), self.chance)

    @staticmethod
    def _outcome(scorer: PromptScorer, genome: PromptGenome) -> float:
        return float(scorer.score([genome], outcomes=True).outcome.mean())

    def judge(self, ranking: Ranking) -> dict[str, Any]:
        """Test and confirm accuracy of a method's first prompt, and of what the confirmation leaves."""
        top = ranking.prompts[0]
        finalists = [genome for genome in ranking.prompts if genome.fingerprint not in self._own][:3]
        scores = self._confirm.score([self.manual, *finalists], outcomes=True)
        usable = [at for at in range(len(finalists)) if np.isfinite(scores.fitness[at + 1]).all()]
        manual, *others = (Evidence(fitness=f, outcome=o) for f, o in zip(scores.fitness, scores.outcome, strict=True))
        record: dict[str, Any] = {"spent": ranking.spent, "tried": ranking.tried}
        chosen = {"top": top}
        for rule, (count, decided_by) in CONFIRMATIONS.items():
            found = confirm(manual, [others[at] for at in usable[:count]], decided_by=decided_by)
            chosen[rule] = self.manual if found.chosen is None else finalists[usable[found.chosen]]
            if rule == "confirmed":
                record["kept"] = found.chosen is not None
                record["p"] = min((comparison.adjusted_p for comparison in found.comparisons), default=None)
        for rule, genome in chosen.items():
            record[rule] = {
                "text": genome.text,
                "gain": 100 * (self._outcome(self._test, genome) - self.manual_test),
                "confirm_gain": 100 * (self._outcome(self._confirm, genome) - self.manual_confirm),
            }
        return record


def best_manual(arena: Arena) -> PromptGenome:
    """The manual prompt that is best on all labelled rows."""
    scores = [
        PromptScorer(pool, arena.forward, arena.encoding, max_tokens=arena.max_tokens).score(
            arena.manual, outcomes=True
        )
        for pool in (arena.problem.search, arena.problem.confirm)
    ]
    outcome, fitness = (
        np.concatenate([getattr(score, name) for score in scores], axis=1).mean(1, dtype=np.float64)
        for name in ("outcome", "fitness")
    )
    return arena.manual[max(range(len(outcome)), key=lambda at: (outcome[at], fitness[at], -at))]


def pools(args: argparse.Namespace, loaded: Loaded, leave_out: LeaveOut) -> Iterator[tuple[str, Found]]:
    """Groups and tasks of a setting."""
    tokenizer = loaded.corpus.tokenizer
    drawn = {"count": args.tasks, "kind": args.kind, "seed": args.draw}
    if args.setting == "builtin":
        for found in builtin_pools(tokenizer, rows=args.rows, corpus_seed=loaded.run.seed, **drawn):
            yield "built-in", found
        return
    limits: dict[str, Any] = {"rows": args.rows, "encoder_length": loaded.run.data.encoder_length}
    if args.setting == "t0":
        for found in t0_pools(args.data, tokenizer, leave_out=leave_out, **limits):
            yield "T0", found
    else:
        for found in real_pools(args.data, tokenizer, leave_out=leave_out, **drawn, **limits):
            yield "held-out", found


def arenas(
    args: argparse.Namespace, loaded: Loaded, leave_out: LeaveOut, process: int = 0
) -> Iterator[tuple[int, str, int, dict[str, Arena]]]:
    """Every task that can be searched under every seed, by rule: those whose number is this process's."""
    model, tokenizer = loaded.module.model, loaded.corpus.tokenizer
    operators = build_operators(None, lambda: model, tokenizer, denoises=loaded.run.mixture.denoising > 0)
    donors = corpus_donors(loaded.data.corpus, loaded.data.task_indices)
    # Every process cuts all tasks' rows alike; one tells what is left out there.
    found = list(pools(args, loaded, leave_out if process == 0 else lambda task, reason: None))
    searches = list(itertools.product(found, range(args.seeds)))
    for place in range(process, len(searches), args.processes):
        (group, (pool, test_rows)), seed = searches[place]
        made: dict[str, Arena] = {}
        try:
            for rule, share in zip(SHARES, args.shares, strict=True):
                cut: dict[str, Any] = {"k": 64, "seed": seed, "test_rows": test_rows, "confirm_share": share}
                arena = made[rule] = Arena(
                    problem=build_problem(pool, donors, population=args.population, **cut),
                    forward=T5Forward(model),
                    encoding=loaded.encoding(),
                    operators=operators,
                    infiller=SpanInfiller(model, tokenizer),
                    population=args.population,
                    budget=args.budget,
                    seed=seed,
                    max_tokens=args.max_tokens,
                )
                # It refuses a task whose manual prompts cannot be used, or are too many for the budget.
                settings = SearchSettings(budget=args.budget)
                PromptSearch(arena.problem, arena.forward, operators, settings, arena.encoding)
        except ValueError as error:
            leave_out(pool.name, f"seed {seed}: {error}")
            continue
        yield place, group, seed, made


def compare(
    args: argparse.Namespace, loaded: Loaded, methods: Sequence[str], leave_out: LeaveOut, process: int
) -> list[dict[str, Any]]:
    """One row a task and seed."""
    rows: list[dict[str, Any]] = []
    started = time.perf_counter()
    for place, group, seed, found in arenas(args, loaded, leave_out, process):
        problem = found["confirmed"].problem
        if rows and args.minutes is not None and time.perf_counter() - started > 60 * args.minutes:
            print(f"{args.minutes} minutes are over; {problem.name} and those behind it are left out", flush=True)
            break
        best = best_manual(found["top"])
        judges = {rule: Judge(arena, best) for rule, arena in found.items()}
        judge = judges["confirmed"]
        row: dict[str, Any] = {
            "place": place,
            "group": group,
            "task": problem.name,
            "seed": seed,
            "counted": problem.parts.counted,
            "test_rows": len(problem.test),
            "manual_prompts": problem.num_manual,
            "chance": judge.chance,
            "manual": judge.manual_test,
            "beats_chance": judge.beats_chance,
        }
        for name in methods:
            since = time.perf_counter()
            ranking = METHODS[name](found[OWN_RULE[name]])
            seconds = time.perf_counter() - since
            if ranking.spent > args.budget:
                raise RuntimeError(f"{name} has spent {ranking.spent} scorings of {args.budget}")
            row[name] = judges[OWN_RULE[name]].judge(ranking) | {"seconds": seconds}
        rows.append(row)
        if args.journal is not None:
            with args.journal.open("a", encoding="utf-8") as journal:
                journal.write(json.dumps(row) + "\n")
        gains = "  ".join(
            f"{name} {row[name]['top']['gain']:+.1f}/{row[name]['confirmed']['gain']:+.1f}" for name in methods
        )
        print(f"{group} {problem.name} seed {seed}: manual {row['manual']:.3f}, {gains}", flush=True)
    return rows


def by_task(rows: Sequence[dict[str, Any]], values: Sequence[float]) -> list[float]:
    """Means over seeds, one a task."""
    tasks: dict[str, list[float]] = {}
    for row, value in zip(rows, values, strict=True):
        tasks.setdefault(row["task"], []).append(value)
    return [statistics.fmean(found) for found in tasks.values()]


def interval(values: Sequence[float]) -> dict[str, float]:
    """Mean and 95 % interval."""
    low, high = bootstrap_interval(values)
    return {"mean": statistics.fmean(values), "low": low, "high": high}


def summary(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> dict[str, Any]:
    """Figures over tasks that count."""
    counted = [row for row in rows if row["counted"]]
    if not counted:
        return {"tasks": 0}
    result: dict[str, Any] = {"tasks": len({row["task"] for row in counted}), "searches": len(counted)}
    for name in methods:
        own = OWN_RULE[name]
        entry: dict[str, Any] = {}
        gains = {rule: [row[name][rule]["gain"] for row in counted] for rule in RULES}
        for rule, found in gains.items():
            entry[f"gain_{rule}"] = interval(by_task(counted, found))
        entry["rule"], entry["gain"] = own, entry[f"gain_{own}"]
        for part, key in (("confirm", "confirm_gain"), ("test", "gain")):
            entry[f"below_manual_on_{part}"] = sum(row[name][own][key] < 0 for row in counted)
            entry[f"top_below_manual_on_{part}"] = sum(row[name]["top"][key] < 0 for row in counted)
        entry["kept"] = sum(row[name]["kept"] for row in counted)
        for key in ("spent", "tried", "seconds"):
            entry[f"mean_{key}"] = statistics.fmean(row[name][key] for row in counted)
        if name != "genetic" and "genetic" in methods:
            ahead = [row["genetic"]["confirmed"]["gain"] - row[name][own]["gain"] for row in counted]
            entry["genetic_ahead"] = interval(by_task(counted, ahead))
        result[name] = entry
    return result


@contextlib.contextmanager
def clocked(kind: type[Any], name: str, spent: dict[str, float]) -> Iterator[None]:
    """Add up the seconds in a method."""
    inner = getattr(kind, name)

    @functools.wraps(inner)
    def timed(*given: Any, **named: Any) -> Any:
        since = time.perf_counter()
        try:
            return inner(*given, **named)
        finally:
            key = kind.__name__
            spent[key] = spent.get(key, 0.0) + time.perf_counter() - since

    with mock.patch.object(kind, name, timed):
        yield


def overhead(args: argparse.Namespace, loaded: Loaded, leave_out: LeaveOut) -> dict[str, Any]:
    """Share of a search's time that is neither scoring nor a text model's, at population 64."""
    spent: dict[str, float] = {}
    total, scorings = 0.0, 0
    settings = SearchSettings(population=64, generations=6)
    args.population = 64
    with clocked(PromptScorer, "score", spent), clocked(SpanInfiller, "__call__", spent):
        for *_, found in itertools.islice(arenas(args, loaded, leave_out), args.tasks):
            arena = found["confirmed"]
            search = PromptSearch(
                arena.problem, arena.forward, arena.operators, settings, arena.encoding, max_tokens=args.max_tokens
            )
            since = time.perf_counter()
            search.begin(0)
            while search.advance():
                pass
            total += time.perf_counter() - since
            scorings += search.scorers["search"].counts.scored
    scoring, text = spent["PromptScorer"], spent.get("SpanInfiller", 0.0)
    return {
        "seconds": total,
        "scorings": scorings,
        "scoring_share": scoring / total,
        "text_model_share": text / total,
        "operators_and_bookkeeping_share": (total - scoring - text) / total,
    }


def work(args: argparse.Namespace, methods: Sequence[str], process: int) -> dict[str, Any]:
    """What one process does: its tasks, on its GPU."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(process % torch.cuda.device_count())
    with tempfile.TemporaryDirectory() as folder:
        config = {"checkpoint": args.checkpoint, "run": None, "corpus": None, "device": args.device}
        loaded = Loaded(OmegaConf.create({**config, "paths": {"output_dir": folder}}))
    result: dict[str, Any] = {
        "model_parameters": sum(parameter.numel() for parameter in loaded.module.parameters()),
        "model_steps": loaded.module.loaded_steps,
        "left_out": [],
    }

    def leave_out(task: str, reason: str) -> None:
        print(f"left out: {task}: {reason}", flush=True)
        result["left_out"].append({"task": task, "reason": reason})

    if args.overhead:
        return result | {"overhead": overhead(args, loaded, leave_out)}
    return result | {"rows": compare(args, loaded, methods, leave_out, process)}


def markdown(rows: Sequence[dict[str, Any]], methods: Sequence[str]) -> str:
    """One line a task, means over seeds."""
    titles = ["group", "task", "test rows", "chance", "manual", *methods]
    lines = ["| " + " | ".join(titles) + " |", "| --- | --- |" + " ---: |" * (len(titles) - 2)]
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        first = mine[0]
        cells = [
            first["group"] + ("" if first["counted"] else " (not counted)"),
            f"`{task}`" + (" *" if any(row["beats_chance"] for row in mine) else ""),
            f"{first['test_rows']}",
            f"{first['chance']:.3f}",
            f"{statistics.fmean(row['manual'] for row in mine):.3f}",
        ]
        for name in methods:
            gain = statistics.fmean(row[name][OWN_RULE[name]]["gain"] for row in mine)
            kept = sum(row[name]["kept"] for row in mine)
            cells.append(f"{gain:+.1f}" + (f" ({kept}/{len(mine)})" if OWN_RULE[name] == "confirmed" else ""))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--setting", choices=("builtin", "t0", "heldout"), default="builtin")
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", type=Path, help="folder of the real tasks")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tasks", type=int, default=24, help="tasks to draw; T0 has its own")
    parser.add_argument("--kind", choices=("all", "choice"), default="all", help="of the tasks that are drawn")
    parser.add_argument("--draw", type=int, default=0, help="another number draws other tasks; T0 has its own")
    parser.add_argument("--rows", type=int, default=600, help="most rows a task")
    parser.add_argument("--seeds", type=int, default=1, help="each with other parts and another search")
    parser.add_argument(
        "--shares",
        type=float,
        nargs=2,
        default=tuple(SHARES.values()),
        metavar=("CONFIRMED", "TOP"),
        help="of the labelled rows that are kept to confirm, by a method's own rule",
    )
    parser.add_argument("--budget", type=int, default=1500, help="scorings a search")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--methods", default="genetic,random,random+race,gps,gps+operators")
    parser.add_argument("--peers", default="", help=f"libraries to add: {', '.join(LIBRARIES)}")
    parser.add_argument("--max-tokens", type=int, default=2048)
    parser.add_argument("--overhead", action="store_true", help="time the search at population 64 instead")
    parser.add_argument("--minutes", type=float, help="begin no further task after so long")
    parser.add_argument("--table", type=Path, help="write the table of tasks, Markdown")
    parser.add_argument("--journal", type=Path, help="append every row as it comes, JSON lines")
    parser.add_argument("--threads", type=int, default=1, help="of a process")
    parser.add_argument("--processes", type=int, default=1, help="that share the tasks, and the GPUs")
    args = parser.parse_args()
    if args.setting != "builtin" and args.data is None:
        parser.error(f"--setting {args.setting} reads --data FOLDER")
    methods = [name for name in f"{args.methods},{args.peers}".split(",") if name]
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"unknown method {unknown[0]}; there are: {', '.join(METHODS)}")
    if args.processes < 1 or (args.overhead and args.processes > 1):
        parser.error(f"--processes {args.processes}: at least 1, and 1 with --overhead")
    if args.processes == 1:
        shares = [work(args, methods, 0)]
    else:
        context = multiprocessing.get_context("spawn")
        with concurrent.futures.ProcessPoolExecutor(args.processes, context) as pool:
            shares = list(pool.map(functools.partial(work, args, methods), range(args.processes)))
    result: dict[str, Any] = {
        "setting": args.setting,
        "draw": args.draw,
        "shares": dict(zip(SHARES, args.shares, strict=True)),
        "budget": args.budget,
        "population": args.population,
        "seeds": args.seeds,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name()
        if args.device == "cuda"
        else platform.processor() or platform.machine(),
        **shares[0],
    }
    if args.overhead:
        print(json.dumps(result))
        return
    rows = sorted(itertools.chain.from_iterable(share["rows"] for share in shares), key=lambda row: row["place"])
    result["left_out"] = [one for share in shares for one in share["left_out"]]
    above = [row for row in rows if row["beats_chance"] and row["counted"]]
    result["all"] = summary(rows, methods)
    # A task counts as above chance if it is so in every seed's test part.
    sure = {row["task"] for row in above} - {row["task"] for row in rows if not row["beats_chance"]}
    result["above_chance"] = summary([row for row in rows if row["task"] in sure], methods)
    count = result["above_chance"]["tasks"]
    result["conclusion"] = (
        f"none: {count} tasks have a manual prompt above chance (95 %), {FEWEST} are needed"
        if count < FEWEST
        else f"{count} tasks have a manual prompt above chance (95 %)"
    )
    if args.table is not None:
        args.table.write_text(markdown(rows, methods), encoding="utf-8")
    print(json.dumps(result | {"rows": rows}))


if __name__ == "__main__":
    main()
