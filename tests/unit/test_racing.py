# SPDX-License-Identifier: Apache-2.0
import json

import numpy as np
import pytest

from lightning_zeroprompt.prompts.racing import Race, RaceSettings, run_race


def make_scores(candidates=64, examples=64, seed=0, spread=1.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(candidates, 1)) * spread + rng.normal(size=(candidates, examples))


def score_of(table):
    return lambda candidates, examples: table[np.ix_(candidates, examples)]


def test_the_race_finds_a_good_candidate_with_a_fraction_of_the_scorings():
    ranks, spent = [], []
    for seed in range(20):
        table = make_scores(seed=seed)
        race = Race(64, 64)
        spent.append(run_race(race, score_of(table)))
        winner = race.standings()[0].candidate
        ranks.append(int((table.mean(1) > table.mean(1)[winner]).sum()))
    assert np.mean(ranks) < 1
    assert max(spent) < 64 * 64 / 2


def test_finalists_see_everything_and_their_means_are_the_plain_ones():
    table = make_scores()
    race = Race(64, 64, RaceSettings(drop_p=0))
    run_race(race, score_of(table))
    standings = race.standings()
    alive = [entry for entry in standings if entry.left is None]
    # Three times half of them leave; who has seen everything stays.
    assert len(alive) == 8
    assert standings[:8] == alive
    for entry in standings:
        assert entry.mean == pytest.approx(table[entry.candidate, : entry.seen].mean())
        assert (entry.left is None) == (entry.seen == 64)
    assert sorted(entry.candidate for entry in standings) == list(range(64))


def test_halving_keeps_the_best_of_each_block():
    table = make_scores()
    race = Race(64, 64, RaceSettings(first_block=4, keep=0.25, finalists=2, drop_p=0))
    assert race.settings.blocks(64) == ((0, 4), (4, 20), (20, 64))
    seen = []
    while (asked := race.ask()) is not None:
        candidates, examples = asked
        seen.append(len(candidates))
        race.tell(table[np.ix_(candidates, examples)])
        means = table[candidates, : examples.stop].mean(1)
        following = race.ask()
        if following is not None:
            best = sorted(candidates[i] for i in np.argsort(-means, kind="stable")[: len(following[0])])
            assert following[0] == best
    assert seen == [64, 16, 4]


def test_the_test_drops_who_is_behind_and_nobody_else():
    table = np.zeros((3, 32))
    table[0], table[1, ::2] = 2.0, 3.0
    race = Race(3, 32, RaceSettings(first_block=16, keep=1, finalists=3, drop_p=0.02))
    run_race(race, score_of(table))
    # Candidate 1 is behind in the mean and level in the signs, candidate 2 behind in every example.
    assert [(e.candidate, e.left) for e in race.standings()] == [(0, None), (1, None), (2, "behind the leader")]
    assert race.standings()[2].seen == 16
    without = Race(3, 32, RaceSettings(first_block=16, keep=1, drop_p=0))
    run_race(without, score_of(table))
    assert all(entry.left is None for entry in without.standings())


def test_equal_candidates_keep_their_order():
    race = Race(8, 8, RaceSettings(first_block=4, finalists=2))
    run_race(race, score_of(np.zeros((8, 8))))
    assert [entry.candidate for entry in race.standings()[:2]] == [0, 1]


def test_refused_candidates_leave_and_come_last():
    table = make_scores(6, 16)
    table[2, 3], table[4, 12] = np.nan, np.inf
    race = Race(6, 16, RaceSettings(first_block=8, finalists=6, drop_p=0))
    run_race(race, score_of(table))
    last = race.standings()[-2:]
    assert {entry.candidate for entry in last} == {2, 4}
    assert all(e.left == "refused" for e in last)
    assert all(entry.mean == -np.inf for entry in last)
    nobody = Race(2, 8)
    run_race(nobody, score_of(np.full((2, 8), np.nan)))
    assert nobody.ask() is None
    assert [e.left for e in nobody.standings()] == ["refused"] * 2


@pytest.mark.parametrize("stop_after", [0, 1, 2, 3])
def test_a_race_goes_on_from_plain_data(stop_after):
    table = make_scores()
    whole = Race(64, 64)
    total = run_race(whole, score_of(table))
    race, blocks = Race(64, 64), iter(range(10))
    spent = run_race(race, score_of(table), should_stop=lambda: next(blocks) >= stop_after)
    again = Race.from_dict(json.loads(json.dumps(race.to_dict())))
    assert again.ask() == race.ask()
    assert spent + run_race(again, score_of(table)) == total
    assert again.standings() == whole.standings()


def test_a_budget_is_never_exceeded():
    table = make_scores()
    for budget in (1, 511, 512, 1000, 10_000):
        race = Race(64, 64)
        spent = run_race(race, score_of(table), budget=budget)
        assert spent <= budget
        assert (spent > 0) == (budget >= 512)
    # Pairs that are known already cost nothing.
    race = Race(64, 64)
    assert run_race(race, score_of(table), budget=1, cost=lambda candidates, examples: 0) == 0
    assert race.ask() is None


def test_impossible_races_are_refused():
    for settings in ({"first_block": 0}, {"keep": 0.0}, {"keep": 1.5}, {"finalists": 0}, {"drop_p": 1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
            RaceSettings(**settings)
    with pytest.raises(ValueError, match="0 candidates"):
        Race(0, 4)
    with pytest.raises(ValueError, match="budget=0"):
        run_race(Race(2, 4), score_of(np.zeros((2, 4))), budget=0)
    race = Race(2, 8)
    with pytest.raises(ValueError, match=r"the race wants \(2, 8\)"):
        race.tell(np.zeros((2, 7)))
    race.tell(np.zeros((2, 8)))
    with pytest.raises(ValueError, match="the race is over"):
        race.tell(np.zeros((2, 8)))
