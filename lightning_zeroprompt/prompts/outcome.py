# SPDX-License-Identifier: Apache-2.0
"""What comes out of a search: the finalists against the best manual prompt, and a record of it for people and programs.

The manual prompt is chosen on the search part, like the finalists; the decision between them is made on the confirm
part (:mod:`~lightning_zeroprompt.prompts.confirm`); the test part is scored once, when the choice is made, and decides
nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from lightning_zeroprompt.prompts.confirm import Confirmation, Evidence, confirm
from lightning_zeroprompt.prompts.fitness import PromptScores
from lightning_zeroprompt.prompts.lineage import ancestors
from lightning_zeroprompt.prompts.operators import Candidate
from lightning_zeroprompt.prompts.pool import ExamplePool
from lightning_zeroprompt.prompts.problem import rows_fingerprint
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.significance import bootstrap_interval

__all__ = ["Choice", "choose_prompt", "search_record"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """The decision after a round.

    Attributes:
        manual: The manual prompt that was best on the search part.
        finalists: Those of the search, best first, as far as their scores are finite.
        confirmation: What the confirm part says of them; None where the manual prompt's own scores are not finite.
    """

    manual: Candidate
    finalists: tuple[Candidate, ...]
    confirmation: Confirmation | None

    @property
    def kept(self) -> bool:
        """Whether a finalist takes the manual prompt's place."""
        return self.confirmation is not None and self.confirmation.chosen is not None

    @property
    def chosen(self) -> Candidate:
        """The prompt to use."""
        index = None if self.confirmation is None else self.confirmation.chosen
        return self.manual if index is None else self.finalists[index]

    @property
    def evolved(self) -> Candidate | None:
        """The prompt to compare with the manual one: the one that is kept, else the best finalist."""
        return self.chosen if self.kept else self.finalists[0] if self.finalists else None


def choose_prompt(search: PromptSearch) -> Choice:
    """Decide on the confirm part between the best manual prompt and the finalists.

    Args:
        search: After a round.
    """
    settings, manual, finalists = search.settings, search.manual, search.finalists()
    scores = search.scorers["confirm"].score([c.genome for c in (manual, *finalists)], outcomes=True)
    usable = [bool(np.isfinite(row).all()) for row in scores.fitness]
    if not usable[0]:
        return Choice(manual=manual, finalists=(), confirmation=None)
    evidence = [Evidence(fitness=f, outcome=o) for f, o in zip(scores.fitness, scores.outcome, strict=True)]
    places = [place for place in range(1, len(evidence)) if usable[place]]
    confirmation = confirm(evidence[0], [evidence[place] for place in places], alpha=settings.alpha)
    return Choice(manual=manual, finalists=tuple(finalists[place - 1] for place in places), confirmation=confirmation)


def search_record(search: PromptSearch, choice: Choice, *, with_test: bool) -> dict[str, Any]:
    """The result of a search, plain JSON data.

    Args:
        search: After a round.
        choice: Of :func:`choose_prompt`.
        with_test: Whether the test part is scored now: once, when nothing is decided any more.

    Returns:
        ``task``, ``mode``, ``kept``, ``prompt`` (the one to use), ``manual`` and ``evolved`` (each: genome, text,
        origin), ``scores`` (part -> prompt -> fitness and outcome; on confirm also the tests), ``lineage`` of what is
        shown, sizes, seeds, counts and the history of the search.
    """
    problem, parts = search.problem, search.problem.parts
    shown = {"manual": choice.manual}
    if choice.evolved is not None:
        shown["evolved"] = choice.evolved
    scores: dict[str, Any] = {"search": _means(shown, search.scorers["search"].score(_genomes(shown), outcomes=True))}
    scores["confirm"] = _confirmed(choice)
    keys = [candidate.genome.fingerprint for candidate in shown.values()]
    return {
        "task": problem.name,
        "kind": problem.test.kind,
        "metric": "accuracy" if problem.test.kind == "choice" else problem.test.metric,
        "mode": parts.mode,
        "labels_used": 0 if parts.mode == "zero_label" else parts.k,
        "counted": parts.counted,
        "kept": choice.kept,
        "prompt": _prompt(choice.chosen),
        **{name: _prompt(candidate) for name, candidate in shown.items()},
        "scores": scores | {"test": _tested(search, choice) if with_test else None},
        "rows": {name: len(getattr(parts, name)) for name in ("search", "confirm", "test")},
        "k": parts.k,
        "test_rows": rows_fingerprint(problem.test),
        "seeds": {"parts": parts.seed, "search": search.settings.seed},
        "chance": _chance(problem.test),
        "model_step": search.step,
        "rounds": search.round,
        "generations": search.generation,
        "scorings": {name: scorer.counts.scored for name, scorer in search.scorers.items()},
        "discarded": dict(search.discarded),
        "lineage": ancestors(search.lineage, keys),
        "history": [dict(entry) for entry in search.history],
    }


def _genomes(shown: dict[str, Candidate]) -> list[Any]:
    return [candidate.genome for candidate in shown.values()]


def _prompt(candidate: Candidate) -> dict[str, Any]:
    return {
        "genome": candidate.genome.to_dict(),
        "text": candidate.genome.text,
        "origin": candidate.origin,
        "fingerprint": candidate.genome.fingerprint,
    }


def _means(shown: dict[str, Candidate], scores: PromptScores) -> dict[str, dict[str, float]]:
    return {
        name: {"fitness": float(fitness.mean()), "outcome": float(outcome.mean())}
        for name, fitness, outcome in zip(shown, scores.fitness, scores.outcome, strict=True)
    }


def _confirmed(choice: Choice) -> dict[str, Any] | None:
    found = choice.confirmation
    if found is None:
        return None
    record: dict[str, Any] = {"manual": {"fitness": found.manual_fitness, "outcome": found.manual_outcome}}
    compared = list(zip(choice.finalists, found.comparisons, strict=True))
    for candidate, comparison in compared:
        if candidate is choice.evolved:
            record["evolved"] = _comparison(comparison)
    record["finalists"] = [{"text": one.genome.text, **_comparison(comparison)} for one, comparison in compared]
    return record | {"alpha": found.alpha, "decided_by": found.decided_by}


def _comparison(comparison: Any) -> dict[str, Any]:
    return {
        "fitness": comparison.fitness,
        "outcome": comparison.outcome,
        "wins": comparison.outcome_test.wins,
        "losses": comparison.outcome_test.losses,
        "p": comparison.outcome_test.p_value,
        "p_adjusted": comparison.adjusted_p,
        "p_fitness": comparison.fitness_test.p_value,
        "passed": comparison.passed,
    }


def _tested(search: PromptSearch, choice: Choice) -> dict[str, Any]:
    """The manual prompt and the one to use on the test part, with a 95 % interval of the gain."""
    shown: dict[str, Candidate] = {"manual": choice.manual, "prompt": choice.chosen}
    scores = search.scorers["test"].score(_genomes(shown), outcomes=True)
    gains: Sequence[float] = (scores.outcome[1] - scores.outcome[0]).tolist()
    low, high = bootstrap_interval(gains) if np.isfinite(gains).all() else (float("nan"), float("nan"))
    return _means(shown, scores) | {"gain": float(np.mean(gains)), "gain_low": low, "gain_high": high}


def _chance(pool: ExamplePool) -> float:
    """Mean share of right options; 0 for free answers."""
    if pool.kind != "choice":
        return 0.0
    owners = np.repeat(np.arange(len(pool)), pool.num_options)
    return float((np.bincount(owners, weights=pool.right, minlength=len(pool)) / pool.num_options).mean())
