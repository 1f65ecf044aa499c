# SPDX-License-Identifier: Apache-2.0
"""Is one prompt better than another, or than chance? Exact tests and intervals without scipy.

Two prompts are scored on the same examples, so the tests are paired and look at the differences' signs alone. That is
the *sign test*; on outcomes of 0 and 1 it is *McNemar's exact test* (ties are the concordant pairs, which say
nothing). It assumes no distribution, and log-likelihood margins have heavy tails, for which a t-test on 32 examples
would not keep its level. Several finalists are held to one error rate by *Holm's* step-down (Holm 1979). How large a
gain is comes from a *bootstrap* over the examples; whether accuracy beats chance from *Clopper and Pearson's* interval
(1934), which never covers less than it says.

Alternatives: the paired permutation test on the mean has more power and needs sampling beyond 20 examples;
``scipy.stats`` has all of these and is no dependency.

Cost: 27 microseconds a sign test of 100 examples, 0.6 ms a Clopper-Pearson interval of 32 (3.5 ms of 200), 26 ms a
bootstrap of 1,000 values (processor time, one busy core).
"""

import dataclasses
import functools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

__all__ = [
    "PairedTest",
    "beats_chance",
    "binomial_tail",
    "bootstrap_interval",
    "clopper_pearson",
    "holm",
    "sign_test",
    "sign_tests",
]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class PairedTest:
    """A one-sided sign test.

    Attributes:
        wins: Pairs in which the candidate is above.
        losses: Pairs in which it is below.
        ties: Pairs without a difference; the test leaves them out.
        p_value: Probability of so many wins or more if both were equally good.
    """

    wins: int
    losses: int
    ties: int
    p_value: float


@functools.lru_cache(maxsize=1 << 14)
def binomial_tail(successes: int, trials: int, probability: float = 0.5) -> float:
    """Probability of ``successes`` or more in ``trials`` independent trials.

    Sums exact terms by logarithms of the gamma function; relative error below 1e-10 up to 100,000 trials.

    Raises:
        ValueError: A count or probability out of range.

    Example:
        >>> round(binomial_tail(9, 10), 6)
        0.010742
    """
    if not 0 <= successes <= trials or not 0 <= probability <= 1:
        raise ValueError(f"{successes} successes of {trials} trials with probability {probability}: out of range")
    if successes == 0 or probability == 1:
        return 1.0
    if probability == 0:
        return 0.0
    whole = math.lgamma(trials + 1)
    log_p, log_q = math.log(probability), math.log1p(-probability)
    return min(
        1.0,
        math.fsum(
            math.exp(whole - math.lgamma(n + 1) - math.lgamma(trials - n + 1) + n * log_p + (trials - n) * log_q)
            for n in range(successes, trials + 1)
        ),
    )


def sign_test(candidate: npt.ArrayLike, baseline: npt.ArrayLike) -> PairedTest:
    """Test one-sided whether the candidate is better; on outcomes of 0 and 1 this is McNemar's exact test.

    Args:
        candidate: [n], scores of the examples, larger is better.
        baseline: [n], scores of the same examples.

    Raises:
        ValueError: Lists of different lengths, none, or a number that is not finite.

    Example:
        >>> test = sign_test([3, 2, 1, 5], [1, 1, 1, 1])
        >>> test.wins, test.losses, test.ties, round(test.p_value, 6)
        (3, 0, 1, 0.125)
    """
    first, second = np.asarray(candidate, dtype=np.float64), np.asarray(baseline, dtype=np.float64)
    if first.ndim != 1 or first.shape != second.shape or not first.size:
        raise ValueError(
            f"scores of shapes {first.shape} and {second.shape}; a paired test needs one of each an example"
        )
    if not (np.isfinite(first).all() and np.isfinite(second).all()):
        raise ValueError("a score is not finite; leave prompts with such scores out before they are compared")
    wins, losses = int((first > second).sum()), int((first < second).sum())
    p_value = binomial_tail(wins, wins + losses)
    return PairedTest(wins=wins, losses=losses, ties=len(first) - wins - losses, p_value=p_value)


def sign_tests(candidate: npt.ArrayLike, baselines: npt.ArrayLike) -> list[float]:
    """P-values of :func:`sign_test` for one candidate against each of several baselines.

    Args:
        candidate: [n], finite scores.
        baselines: [m, n], finite scores of the same examples.

    Example:
        >>> sign_tests([1, 1], [[0, 1], [0, 0]]) == [sign_test([1, 1], row).p_value for row in ([0, 1], [0, 0])]
        True
    """
    first, rows = np.asarray(candidate, dtype=np.float64), np.asarray(baselines, dtype=np.float64)
    wins, losses = (first > rows).sum(1).tolist(), (first < rows).sum(1).tolist()
    return [binomial_tail(won, won + lost) for won, lost in zip(wins, losses, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values so that all together err with the stated probability at most (Holm 1979).

    Args:
        p_values: In any order.

    Returns:
        In the same order; an adjusted value below alpha is a finding at the level alpha of the family.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def bootstrap_interval(
    values: npt.ArrayLike, *, confidence: float = 0.95, resamples: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a mean, such as a gain over examples or tasks.

    Args:
        values: [n].
        confidence: Coverage, between 0 and 1.
        resamples: Means that are drawn.
        seed: Of the draws.

    Raises:
        ValueError: No values, or a confidence out of range.

    Example:
        >>> bootstrap_interval([1.0, 1.0, 1.0])
        (1.0, 1.0)
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.ndim != 1 or not sample.size or not 0 < confidence < 1:
        raise ValueError(f"values of shape {sample.shape}, confidence {confidence}: give a list, and a share below 1")
    generator = np.random.default_rng(seed)
    draws = (sample[generator.integers(len(sample), size=len(sample))].mean() for _ in range(resamples))
    tail = 50 * (1 - confidence)
    low, high = np.percentile(np.fromiter(draws, np.float64, resamples), [tail, 100 - tail])
    return float(low), float(high)


def clopper_pearson(successes: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Two-sided exact interval of a probability (Clopper and Pearson 1934).

    Raises:
        ValueError: No trials, or a count or confidence out of range.

    Example:
        >>> [round(end, 3) for end in clopper_pearson(20, 32)]
        [0.437, 0.789]
    """
    if trials < 1 or not 0 <= successes <= trials or not 0 < confidence < 1:
        raise ValueError(f"{successes} successes of {trials} trials, confidence {confidence}: out of range")
    tail = (1 - confidence) / 2

    def solve(count: int, level: float) -> float:
        """The probability at which ``count`` or more successes have the probability ``level``."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if binomial_tail(count, trials, middle) < level else (low, middle)
        return (low + high) / 2

    return (
        0.0 if successes == 0 else solve(successes, tail),
        1.0 if successes == trials else solve(successes + 1, 1 - tail),
    )


def beats_chance(successes: int, trials: int, chance: float, confidence: float = 0.95) -> bool:
    """Whether accuracy is above chance, by a one-sided exact binomial test.

    Args:
        successes: Right answers.
        trials: All answers.
        chance: Mean probability of a right answer by guessing; where it differs between examples, the mean makes the
            test careful (Hoeffding 1956).
        confidence: One less the level of the test.

    Example:
        >>> beats_chance(22, 32, 0.5), beats_chance(20, 32, 0.5)
        (True, False)
    """
    return binomial_tail(successes, trials, chance) < 1 - confidence
