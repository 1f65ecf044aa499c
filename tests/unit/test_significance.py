# SPDX-License-Identifier: Apache-2.0
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest

from lightning_zeroprompt.prompts.confirm import Evidence, confirm
from lightning_zeroprompt.prompts.significance import (
    beats_chance,
    binomial_tail,
    bootstrap_interval,
    clopper_pearson,
    holm,
    sign_test,
)


def exact_tail(successes, trials, probability):
    p = Fraction(probability)
    return float(sum(math.comb(trials, n) * p**n * (1 - p) ** (trials - n) for n in range(successes, trials + 1)))


@pytest.mark.parametrize("probability", [0.5, 0.25, 0.9, 0.0, 1.0])
def test_the_tail_equals_a_sum_of_fractions(probability):
    for trials in (1, 2, 7, 40, 200):
        for successes in {0, 1, trials // 3, trials // 2, trials - 1, trials}:
            expected = exact_tail(successes, trials, probability)
            assert binomial_tail(successes, trials, probability) == pytest.approx(expected, rel=1e-10, abs=1e-300)


def test_the_sign_test_equals_all_sign_flips():
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(0, 4, 9), rng.integers(0, 4, 9)
        test = sign_test(first, second)
        kept = np.sign(first - second)[first != second]
        flips = [sum(1 for s in signs if s > 0) for signs in itertools.product((-1, 1), repeat=len(kept))]
        assert test.p_value == pytest.approx(np.mean([wins >= (kept > 0).sum() for wins in flips]))
        assert (test.wins, test.losses, test.ties) == ((kept > 0).sum(), (kept < 0).sum(), 9 - len(kept))


def test_the_sign_test_keeps_its_level():
    rng = np.random.default_rng(1)
    found = [sign_test(*rng.standard_cauchy((2, 32))).p_value < 0.05 for _ in range(2000)]
    assert np.mean(found) < 0.05


@pytest.mark.parametrize("scores", [([1, 2], [1]), ([], []), ([1, np.nan], [1, 2]), ([[1]], [[2]])])
def test_scores_that_make_no_pairs_are_refused(scores):
    with pytest.raises(ValueError, match=r"a paired test needs|not finite"):
        sign_test(*scores)


def test_holm_equals_its_definition():
    rng = np.random.default_rng(2)
    for _ in range(200):
        values = rng.random(rng.integers(1, 7)) ** 3
        adjusted = holm(values.tolist())
        for alpha in (0.01, 0.05, 0.3):
            rejected, ordered = set(), np.argsort(values, kind="stable")
            for rank, index in enumerate(ordered):
                if values[index] * (len(values) - rank) > alpha:
                    break
                rejected.add(index)
            assert {i for i, p in enumerate(adjusted) if p <= alpha} == rejected
    assert holm([]) == []


def test_the_exact_interval_covers_what_it_says_and_no_shorter_one_would():
    for successes, trials in ((0, 5), (5, 5), (3, 10), (20, 32), (150, 200)):
        low, high = clopper_pearson(successes, trials, 0.9)
        if successes:
            assert binomial_tail(successes, trials, low) == pytest.approx(0.05, abs=1e-9)
        if successes < trials:
            assert 1 - binomial_tail(successes + 1, trials, high) == pytest.approx(0.05, abs=1e-9)
        assert 0 <= low < high <= 1
    assert (clopper_pearson(0, 5)[0], clopper_pearson(5, 5)[1]) == (0, 1)


def test_beating_chance_agrees_with_the_interval():
    for trials in (16, 64):
        for successes in range(trials + 1):
            low, _ = clopper_pearson(successes, trials, 0.9)
            assert beats_chance(successes, trials, 0.5) == (low > 0.5)


def test_the_bootstrap_is_seeded_and_near_the_normal_interval():
    values = np.random.default_rng(3).normal(0.1, 1, 400)
    low, high = bootstrap_interval(values, seed=1)
    assert (low, high) == bootstrap_interval(values, seed=1) != bootstrap_interval(values, seed=2)
    error = values.std(ddof=1) / 20
    assert low == pytest.approx(values.mean() - 1.96 * error, abs=0.15 * error)
    assert high == pytest.approx(values.mean() + 1.96 * error, abs=0.15 * error)


def test_numbers_out_of_range_are_refused():
    for call in (
        lambda: binomial_tail(3, 2),
        lambda: binomial_tail(1, 2, 1.5),
        lambda: clopper_pearson(0, 0),
        lambda: clopper_pearson(1, 2, 1.0),
        lambda: bootstrap_interval([]),
        lambda: confirm(Evidence(fitness=np.ones(2), outcome=np.ones(2)), [], alpha=0),
    ):
        with pytest.raises(ValueError, match=r"out of range|give"):
            call()


def evidence(fitness, outcome):
    return Evidence(fitness=np.asarray(fitness, float), outcome=np.asarray(outcome, float))


def test_a_better_prompt_is_kept_and_of_several_the_best():
    n = 32
    manual = evidence(np.zeros(n), [0] * 16 + [1] * 16)
    slight = evidence(np.ones(n), [0] * 15 + [1] * 17)
    good = evidence(np.full(n, 0.5), [0] * 8 + [1] * 24)
    result = confirm(manual, [slight, good], decided_by="fitness")
    assert result.chosen == 1
    assert [c.passed for c in result.comparisons] == [True, True]
    assert result.comparisons[1].outcome_gain == pytest.approx(0.25)
    assert result.comparisons[1].outcome_test.p_value == pytest.approx(2**-8)
    assert result.comparisons[0].adjusted_p == pytest.approx(2 * 2**-32)
    assert (result.manual_outcome, result.num_examples) == (0.5, n)
    # One more right answer in 32 is nothing that outcomes can show.
    by_outcome = confirm(manual, [slight, good])
    assert (by_outcome.chosen, by_outcome.decided_by) == (1, "outcome")
    assert [c.adjusted_p for c in by_outcome.comparisons] == [pytest.approx(0.5), pytest.approx(2 * 2**-8)]
    assert confirm(manual, [slight]).chosen is None


def test_the_manual_prompt_stays_without_evidence_or_with_fewer_right_answers():
    rng = np.random.default_rng(4)
    manual = evidence(np.zeros(32), np.ones(32))
    noise = evidence(rng.normal(size=32), np.ones(32))
    worse = evidence(np.ones(32), [0] + [1] * 31)
    assert confirm(manual, [noise, worse]).chosen is None
    result = confirm(manual, [noise, worse], decided_by="fitness")
    assert result.chosen is None
    assert result.comparisons[1].adjusted_p < 0.05
    assert not result.comparisons[1].passed
    assert confirm(manual, []).chosen is None


def test_many_finalists_pass_only_by_the_adjusted_p_value():
    wins = evidence([1] * 12 + [-1] * 4, np.ones(16))
    manual = evidence(np.zeros(16), np.ones(16))
    assert confirm(manual, [wins], decided_by="fitness").chosen == 0
    others = [evidence(np.zeros(16), np.ones(16))] * 3
    assert confirm(manual, [wins, *others], decided_by="fitness").chosen is None


def test_luck_passes_no_more_often_than_alpha():
    rng = np.random.default_rng(5)
    kept = 0
    for _ in range(400):
        fitness = rng.normal(size=(6, 32))
        first, *others = [evidence(row, row > 0) for row in fitness]
        kept += confirm(first, others).chosen is not None
    assert kept / 400 < 0.05
