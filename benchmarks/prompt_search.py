# SPDX-License-Identifier: Apache-2.0
"""Search quality at an equal budget of scorings, on held-out tasks of a trained model, and what the bookkeeping costs.

    python benchmarks/prompt_search.py --checkpoint runs/train/DATE/checkpoints/final.ckpt --tasks 20

Four ways to spend the same number of scorings (prompt, example) of the search part, from the same first prompts, with
the same model and parts of the rows:

* ``search``: this package's search.
* ``random``: the same operators on parents drawn by chance from all prompts so far; every prompt sees the whole part.
* ``gps``: the procedure of GPS's release: the best K by *accuracy* are the parents, their children replace them, the
  best of all generations is taken. Its operator is the only rewriting that the model itself can do, span infilling.
* ``first``: the best of the first prompts; no search.

Each way's choice is the prompt that is best on the search part by its own measure, compared on the test part with the
manual prompt that is best on the search part (by outcome, then fitness): ``raw``. ``confirmed`` is that choice where
the confirm part confirms it, else the manual prompt. Tasks are counted whose best manual prompt beats chance on the
test part with 95 % confidence. All ways run in this process. One JSON object is printed last.
"""

import argparse
import json
import platform
import random
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from hydra import compose, initialize_config_dir

from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.cli.prompts import Loaded
from lightning_zeroprompt.data.permutation import permute, stream_key
from lightning_zeroprompt.prompts.confirm import Evidence, confirm
from lightning_zeroprompt.prompts.encoding import EncodingSettings
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import Forward, T5Forward
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.operators import Couple, OperatorSet
from lightning_zeroprompt.prompts.pool import PoolError
from lightning_zeroprompt.prompts.problem import SearchProblem, build_problem, corpus_donors, corpus_pool, heldout_tasks
from lightning_zeroprompt.prompts.rounds import build_operators, run_round
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings
from lightning_zeroprompt.prompts.significance import beats_chance, bootstrap_interval

PARENTS = 8


def first_prompts(scorer: PromptScorer, problem: SearchProblem, budget: int) -> dict[PromptGenome, Any]:
    """Prompts of the first population with their scores, as many as the budget pays for; the manual ones come first."""
    per_prompt = len(problem.search)
    chosen = [candidate.genome for candidate in problem.start][: max(budget // per_prompt, problem.num_manual)]
    scores = scorer.score(chosen)
    return {genome: row for genome, row in zip(chosen, scores.fitness, strict=True) if np.isfinite(row).all()}


def breed(
    operators: OperatorSet,
    problem: SearchProblem,
    parents: list[PromptGenome],
    count: int,
    rng: random.Random,
    known: set[str],
) -> list[PromptGenome]:
    couples = [Couple(tuple(rng.choices(parents, k=2)), problem.material) for _ in range(count)]
    made = [child.genome for child in operators.breed(couples, rng) if child is not None]
    return [genome for genome in dict.fromkeys(made) if genome.fingerprint not in known]


def random_search(
    scorer: PromptScorer, problem: SearchProblem, operators: OperatorSet, budget: int, seed: int
) -> PromptGenome:
    """The prompt with the best mean fitness among those that chance has made."""
    rng, found = random.Random(seed), first_prompts(scorer, problem, budget)
    known = {genome.fingerprint for genome in found}
    idle = 0
    while (room := (budget - scorer.counts.scored) // len(problem.search)) > 0 and idle < 5:
        fresh = breed(operators, problem, list(found), min(room, 32), rng, known)
        idle = 0 if fresh else idle + 1
        known |= {genome.fingerprint for genome in fresh}
        for genome, row in zip(fresh, scorer.score(fresh).fitness if fresh else (), strict=True):
            if np.isfinite(row).all():
                found[genome] = row
    return max(found, key=lambda genome: found[genome].mean())


def gps(scorer: PromptScorer, problem: SearchProblem, operators: OperatorSet, budget: int, seed: int) -> PromptGenome:
    """The prompt with the best accuracy among all generations; the first of equals, as a sort leaves them."""
    rng = random.Random(seed)
    outcome = lambda genomes: scorer.score(genomes, outcomes=True).outcome.mean(1)  # noqa: E731
    current = list(first_prompts(scorer, problem, budget))
    union = dict(zip(current, outcome(current), strict=True))
    known = {genome.fingerprint for genome in union}
    idle = 0
    while (room := (budget - scorer.counts.scored) // len(problem.search)) > 0 and idle < 5:
        parents = sorted(current, key=lambda genome: -union[genome])[:PARENTS]
        fresh = breed(operators, problem, parents, min(room, 32), rng, known)
        idle = 0 if fresh else idle + 1
        if not fresh:
            continue
        known |= {genome.fingerprint for genome in fresh}
        scores = outcome(fresh)
        usable = [genome for genome, score in zip(fresh, scores, strict=True) if np.isfinite(score)]
        union |= {genome: float(score) for genome, score in zip(fresh, scores, strict=True) if np.isfinite(score)}
        # Parents are not carried over.
        current = usable or parents
    return max(union, key=lambda genome: union[genome])


def judged(
    problem: SearchProblem,
    forward: Forward,
    encoding: EncodingSettings,
    manual: PromptGenome,
    choices: dict[str, PromptGenome],
) -> tuple[float, Any, dict[str, dict[str, Any]]]:
    """Per way: test gain of the choice, and of what the confirm part makes of it."""
    scorers = {name: PromptScorer(getattr(problem, name), forward, encoding) for name in ("confirm", "test")}
    names = list(choices)
    genomes = [manual, *(choices[name] for name in names)]
    confirmed, tested = (scorers[name].score(genomes, outcomes=True) for name in ("confirm", "test"))
    evidence = [Evidence(fitness=f, outcome=o) for f, o in zip(confirmed.fitness, confirmed.outcome, strict=True)]
    base = float(tested.outcome[0].mean())
    result = {}
    for place, name in enumerate(names, start=1):
        raw = float(tested.outcome[place].mean()) - base
        is_manual = genomes[place].fingerprint == manual.fingerprint
        kept = not is_manual and confirm(evidence[0], [evidence[place]]).chosen == 0
        result[name] = {"raw": raw, "confirmed": raw if kept else 0.0, "kept": kept}
    return base, tested.outcome[0], result


def overhead(
    loaded: Loaded, encoding: EncodingSettings, operators: OperatorSet, problem: SearchProblem, population: int
) -> dict[str, float]:
    """Share of a round that is neither scoring nor the text model's."""
    search = PromptSearch(
        problem,
        T5Forward(loaded.module.model),
        operators,
        SearchSettings(population=population, generations=5),
        encoding,
    )
    spent = {"scoring": 0.0, "text": 0.0}
    scorer, breeding = search.scorers["search"], operators._generators

    def timed(function: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*args: Any, **more: Any) -> Any:
            since = time.perf_counter()
            try:
                return function(*args, **more)
            finally:
                spent[name] += time.perf_counter() - since

        return call

    search._toolbox.register("evaluate", timed(scorer.score, "scoring"))
    before = dict(breeding)
    breeding |= {name: timed(generator, "text") for name, generator in before.items()}
    since = time.perf_counter()
    run_round({"task": search}, 1)
    total = time.perf_counter() - since
    breeding |= before
    return {"seconds": total, **spent, "bookkeeping_share": (total - sum(spent.values())) / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--tasks", type=int, default=20)
    parser.add_argument("--budget", type=int, default=2000, help="scorings a task and way")
    parser.add_argument("--population", type=int, default=32)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--wordings", choices=("train", "heldout", "all"), default="heldout")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        overrides = [f"checkpoint={args.checkpoint}", "task=none", "paths.output_dir=.", f"device={args.device}"]
        config = compose("search", overrides)
    loaded = Loaded(config)
    data, corpus = loaded.data, loaded.corpus
    forward, encoding = T5Forward(loaded.module.model), loaded.encoding()
    trained = [data.corpus.tasks[index] for index in data.task_indices]
    categories = {task.category for task in trained}
    heldout = [task for task in heldout_tasks(corpus, trained) if task.category in categories]
    donors = corpus_donors(data.corpus, data.task_indices)
    denoises = loaded.run.mixture.denoising > 0
    operators, infilling = (
        build_operators(weights, lambda: loaded.module.model, corpus.tokenizer, denoises=denoises)
        for weights in (None, {"infill_span": 1.0} if denoises else {"swap_phrases": 1.0})
    )
    tasks, seconds = [], dict.fromkeys(("search", "random", "gps", "first"), 0.0)
    for place in permute(len(heldout), stream_key(args.seed, "benchmark"), np.arange(len(heldout))).tolist():
        if len(tasks) == args.tasks:
            break
        try:
            pool = corpus_pool(corpus, heldout[place], args.wordings)
            problem = build_problem(pool, donors, population=args.population, k=args.k, seed=args.seed)
        except PoolError:
            continue
        choices, scorings = {}, {}
        for way in seconds:
            since = time.perf_counter()
            scorer = PromptScorer(problem.search, forward, encoding)
            if way == "search":
                settings = SearchSettings(
                    population=args.population, generations=1000, budget=args.budget, seed=args.seed
                )
                search = PromptSearch(problem, forward, operators, settings, encoding)
                run_round({"task": search}, 1)
                manual, scorer = search.manual.genome, search.scorers["search"]
                choices[way] = next((one.genome for one in search.finalists()), manual)
            elif way == "random":
                choices[way] = random_search(scorer, problem, operators, args.budget, args.seed)
            elif way == "gps":
                choices[way] = gps(scorer, problem, infilling, args.budget, args.seed)
            else:
                found = first_prompts(scorer, problem, args.budget)
                choices[way] = max(found, key=lambda genome: found[genome].mean())
            seconds[way] += time.perf_counter() - since
            scorings[way] = scorer.counts.scored
        base, outcomes, result = judged(problem, forward, encoding, manual, choices)
        chance = float(
            np.mean(
                [
                    problem.test.right[start:end].mean() if end > start else 0.0
                    for start, end in zip(
                        problem.test.option_offsets[:-1], problem.test.option_offsets[1:], strict=True
                    )
                ]
            )
        )
        above = beats_chance(int((outcomes > 0.5).sum()), len(outcomes), chance) if chance else bool(base > 0)
        tasks.append(
            {"task": problem.name, "kind": pool.kind, "manual": base, "chance": chance, "above_chance": above,
             "scorings": scorings, **result}
        )  # fmt: skip
        print(f"{problem.name}: manual {base:.3f}, " + ", ".join(f"{w} {result[w]['raw']:+.3f}" for w in result))
    summary = {}
    for way in seconds:
        for kind in ("raw", "confirmed"):
            gains = [task[way][kind] for task in tasks]
            low, high = bootstrap_interval(gains)
            summary[f"{way}_{kind}"] = {"mean_gain": float(np.mean(gains)), "low": low, "high": high}
        summary[f"{way}_kept"] = sum(task[way]["kept"] for task in tasks)
    report = {
        "machine": platform.processor() or platform.machine(),
        "torch": torch.__version__,
        "device": loaded.device,
        "parameters": loaded.module.model.num_parameters(),
        "settings": vars(args),
        "tasks_above_chance": sum(task["above_chance"] for task in tasks),
        "summary": summary,
        "seconds": seconds,
        "overhead_population_64": overhead(loaded, encoding, operators, problem, 64),
        "tasks": tasks,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()
