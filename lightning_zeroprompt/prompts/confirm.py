# SPDX-License-Identifier: Apache-2.0
"""The final choice: is a found prompt really better than the best manual one?

A search looks at the best of thousands of scores, and the best of many noisy scores is too good (winner's curse). So
finalists are scored once more on examples that the search has not seen, and each is compared with the best manual
prompt by a one-sided exact test on the outcomes: of accuracies and exact matches McNemar's, of ROUGE-L the sign test,
held to one level by Holm over the finalists. A finalist is kept if its adjusted p-value is below alpha; of several the
one with the best outcome, then fitness. Otherwise the manual prompt stays.

The alternative is the sign test on the fitness (log-likelihood margin), which has a win or a loss in every example and
so finds something sooner; but a prompt that moves all margins a little and no answer passes it, and one that mends five
of forty answers may not. Which of the two gains more differed between models (docs/results/prompt_search.md); the other
one's p-value is reported, and it can be asked for. The manual prompt has to be chosen on the search part: chosen here,
it would be the lucky one.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt

from lightning_zeroprompt.prompts.significance import PairedTest, holm, sign_test

__all__ = ["Comparison", "Confirmation", "Evidence", "confirm"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """A prompt's scores on the confirm part.

    Attributes:
        fitness: [n], margin or log-likelihood of each example, larger is better.
        outcome: [n], accuracy (0 or 1), exact match or ROUGE-L of each example.
    """

    fitness: npt.NDArray[np.floating]
    outcome: npt.NDArray[np.floating]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One finalist against the manual prompt.

    Attributes:
        fitness: Mean fitness.
        outcome: Mean outcome.
        fitness_gain: Mean fitness less the manual prompt's.
        outcome_gain: Mean outcome less the manual prompt's.
        fitness_test: Sign test on the fitness.
        outcome_test: Sign test on the outcomes; McNemar's exact test where they are 0 and 1.
        adjusted_p: Holm's p-value of the test that decides.
        passed: Whether ``adjusted_p`` is below alpha and ``outcome_gain`` not negative.
    """

    fitness: float
    outcome: float
    fitness_gain: float
    outcome_gain: float
    fitness_test: PairedTest
    outcome_test: PairedTest
    adjusted_p: float
    passed: bool


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Confirmation:
    """What the confirm part says.

    Attributes:
        chosen: Index of the finalist that is kept; None: the manual prompt stays.
        manual_fitness: Mean fitness of the manual prompt.
        manual_outcome: Its mean outcome.
        comparisons: One a finalist, in their order.
        decided_by: Which test decides.
        alpha: Level of the family of tests.
        num_examples: Examples of the confirm part.
    """

    chosen: int | None
    manual_fitness: float
    manual_outcome: float
    comparisons: tuple[Comparison, ...]
    decided_by: Literal["fitness", "outcome"]
    alpha: float
    num_examples: int


def confirm(
    manual: Evidence,
    finalists: Sequence[Evidence],
    *,
    alpha: float = 0.05,
    decided_by: Literal["fitness", "outcome"] = "outcome",
) -> Confirmation:
    """Choose between the best manual prompt and the finalists of a search.

    Args:
        manual: The manual prompt's scores; the prompt chosen on the search part.
        finalists: Scores of the same examples; none is fine.
        alpha: Probability that any finalist is kept though none is better.
        decided_by: Which scores are tested.

    Raises:
        ValueError: An alpha out of range, an unknown test, or scores that cannot be compared.

    Example:
        >>> ones, zeros = np.ones(8), np.zeros(8)
        >>> confirm(Evidence(fitness=zeros, outcome=zeros), [Evidence(fitness=ones, outcome=ones)]).chosen
        0
    """
    if not 0 < alpha < 1 or decided_by not in ("fitness", "outcome"):
        raise ValueError(f"alpha={alpha}, decided_by={decided_by!r}: give a level below 1, and 'fitness' or 'outcome'")
    tests = [(sign_test(f.fitness, manual.fitness), sign_test(f.outcome, manual.outcome)) for f in finalists]
    adjusted = holm([pair[decided_by == "outcome"].p_value for pair in tests])
    base_fitness, base_outcome = float(np.mean(manual.fitness)), float(np.mean(manual.outcome))
    comparisons = []
    for finalist, (fitness_test, outcome_test), p_value in zip(finalists, tests, adjusted, strict=True):
        fitness, outcome = float(np.mean(finalist.fitness)), float(np.mean(finalist.outcome))
        comparisons.append(
            Comparison(
                fitness=fitness,
                outcome=outcome,
                fitness_gain=fitness - base_fitness,
                outcome_gain=outcome - base_outcome,
                fitness_test=fitness_test,
                outcome_test=outcome_test,
                adjusted_p=p_value,
                passed=p_value < alpha and outcome >= base_outcome,
            )
        )
    passed = [index for index, comparison in enumerate(comparisons) if comparison.passed]
    best = max(passed, key=lambda i: (comparisons[i].outcome, comparisons[i].fitness, -i), default=None)
    return Confirmation(
        chosen=best,
        manual_fitness=base_fitness,
        manual_outcome=base_outcome,
        comparisons=tuple(comparisons),
        decided_by=decided_by,
        alpha=alpha,
        num_examples=len(manual.fitness),
    )
