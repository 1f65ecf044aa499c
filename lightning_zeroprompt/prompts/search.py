# SPDX-License-Identifier: Apache-2.0
r"""PromptSearch: a genetic search for one task's prompt, in rounds, each with the model of one training step.

A round scores the manual prompts on the whole search part, races the first prompts (in later rounds: the population,
the hall of fame and the manual prompts, all scored anew where the model has changed), and then makes generations of
(mu + lambda): parents are chosen, operators make children, parents and children race
(:mod:`~lightning_zeroprompt.prompts.racing`), and the best stay, among them always the elite of the hall of fame. GPS
(arXiv 2210.17041) keeps no parents and compares accuracies of 32 examples; why that is changed is said in the modules
that do it: margins in :mod:`~lightning_zeroprompt.prompts.fitness`, blocks in the race, the final choice in
:mod:`~lightning_zeroprompt.prompts.confirm`.

Parents are chosen by one of

* ``tournament``: the best of a few, by their place in the last race, the shorter one of equals;
* ``nsga2``: by chance among survivors of NSGA-II (Deb et al. 2002) over place and length: short prompts stay that a
  single objective would drop;
* ``pareto``: by lexicase over the examples, which chooses from the per-example Pareto front as GEPA (arXiv 2507.19457)
  does: a prompt that is best on a few examples becomes a parent though its mean is low.

DEAP does the choosing, the hall of fame and the statistics, and is imported here alone. Its operators use the global
random numbers: the search's own take their place for each call. Its types are plain subclasses here, since
``deap.creator`` would keep them in one module that two searches share. Scoring is registered as DEAP's ``map``: one
batched call for a block of the race.

The state is plain data and tensors (:meth:`PromptSearch.state_dict`) at the end of each generation: a search that is
killed and goes on from it finds the same prompts bit for bit, unless a time budget cut it.

Cost besides scoring and text models, population 64 and as many children: some 11 ms a generation (one core), 1.6 % of a
round with a model of 1.6M parameters, 0.4 % with one of 10M (docs/results/prompt_search.md).
"""

import collections
import contextlib
import copy
import dataclasses
import random
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from deap import base, tools

from lightning_zeroprompt.prompts.clock import TimeBudget
from lightning_zeroprompt.prompts.encoding import EncodingSettings
from lightning_zeroprompt.prompts.fitness import PromptScorer
from lightning_zeroprompt.prompts.forward import Forward
from lightning_zeroprompt.prompts.genome import PromptGenome
from lightning_zeroprompt.prompts.lineage import ancestors, diversity, origin_record
from lightning_zeroprompt.prompts.operators import Candidate, Couple, OperatorSet
from lightning_zeroprompt.prompts.parts import pseudo_labels
from lightning_zeroprompt.prompts.problem import SearchProblem
from lightning_zeroprompt.prompts.racing import Race, run_race
from lightning_zeroprompt.prompts.settings import SearchSettings

__all__ = ["PromptSearch", "Scored"]

_TRIES = 3
_FORMAT = 1


class _Place(base.Fitness):  # type: ignore[misc] # DEAP has no types
    """Place in the last race, then tokens: smaller is better."""

    weights = (-1.0, -1.0)


class _Score(base.Fitness):  # type: ignore[misc] # DEAP has no types
    """Mean fitness over the whole search part, then tokens."""

    weights = (1.0, -1.0)


@dataclasses.dataclass(slots=True, eq=False)
class Scored:
    """A prompt in the population or the hall of fame.

    Attributes:
        candidate: The prompt and its origin.
        tokens: Length of its literal text.
        age: Changes of the model since it was made or last was in the elite.
        seen: Examples of the search part that it was scored on in its last race.
        mean: Mean fitness over them.
        fitness: What DEAP compares.
    """

    candidate: Candidate
    tokens: int
    age: int = 0
    seen: int = 0
    mean: float = float("-inf")
    fitness: Any = dataclasses.field(default_factory=_Place)

    @property
    def key(self) -> str:
        """The prompt's fingerprint."""
        return self.candidate.genome.fingerprint

    def __deepcopy__(self, memo: dict[int, Any]) -> "Scored":
        # The hall of fame copies what enters it; candidates never change.
        return dataclasses.replace(self, fitness=copy.deepcopy(self.fitness))


@dataclasses.dataclass(slots=True)
class _Judged:
    """An individual under another fitness."""

    individual: Scored
    fitness: Any


@contextlib.contextmanager
def _global_random(rng: random.Random) -> Iterator[None]:
    """Let DEAP draw from ``rng``: it stands in for the global generator, which is as before afterwards."""
    before = random.getstate()
    random.setstate(rng.getstate())
    try:
        yield
    finally:
        rng.setstate(random.getstate())
        random.setstate(before)


class PromptSearch:
    """A search over one problem.

    Args:
        problem: The task.
        forward: Runs the model; which model it is may change between rounds.
        operators: How prompts change.
        settings: How the search goes.
        encoding: Limits and soft prompts.
        max_tokens: Padded tokens of a scoring batch.

    Attributes:
        scorers: Of the parts ``"search"``, ``"confirm"`` and ``"test"``.
        population: The survivors, the best of the last race first.
        history: One entry a generation: round, generation, model step, scorings so far, best, median and mean fitness
            of the population, the best manual prompt's, and diversity (mean share of words that two prompts do not
            have in common).
        discarded: Children that were not raced, by reason.
        lineage: What the population and the hall of fame descend from: fingerprint to genome, origin, parents,
            generation.

    Raises:
        ValueError: No manual prompt can be used, or the budget does not even pay for these.
    """

    def __init__(
        self,
        problem: SearchProblem,
        forward: Forward,
        operators: OperatorSet,
        settings: SearchSettings | None = None,
        encoding: EncodingSettings | None = None,
        *,
        max_tokens: int = 8192,
    ) -> None:
        self.problem, self.settings, self._operators = problem, settings or SearchSettings(), operators
        pools = {"search": problem.search, "confirm": problem.confirm, "test": problem.test}
        self.scorers = {
            name: PromptScorer(pool, forward, encoding, max_tokens=max_tokens, step=-1) for name, pool in pools.items()
        }
        self._check_manual()
        self._rng = random.Random(f"{self.settings.seed} {problem.name}")
        self._hall = tools.HallOfFame(self.settings.hall_of_fame, similar=lambda one, other: one.key == other.key)
        self._manual: dict[str, list[float]] = {}
        self._known: set[str] = set()
        self.population: list[Scored] = []
        self.history = tools.Logbook()
        self.discarded: collections.Counter[str] = collections.Counter()
        self.lineage: dict[str, dict[str, Any]] = {}
        self.step, self.round, self.generation, self._in_round, self._spent, self._is_open = -1, 0, 0, 0, 0, False
        self._breeding_seconds = 0.0
        self._toolbox = base.Toolbox()
        self._toolbox.register("evaluate", self.scorers["search"].score)
        self._toolbox.register("map", lambda score, individuals, rows: score(_genomes(individuals), rows).fitness)
        self._statistics = tools.Statistics(lambda individual: individual.mean)
        for name, function in (("best", max), ("median", statistics.median), ("mean", statistics.fmean)):
            self._statistics.register(name, function)

    def _check_manual(self) -> None:
        manual = [candidate.genome for candidate in self.problem.manual]
        reasons = self.scorers["search"].refusals(manual)
        if all(reason is not None for reason in reasons):
            raise ValueError(
                f"task {self.problem.name!r}: none of its {len(manual)} manual prompts can be used ({reasons[0]}); a "
                "search starts from them, mend one or give more room"
            )
        cost, budget = len(manual) * len(self.problem.search), self.settings.budget
        if budget is not None and budget < cost:
            raise ValueError(
                f"task {self.problem.name!r}: budget={budget} scorings, but the manual prompts alone take "
                f"{len(manual)} x {len(self.problem.search)} = {cost}; give more, or a smaller k"
            )

    # -- rounds ---------------------------------------------------------------------------------------------------

    @property
    def hall(self) -> list[Scored]:
        """The best prompts so far under the present model, scored on the whole search part, best first."""
        return list(self._hall)

    @property
    def manual(self) -> Candidate:
        """The manual prompt that is best on the search part by outcome, then fitness; before a round, the first."""
        return max(self.problem.manual, key=lambda one: self._manual.get(one.genome.fingerprint, []))

    def finalists(self) -> list[Candidate]:
        """The best prompts of the hall of fame that are not manual ones, by the rule that :attr:`manual` is chosen by.

        The hall of fame goes by fitness, which leads a search; what is used is to be right more often.
        """
        own = {candidate.genome.fingerprint for candidate in self.problem.manual}
        evolved = [one for one in self._hall if one.key not in own]
        if evolved:
            scores = self.scorers["search"].score(_genomes(evolved), outcomes=True)
            outcomes = np.nan_to_num(scores.outcome).mean(1, dtype=np.float64).tolist()
            order = sorted(range(len(evolved)), key=lambda place: -outcomes[place])
            evolved = [evolved[place] for place in order]
        return [one.candidate for one in evolved[: self.settings.finalists]]

    @property
    def is_open(self) -> bool:
        """Whether a round has begun and not ended."""
        return self._is_open

    def begin(self, step: int) -> None:
        """Begin a round with the model of a training step; a round that a saved state left open goes on instead.

        Scores of another step are dropped; everybody is a change of the model older then.

        Args:
            step: Of the model that ``forward`` runs.
        """
        if not (self._is_open and step == self.step):
            self.round, self._in_round, self._spent, self._is_open = self.round + 1, 0, 0, True
        if step != self.step:
            for scorer in self.scorers.values():
                scorer.set_step(step)
            for individual in (*self.population, *self._hall):
                individual.age += 1
            self._known = set()
        self.step = step
        if self.problem.parts.mode == "zero_label":
            self._relabel()

    def advance(self, clock: TimeBudget | None = None) -> bool:
        """Make one generation of the round; a round's first one is the race of what it starts from.

        Args:
            clock: The time that is left.

        Returns:
            Whether there was one: False when the round is over.
        """
        if not self._is_open:
            return False
        is_first = self._in_round == 0
        if not is_first and not self._affordable(clock):
            self._is_open = False
            return False
        if is_first:
            self._score_manual(clock)
            racing = self._restarted()
        else:
            since = time.perf_counter()
            racing = [*self.population, *self._children()]
            self._breeding_seconds = time.perf_counter() - since
        is_whole = self._race(racing, clock)
        self._in_round, self.generation = self._in_round + 1, self.generation + 1
        self._is_open = is_whole and self._in_round <= self.settings.generations
        self._record()
        return True

    def _relabel(self) -> None:
        manual = [candidate.genome for candidate in self.problem.manual]
        self._spent += self.scorers["search"].num_new(manual)
        for name in ("search", "confirm"):
            scorer = self.scorers[name]
            labels, _ = pseudo_labels(scorer.option_logprobs(manual), scorer.pool.num_options)
            scorer.relabel(labels)

    def _affordable(self, clock: TimeBudget | None) -> bool:
        """Whether the first block of another generation's children still fits."""
        settings = self.settings
        children = settings.offspring or settings.population
        cost = children * min(settings.race.first_block, len(self.problem.search))
        if settings.budget is not None and self._spent + cost > settings.budget:
            return False
        return clock is None or clock.allows(cost, self._breeding_seconds)

    def _score_manual(self, clock: TimeBudget | None) -> None:
        scorer, manual = self.scorers["search"], self.problem.manual
        genomes = [candidate.genome for candidate in manual]
        cost, since = scorer.num_new(genomes), time.perf_counter()
        scorer.score(genomes)
        if clock is not None:
            clock.took(cost, time.perf_counter() - since)
        self._spent += cost
        scores = scorer.score(genomes, outcomes=True)
        columns = (np.nan_to_num(scores.outcome), np.nan_to_num(scores.fitness, nan=-np.inf))
        found = np.stack([column.mean(1, dtype=np.float64) for column in columns], axis=1).tolist()
        self._manual = {one.genome.fingerprint: values for one, values in zip(manual, found, strict=True)}

    def _restarted(self) -> list[Scored]:
        """What a round starts from: the first prompts, or survivors that are not too old, and the manual prompts."""
        limit = self.settings.max_age
        kept = [*list(self._hall)[: self.settings.elite], *self.population, *self._hall]
        young = [
            dataclasses.replace(one, fitness=_Place())
            for place, one in enumerate(kept)
            if place < self.settings.elite or limit is None or one.age <= limit
        ]
        first = self.problem.manual if self.round > 1 else self.problem.start
        lengths = self._lengths([candidate.genome for candidate in first])
        fresh = [Scored(candidate, tokens) for candidate, tokens in zip(first, lengths, strict=True)]
        self._hall.clear()
        chosen: dict[str, Scored] = {}
        for one in (*young, *fresh):
            chosen.setdefault(one.key, one)
        return self._usable(list(chosen.values()))

    # -- a generation ---------------------------------------------------------------------------------------------

    def _children(self) -> list[Scored]:
        wanted = self.settings.offspring or self.settings.population
        children: dict[str, Scored] = {}
        for _ in range(_TRIES):
            missing = wanted - len(children)
            if missing <= 0:
                break
            with _global_random(self._rng):
                chosen = [one.candidate.genome for one in self._parents(2 * missing)]
            couples = [Couple((chosen[2 * i], chosen[2 * i + 1]), self.problem.material) for i in range(missing)]
            fresh: dict[str, Candidate] = {}
            for child in self._operators.breed(couples, self._rng):
                key = "" if child is None else child.genome.fingerprint
                if child is None:
                    self.discarded["no operator applies"] += 1
                elif key in self._known or key in children or key in fresh:
                    self.discarded["known already"] += 1
                else:
                    fresh[key] = child
            lengths = self._lengths([child.genome for child in fresh.values()])
            made = [Scored(child, tokens) for child, tokens in zip(fresh.values(), lengths, strict=True)]
            children |= {one.key: one for one in self._usable(made)}
        return list(children.values())

    def _parents(self, count: int) -> list[Scored]:
        settings = self.settings
        whole = [one for one in self.population if one.seen == len(self.problem.search)]
        if settings.selection == "pareto" and len(whole) > 1:
            values = self.scorers["search"].score(_genomes(whole)).fitness.tolist()
            cases = type("_Cases", (base.Fitness,), {"weights": (1.0,) * len(values[0])})
            judged = [_Judged(one, cases(row)) for one, row in zip(whole, values, strict=True)]
            return [one.individual for one in tools.selLexicase(judged, count)]
        if settings.selection == "nsga2":
            return list(tools.selRandom(self.population, count))
        return list(tools.selTournament(self.population, count, settings.tournament_size))

    def _usable(self, individuals: Sequence[Scored]) -> list[Scored]:
        """Those that are no bad prompts; all are known from now on."""
        reasons = self.scorers["search"].refusals(_genomes(individuals))
        self._known |= {one.key for one in individuals}
        self.discarded.update(reason.partition(":")[0] for reason in reasons if reason is not None)
        return [one for one, reason in zip(individuals, reasons, strict=True) if reason is None]

    def _lengths(self, genomes: Sequence[PromptGenome]) -> list[int]:
        return list(self.scorers["search"].num_tokens(genomes))

    def _race(self, racing: Sequence[Scored], clock: TimeBudget | None) -> bool:
        """Race, and let the best survive; whether the race came to its end with a survivor."""
        scorer, settings = self.scorers["search"], self.settings
        race = Race(len(racing), len(self.problem.search), settings.race)

        def cost(candidates: Sequence[int], rows: range) -> int:
            return scorer.num_new(_genomes([racing[index] for index in candidates]), rows)

        def score(candidates: Sequence[int], rows: range) -> Any:
            individuals = [racing[index] for index in candidates]
            before, since = scorer.counts.scored, time.perf_counter()
            values = self._toolbox.map(self._toolbox.evaluate, individuals, rows)
            if clock is not None:
                clock.took(scorer.counts.scored - before, time.perf_counter() - since)
            return values

        def is_late() -> bool:
            asked = race.ask()
            return clock is not None and asked is not None and not clock.allows(cost(*asked))

        left = None if settings.budget is None else settings.budget - self._spent
        if left is None or left > 0:
            self._spent += run_race(race, score, cost=cost, budget=left, should_stop=is_late)
        standing = []
        for place, entry in enumerate(race.standings()):
            individual = racing[entry.candidate]
            if entry.left == "refused":
                self.discarded["score is not finite"] += 1
            elif entry.seen:
                individual.seen, individual.mean = entry.seen, entry.mean
                individual.fitness.values = (place, individual.tokens)
                standing.append(individual)
        self._survive(standing)
        return bool(standing) and race.ask() is None

    def _survive(self, standing: Sequence[Scored]) -> None:
        settings = self.settings
        if not standing:
            return
        finished = [one for one in standing if one.seen == len(self.problem.search)]
        self._hall.update([dataclasses.replace(one, fitness=_Score((one.mean, one.tokens))) for one in finished])
        elite = {one.key for one in list(self._hall)[: settings.elite]}
        choose = tools.selNSGA2 if settings.selection == "nsga2" else tools.selBest
        chosen = [*(one for one in standing if one.key in elite), *choose(list(standing), settings.population)]
        kept = list({one.key: one for one in chosen}.values())[: settings.population]
        self.population = sorted(kept, key=lambda one: one.fitness, reverse=True)
        for one in (*self.population, *self._hall):
            if one.key in elite:
                one.age = 0
            if one.key not in self.lineage:
                self.lineage[one.key] = origin_record(one.candidate, self.generation)
        self.lineage = ancestors(self.lineage, [one.key for one in (*self.population, *self._hall)])

    # -- records --------------------------------------------------------------------------------------------------

    def _record(self) -> None:
        if self.population:
            found = {name: float(value) for name, value in self._statistics.compile(self.population).items()}
            self.history.record(
                round=self.round,
                generation=self.generation,
                step=self.step,
                scorings=self.scorers["search"].counts.scored,
                manual=self._manual[self.manual.genome.fingerprint][1],
                diversity=diversity([one.candidate.genome.text for one in self.population]),
                # The best of the whole part; the population's may have seen a few easy examples alone.
                **(found | ({"best": float(self._hall[0].mean)} if len(self._hall) else {})),
            )

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors, from which :meth:`load_state_dict` goes on."""
        version, numbers, gauss = self._rng.getstate()
        individuals = {one.key: one.candidate for one in (*self.population, *self._hall)}
        return {
            "format": _FORMAT,
            "problem": self.problem.fingerprint(),
            "counters": {
                "step": self.step,
                "round": self.round,
                "generation": self.generation,
                "in_round": self._in_round,
                "spent": self._spent,
                "is_open": self._is_open,
            },
            "random": [version, list(numbers), gauss],
            "candidates": {
                key: [candidate.genome.to_dict(), candidate.origin, list(candidate.parents)]
                for key, candidate in individuals.items()
            },
            "population": [_packed(one) for one in self.population],
            "hall": [_packed(one) for one in self._hall],
            "manual": {key: list(values) for key, values in self._manual.items()},
            "known": sorted(self._known),
            "discarded": dict(self.discarded),
            "history": [dict(entry) for entry in self.history],
            "lineage": copy.deepcopy(self.lineage),
            "scores": {name: scorer.state_dict() for name, scorer in self.scorers.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on as the search whose state it is would have.

        Raises:
            ValueError: The state is of another version, task, parts or first prompts.
        """
        if state["format"] != _FORMAT or state["problem"] != self.problem.fingerprint():
            raise ValueError(
                f"the saved search (format {state['format']}) is of other rows, modes or first prompts than task "
                f"{self.problem.name!r} has here (format {_FORMAT}); restore these, or start the search anew"
            )
        counters = state["counters"]
        self.step, self.round, self.generation = counters["step"], counters["round"], counters["generation"]
        self._in_round, self._spent, self._is_open = counters["in_round"], counters["spent"], counters["is_open"]
        version, numbers, gauss = state["random"]
        self._rng.setstate((version, tuple(numbers), gauss))
        candidates = {
            key: Candidate(PromptGenome.from_dict(genome), origin, tuple(parents))
            for key, (genome, origin, parents) in state["candidates"].items()
        }
        self.population = [_unpacked(entry, candidates, _Place) for entry in state["population"]]
        self._hall.clear()
        # Of two that are equal, the one that enters later stands first.
        self._hall.update([_unpacked(entry, candidates, _Score) for entry in reversed(state["hall"])])
        self._manual, self._known = {k: list(v) for k, v in state["manual"].items()}, set(state["known"])
        self.discarded = collections.Counter(state["discarded"])
        self.history[:] = [dict(entry) for entry in state["history"]]
        self.lineage = copy.deepcopy(dict(state["lineage"]))
        for name, scorer in self.scorers.items():
            scorer.load_state_dict(state["scores"][name])


def _genomes(individuals: Sequence[Scored]) -> list[PromptGenome]:
    return [individual.candidate.genome for individual in individuals]


def _packed(one: Scored) -> list[Any]:
    return [one.key, one.tokens, one.age, one.seen, one.mean, list(one.fitness.values)]


def _unpacked(entry: Sequence[Any], candidates: Mapping[str, Candidate], kind: type[Any]) -> Scored:
    key, tokens, age, seen, mean, values = entry
    return Scored(candidates[key], tokens, age, seen, mean, kind(values))
