# SPDX-License-Identifier: Apache-2.0
"""The methods that ``prompt_search.py`` compares, each under one budget of (prompt, example) scorings.

* ``genetic``: :class:`~lightning_zeroprompt.prompts.search.PromptSearch` as it is.
* ``random``: the same operators and first prompts without selection: parents are drawn evenly from all prompts so far,
  every prompt is scored on the whole search part.
* ``random+race``: the same, as many prompts as one race over the search part can hold.
* ``gps``: the procedure of GPS's released code (arXiv 2210.17041): the best K by accuracy on the search part are the
  only parents, their children by sentence continuation the whole next generation, and all that were ever kept are
  ranked by accuracy in the end. K is the number of manual prompts, as in the release. The continuation is written by
  the model that is searched with: the gap between the quotes is filled as in span corruption. The release's filters for
  single templates have no place here, its general ones are kept.
* ``gps+operators``: the same procedure with our operators in place of the continuation, for a model that continues
  nothing usable: what the procedure alone is worth.
* ``gepa``: the library's loop (Pareto parents, minibatches of three, whole search part), ``gepa.optimize``. Its
  reflection asks a chat model to read examples and to answer between backticks; a text-to-text model of this size can
  read neither that prompt nor answer so, hence new texts come from the same span infilling as ``infill_span``'s. Its
  metric is the sigmoid of the margin (free answers: a token's probability), which moves where accuracy does not.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np

from lightning_zeroprompt.prompts.encoding import EncodingSettings
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import Forward
from lightning_zeroprompt.prompts.generators import SpanInfiller, cut_continuation
from lightning_zeroprompt.prompts.genome import LiteralPart, PromptGenome
from lightning_zeroprompt.prompts.operators import Couple, OperatorSet, TextGenerator, TextRequest
from lightning_zeroprompt.prompts.phrases import split_phrases
from lightning_zeroprompt.prompts.problem import SearchProblem
from lightning_zeroprompt.prompts.racing import Race, RaceSettings, run_race
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings

__all__ = ["METHODS", "Arena", "Ranking", "ranked_with_manual"]

T = TypeVar("T")

_BATCH = 16
_HALL_OF_FAME = SearchSettings().hall_of_fame
_GPS_GENERATIONS = 4
_IDLE = 200


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What a method found.

    Attributes:
        prompts: By the method's own measure on the search part, best first; manual ones too.
        spent: Scorings.
        tried: Distinct prompts that were scored.
    """

    prompts: list[PromptGenome]
    spent: int
    tried: int


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Arena:
    """What every method gets.

    Attributes:
        problem: The task.
        forward: The model.
        encoding: Its limits.
        operators: The operators, span infilling by the model included.
        infiller: The model's span infilling.
        population: Of the genetic search.
        budget: Scorings on the search part, those of the manual prompts included.
        seed: Of all draws.
        max_tokens: Padded tokens of a scoring batch.
    """

    problem: SearchProblem
    forward: Forward
    encoding: EncodingSettings
    operators: OperatorSet
    infiller: SpanInfiller
    population: int
    budget: int
    seed: int
    max_tokens: int

    def scorer(self) -> PromptScorer:
        """A fresh scorer of the search part; its counts are what was spent."""
        return PromptScorer(self.problem.search, self.forward, self.encoding, max_tokens=self.max_tokens)

    @property
    def manual(self) -> list[PromptGenome]:
        """The task's own prompts."""
        return [candidate.genome for candidate in self.problem.manual]


def _ranked(prompts: Sequence[T], values: Any) -> list[T]:
    """Best first; of equals the one that was there first; refused ones left out."""
    order = sorted((-float(value), place) for place, value in enumerate(values) if math.isfinite(value))
    return [prompts[place] for _, place in order]


def ranked_by_outcome(scorer: PromptScorer, prompts: Sequence[PromptGenome]) -> list[PromptGenome]:
    """How our search takes its finalists: the best few by mean fitness, put in order by their outcomes."""
    means = scorer.score(prompts).fitness.mean(1, dtype=np.float64)
    best = _ranked(prompts, means)[:_HALL_OF_FAME]
    return _ranked(best, scorer.score(best, outcomes=True).outcome.mean(1, dtype=np.float64)) if best else []


def ranked_with_manual(scorer: PromptScorer, prompts: Sequence[PromptGenome], arena: "Arena") -> list[PromptGenome]:
    """The finalists and all manual prompts by outcome, then fitness."""
    chosen = list(dict.fromkeys([*ranked_by_outcome(scorer, prompts), *arena.manual]))
    scores = scorer.score(chosen, outcomes=True)
    by_fitness = _ranked(range(len(chosen)), scores.fitness.mean(1, dtype=np.float64))
    outcome = scores.outcome.mean(1, dtype=np.float64)
    return [chosen[at] for at in _ranked(by_fitness, [outcome[at] for at in by_fitness])]


def genetic(arena: Arena) -> Ranking:
    settings = SearchSettings(population=arena.population, generations=1000, budget=arena.budget, seed=arena.seed)
    search = PromptSearch(
        arena.problem, arena.forward, arena.operators, settings, arena.encoding, max_tokens=arena.max_tokens
    )
    search.begin(0)
    while search.advance():
        pass
    scorer = search.scorers["search"]
    # All of them have been scored on the whole part: this costs nothing.
    ranking = ranked_with_manual(scorer, [one.candidate.genome for one in search.hall], arena)
    return Ranking(prompts=ranking, spent=scorer.counts.scored, tried=len(scorer.state_dict()["keys"]))


class _Walk:
    """Prompts by random operators on random parents, without end."""

    def __init__(self, arena: Arena, scorer: PromptScorer) -> None:
        self._arena, self._scorer = arena, scorer
        self._rng = random.Random(f"{arena.seed} {arena.problem.name} walk")
        self.made: dict[str, PromptGenome] = {}
        self._add([candidate.genome for candidate in arena.problem.start])

    def _add(self, genomes: Sequence[PromptGenome]) -> None:
        for genome, reason in zip(genomes, self._scorer.refusals(genomes), strict=True):
            if reason is None:
                self.made.setdefault(genome.fingerprint, genome)

    def grow(self, count: int) -> list[PromptGenome]:
        """The first ``count`` prompts; fewer where the operators find no more."""
        for _ in range(_IDLE):
            if len(self.made) >= count:
                break
            parents = list(self.made.values())
            couples = [
                Couple((self._rng.choice(parents), self._rng.choice(parents)), self._arena.problem.material)
                for _ in range(_BATCH)
            ]
            bred = self._arena.operators.breed(couples, self._rng)
            self._add([child.genome for child in bred if child is not None])
        return list(self.made.values())[:count]


def random_search(arena: Arena) -> Ranking:
    scorer = arena.scorer()
    prompts = _Walk(arena, scorer).grow(arena.budget // len(arena.problem.search))
    ranking = ranked_with_manual(scorer, prompts, arena)
    return Ranking(prompts=ranking, spent=scorer.counts.scored, tried=len(prompts))


def random_race(arena: Arena) -> Ranking:
    scorer, size, settings = arena.scorer(), len(arena.problem.search), RaceSettings()
    scorer.score(arena.manual)
    blocks = settings.blocks(size)

    def price(count: int) -> int:
        places = [max(math.ceil(count * settings.keep**at), settings.finalists) for at in range(len(blocks))]
        return sum(place * (end - first) for place, (first, end) in zip(places, blocks, strict=True))

    left, count = arena.budget - scorer.counts.scored, len(arena.manual)
    while price(count + 1) <= left:
        count += 1
    prompts = _Walk(arena, scorer).grow(count)
    race = Race(len(prompts), size, settings)

    def chosen(indices: Sequence[int]) -> list[PromptGenome]:
        return [prompts[index] for index in indices]

    run_race(
        race,
        lambda indices, rows: scorer.score(chosen(indices), rows).fitness,
        cost=lambda indices, rows: scorer.num_new(chosen(indices), rows),
        budget=left,
    )
    # The manual prompts have been scored on everything, whether they stayed in the race or not.
    finished = [prompts[entry.candidate] for entry in race.standings() if entry.seen == size]
    ranking = ranked_with_manual(scorer, finished, arena)
    return Ranking(prompts=ranking, spent=scorer.counts.scored, tried=len(prompts))


class _Continuation:
    """GPS's sentence continuation by span infilling; a :class:`TextGenerator`."""

    def __init__(self, infiller: SpanInfiller) -> None:
        self._infiller = infiller

    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        texts = [request.text.replace('"', "'") for request in requests]
        frames = [
            TextRequest(
                f'Task: Write two question that ask the same thing. Question 1: "{text}" Question 2: "', behind='"'
            )
            for text in texts
        ]
        written = self._infiller(frames, seed=seed)
        cut = [[cut_continuation(text, one + '"') for one in found] for text, found in zip(texts, written, strict=True)]
        return [[one for one in found if one is not None] for found in cut]


def gps(arena: Arena) -> Ranking:
    generators: dict[str, TextGenerator] = {"continuation": _Continuation(arena.infiller)}
    return _gps(arena, OperatorSet({"continue_sentence": 1.0}, generators=generators))


def gps_operators(arena: Arena) -> Ranking:
    return _gps(arena, arena.operators)


def _gps(arena: Arena, operators: OperatorSet) -> Ranking:
    scorer, size = arena.scorer(), len(arena.problem.search)
    rng = random.Random(f"{arena.seed} {arena.problem.name} gps")
    generation, tried = arena.manual, len(arena.manual)
    keep = len(generation)
    children = max((arena.budget - keep * size) // (size * _GPS_GENERATIONS), 1)
    kept: dict[str, tuple[PromptGenome, float]] = {}
    for _ in range(_GPS_GENERATIONS + 1):
        accuracy = scorer.score(generation, outcomes=True).outcome.mean(1, dtype=np.float64)
        value = {genome.fingerprint: float(mean) for genome, mean in zip(generation, accuracy, strict=True)}
        parents = _ranked(generation, accuracy)[:keep]
        kept.update({parent.fingerprint: (parent, value[parent.fingerprint]) for parent in parents})
        room = min(children, (arena.budget - scorer.counts.scored) // size)
        if room < 1 or not parents:
            break
        # As in the release, every parent has as many continuations as the others; here as many as the budget pays for.
        couples = [
            Couple((parents[at % len(parents)], rng.choice(parents)), arena.problem.material) for at in range(2 * room)
        ]
        bred = [child.genome for child in operators.breed(couples, rng) if child is not None]
        fresh = {genome.fingerprint: genome for genome in bred}
        usable = [
            genome for genome, why in zip(fresh.values(), scorer.refusals(list(fresh.values())), strict=True) if not why
        ]
        generation = usable[:room] or parents
        tried += len(usable[:room])
    prompts, values = [genome for genome, _ in kept.values()], [mean for _, mean in kept.values()]
    return Ranking(prompts=_ranked(prompts, values), spent=scorer.counts.scored, tried=tried)


class _Adapter:
    """The task as GEPA sees it: components are the literal texts of the manual prompt that is best on the search part.

    Args:
        arena: What every method gets.
        scorer: Counts the scorings.
        base: That prompt.
    """

    def __init__(self, arena: Arena, scorer: PromptScorer, base: PromptGenome) -> None:
        self._infiller, self._scorer, self._base = arena.infiller, scorer, base
        self._rng = random.Random(f"{arena.seed} {arena.problem.name} gepa")
        self.parts = {f"{part.slot} {part.index}": part for part in base.literals()}

    def genome(self, candidate: dict[str, str]) -> PromptGenome:
        """The prompt of a candidate."""
        genome = self._base
        for name, part in self.parts.items():
            genome = genome.with_literal(LiteralPart(part.slot, part.index, part.text), candidate[name] or " ")
        return genome

    def evaluate(self, batch: list[int], candidate: dict[str, str], capture_traces: bool = False) -> Any:
        """Score a candidate on rows of the search part; what is refused scores 0."""
        from gepa.core.adapter import EvaluationBatch

        fitness = self._scorer.score([self.genome(candidate)], batch).fitness[0].astype(np.float64)
        bounded = np.clip(fitness, -50, 50)
        # A probability: of the right option against the best wrong one, or, of free answers, a token's.
        chance = 1 / (1 + np.exp(-bounded)) if self._scorer.pool.kind == "choice" else np.exp(bounded)
        values = np.where(np.isfinite(fitness), chance, 0.0).tolist()
        return EvaluationBatch(outputs=values, scores=values, trajectories=values if capture_traces else None)

    def make_reflective_dataset(
        self, candidate: dict[str, str], eval_batch: Any, components_to_update: list[str]
    ) -> dict[str, list[dict[str, Any]]]:
        """Nothing that the infilling would read."""
        return {name: [{"score": value} for value in eval_batch.scores] for name in components_to_update}

    def propose_new_texts(
        self, candidate: dict[str, str], reflective_dataset: Any, components_to_update: list[str]
    ) -> dict[str, str]:
        """Fill a gap in each text."""
        new = {}
        for name in components_to_update:
            phrases = split_phrases(candidate[name])
            first = self._rng.randint(0, len(phrases))
            if len(phrases) > 1 and first < len(phrases) and self._rng.random() < 0.5:
                before, behind = phrases.around(first, first + 1)
            else:
                before, behind = phrases.opened(first)
            found = self._infiller([TextRequest(before, behind)], seed=self._rng.getrandbits(63))[0]
            new[name] = before + found[0] + behind if found else candidate[name]
        return new


class _Silent:
    def log(self, message: str) -> None:
        """Say nothing."""


def gepa(arena: Arena) -> Ranking:
    import gepa as library

    scorer, rows = arena.scorer(), list(range(len(arena.problem.search)))
    ranked = ranked_with_manual(scorer, arena.manual, arena)
    adapter = _Adapter(arena, scorer, ranked[0])
    if not adapter.parts:
        return Ranking(prompts=ranked, spent=scorer.counts.scored, tried=len(ranked))
    turns = itertools.count(1)

    def is_spent(state: Any) -> bool:
        # Texts that repeat cost nothing: without a limit on turns some searches would hardly end.
        return scorer.counts.scored + len(rows) > arena.budget or next(turns) > arena.budget // 3

    result = library.optimize(
        seed_candidate={name: part.text for name, part in adapter.parts.items()},
        trainset=rows,
        valset=rows,
        adapter=adapter,
        stop_callbacks=is_spent,
        logger=_Silent(),
        seed=arena.seed,
        raise_on_exception=True,
    )
    found = _ranked([adapter.genome(one) for one in result.candidates], result.val_aggregate_scores)
    return Ranking(
        prompts=list(dict.fromkeys([*found, *ranked])),
        spent=scorer.counts.scored,
        tried=len(arena.manual) + result.total_metric_calls // len(rows),
    )


METHODS: dict[str, Callable[[Arena], Ranking]] = {
    "genetic": genetic,
    "random": random_search,
    "random+race": random_race,
    "gps": gps,
    "gps+operators": gps_operators,
    "gepa": gepa,
}
"""All methods."""
