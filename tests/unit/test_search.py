# SPDX-License-Identifier: Apache-2.0
import copy
import io
import random

import numpy as np
import pytest
import torch
from deap import creator
from searching import TEMPLATES, WEIGHTS, LetterModel, make_pool, make_search, run_round

from lightning_zeroprompt.data.task import PromptTemplate
from lightning_zeroprompt.prompts.clock import TimeBudget
from lightning_zeroprompt.prompts.operators import OPERATORS, Operator, OperatorSet
from lightning_zeroprompt.prompts.outcome import choose_prompt, search_record
from lightning_zeroprompt.prompts.problem import build_problem
from lightning_zeroprompt.prompts.racing import RaceSettings
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings

SELECTIONS = ("tournament", "nsga2", "pareto")


def saved(search):
    """The state as a checkpoint would hold it: read without unpickling objects."""
    file = io.BytesIO()
    torch.save(search.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def equal(one, other):
    if isinstance(one, torch.Tensor):
        return torch.equal(one.nan_to_num(-1), other.nan_to_num(-1))
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[name], other[name]) for name in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_search_finds_what_the_model_likes_and_never_loses_its_best(selection):
    model = LetterModel()
    search = run_round(make_search(model, selection=selection, generations=16, pool=make_pool(200), k=96))
    best = [entry["best"] for entry in search.history]
    assert best == sorted(best)
    assert best[-1] > 2 * search.history[0]["manual"]
    top = search.hall[0]
    # The model's own words: a letter more is 0.1 more.
    scores = search.scorers["search"].score([top.candidate.genome]).fitness
    assert top.mean == pytest.approx(scores.mean(), abs=1e-6)
    assert top.mean == max(entry.mean for entry in search.hall)
    assert top.key in {one.key for one in search.population}
    choice = choose_prompt(search)
    assert choice.kept
    assert choice.chosen.genome.text.count("z") > choice.manual.genome.text.count("z")
    # Nothing was scored twice.
    assert model.pairs == sum(scorer.counts.scored for scorer in search.scorers.values())


def test_it_is_ahead_of_the_same_operators_without_selection():
    """Random search: as many scorings, parents and survivors by chance."""

    def best(seed, **changes):
        search = make_search(LetterModel(), generations=30, budget=600, seed=seed)
        for name, function in changes.items():
            setattr(search, name, function)
        run_round(search)
        assert search.scorers["search"].counts.scored <= 600
        return search.hall[0].mean

    gains = []
    for seed in range(6):
        chance = random.Random(seed)
        founders = make_search(LetterModel())
        founders.begin(1)
        founders.advance()
        first = founders.population
        random_search = best(seed, _parents=lambda count, first=first, chance=chance: chance.choices(first, k=count))
        gains.append(best(seed) - random_search)
    assert np.mean(gains) > 0.2
    assert min(gains) > -0.1


def test_two_searches_share_nothing_and_leave_the_global_random_numbers_alone():
    random.seed(5)
    before = random.getstate()
    one, other = (make_search(LetterModel(), seed=3, selection=name) for name in ("tournament", "nsga2"))
    alone = run_round(make_search(LetterModel(), seed=3))
    one.begin(1)
    other.begin(1)
    going = True
    while going:
        random.random()  # somebody else draws in between
        going = one.advance() | other.advance()
    assert equal(saved(alone), saved(one))
    random.setstate(before)
    run_round(make_search(LetterModel(), seed=4))
    assert random.getstate() == before
    assert not [name for name in vars(creator) if isinstance(getattr(creator, name), type) and "Fitness" in name]


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("mode", ["few_label", "zero_label"])
def test_a_killed_search_goes_on_bit_for_bit(selection, mode):
    def make():
        return make_search(LetterModel(), selection=selection, mode=mode, generations=3, seed=1)

    whole = make()
    states = []
    for step in (10, 20):
        whole.begin(step)
        while whole.advance():
            states.append(saved(whole))
    states = states[:-1]
    for state in states[::2]:
        resumed = make()
        resumed.load_state_dict(copy.deepcopy(state))
        assert equal(saved(resumed), state)
        for step in (10, 20):
            if step >= resumed.step and not (step == resumed.step and not resumed.is_open):
                run_round(resumed, step)
        assert equal(saved(resumed), saved(whole))


def test_a_state_of_another_problem_is_refused():
    state = saved(run_round(make_search(LetterModel(), generations=0)))
    for changed in ({"k": 20}, {"mode": "many_label", "k": 16}, {"pool": make_pool(70)}):
        with pytest.raises(ValueError, match="is of other rows"):
            make_search(LetterModel(), **changed).load_state_dict(state)


def test_another_model_drops_scores_keeps_the_hall_and_ages():
    model = LetterModel()
    search = run_round(make_search(model, generations=4, max_age=1))
    top, first = search.hall[0], search.scorers["search"].counts.scored
    model.letter = ord("m")
    run_round(search, step=2)
    assert search.scorers["search"].counts.scored > first
    assert search.scorers["search"].step == 2
    for one in (*search.hall, *search.population):
        assert one.mean == pytest.approx(
            search.scorers["search"].score([one.candidate.genome], range(one.seen)).fitness.mean(), abs=1e-5
        )
    # What the old model liked best was raced anew; under the new one it is nothing special.
    assert search.hall[0].key != top.key
    assert max(one.age for one in search.population) <= 1
    run_round(search, step=3)
    assert max(one.age for one in search.population) <= 1
    again = run_round(search, step=3).scorers["search"].counts
    assert search.round == 4
    assert again.refused == search.scorers["search"].counts.refused


def test_a_budget_is_kept_and_counted_in_scorings():
    for budget in (40, 100, 333):
        model = LetterModel()
        search = run_round(make_search(model, generations=50, budget=budget))
        assert model.pairs == search.scorers["search"].counts.scored <= budget
        assert model.pairs > budget - 8 * 12
        # Another round has the budget anew.
        run_round(search, step=2)
        assert model.pairs <= 2 * budget
    with pytest.raises(ValueError, match="the manual prompts alone take 2 x 12 = 24; give more"):
        make_search(LetterModel(), budget=23)


class Clock:
    def __init__(self):
        self.time = 0.0

    def __call__(self):
        return self.time


@pytest.mark.parametrize("seconds", [3.0, 8.0, 20.0])
def test_a_time_budget_is_kept_within_5_percent(seconds):
    now = Clock()

    class Slow(LetterModel):
        def option_logprobs(self, batches):
            results = super().option_logprobs(batches)
            # Longer inputs take longer, as with a model.
            now.time += sum(batch["input_ids"].numel() for batch in batches) * 2e-4
            return results

    search = make_search(Slow(), generations=500, population=6)
    asked = []
    clock = TimeBudget(seconds, now=now, decide=lambda answer: asked.append(answer) or answer)
    import lightning_zeroprompt.prompts.search as module

    original = module.time.perf_counter
    module.time.perf_counter = now
    try:
        run_round(search, clock=clock)
    finally:
        module.time.perf_counter = original
    assert 0.7 * seconds < now.time < 1.05 * seconds
    assert asked[-1] is False
    assert all(asked[:-1])


def test_one_rank_decides_about_time():
    search = run_round(make_search(LetterModel(), generations=5), clock=TimeBudget(1e9, decide=lambda mine: False))
    assert len(search.history) == 0
    assert not search.is_open
    choice = choose_prompt(search)
    assert not choice.kept
    assert choice.chosen == choice.manual


def test_bad_children_are_discarded_and_counted():
    count = iter(range(10_000))

    def spoil(parents, material, rng):
        number = next(count)
        text = ("", "q " * 400, "fine " * (number % 9 + 1), "bad #" + " " * 0)[number % 4]
        changes = {"instruction": text} | (
            {"input_frame": "", "option_frame": "", "answer_cue": ""} if not text else {}
        )
        return type(parents[0])(**(parents[0].to_dict() | {"verbalizer": None} | changes))

    model = LetterModel(bad="#")
    problem = build_problem(make_pool(), population=8, k=32)
    operators = OperatorSet({"spoil": 1, "crossover": 0.1}, operators=(*OPERATORS, Operator("spoil", 1, spoil)))
    search = run_round(PromptSearch(problem, model, operators, SearchSettings(population=8, generations=4)))
    assert {"empty", "too long", "score is not finite"} <= set(search.discarded)
    assert all("#" not in one.candidate.genome.text for one in (*search.population, *search.hall))
    record = search_record(search, choose_prompt(search), with_test=False)
    assert record["discarded"] == dict(search.discarded)


def test_a_model_that_has_diverged_ends_the_round_and_not_the_run():
    model = LetterModel()
    search = run_round(make_search(model, generations=2))
    found = {one.key for one in search.population}
    model.bad = " "  # every input has one
    run_round(search, step=2)
    choice = choose_prompt(search)
    assert not choice.kept
    assert choice.confirmation is None
    record = search_record(search, choice, with_test=True)
    assert np.isnan(record["scores"]["search"]["manual"]["fitness"])
    model.bad = None
    run_round(search, step=3)
    assert found & {one.key for one in search.population}


def test_nsga2_keeps_short_prompts_that_a_single_objective_drops():
    one, two = (
        run_round(make_search(LetterModel(), generations=6, selection=name)) for name in ("tournament", "nsga2")
    )
    shortest = [min(entry.tokens for entry in search.population) for search in (one, two)]
    assert shortest[1] < shortest[0]


def test_pareto_parents_are_best_somewhere():
    search = run_round(make_search(LetterModel(noise=2.0), generations=1, selection="pareto", k=40))
    whole = [one for one in search.population if one.seen == len(search.problem.search)]
    values = search.scorers["search"].score([one.candidate.genome for one in whole]).fitness
    assert len(whole) > 2
    best = {whole[place].key for place in values.argmax(0)}
    random.seed(0)
    parents = search._parents(400)
    assert {one.key for one in parents} <= best
    # As often as it is best on an example.
    share = np.bincount(values.argmax(0), minlength=len(whole)) / values.shape[1]
    for place, one in enumerate(whole):
        drawn = sum(parent.key == one.key for parent in parents) / 400
        assert drawn == pytest.approx(share[place], abs=0.1)


def test_parts_of_a_problem_are_disjoint_and_blocks_balanced():
    pool = make_pool()
    problem = build_problem(pool, population=4, k=32)
    keys = [set(part.input_keys()) for part in (problem.search, problem.confirm, problem.test)]
    assert sum(map(len, keys)) == len(set.union(*keys)) == 12 + 20 + 40
    for end in (2, 4, 8, 12):
        assert problem.search.label[:end].sum() == end // 2
    hidden = build_problem(pool, population=4, k=32, mode="zero_label")
    assert (hidden.search.label < 0).all()
    assert not hidden.search.right.any()
    assert (hidden.test.label >= 0).all()


def test_zero_label_uses_no_label_before_the_test():
    pool = make_pool()
    flipped = pool.with_labels(1 - pool.label)

    class Blind(LetterModel):
        def option_logprobs(self, batches):
            # A model cannot see labels: the first option is likelier in long inputs.
            results = []
            for batch in batches:
                example = batch["option_example"]
                first = torch.cat([torch.ones(1, dtype=torch.bool), example[1:] != example[:-1]])
                margin = (batch["input_ids"].sum(1) % 7 - 3.0)[example]
                results.append(torch.where(first, margin, 0.0).float())
            return results

    found = [run_round(make_search(Blind(), pool=each, mode="zero_label")) for each in (pool, flipped)]
    records = [search_record(search, choose_prompt(search), with_test=True) for search in found]
    assert records[0]["prompt"] == records[1]["prompt"]
    assert records[0]["scores"]["confirm"] == records[1]["scores"]["confirm"]
    tests = [record["scores"]["test"]["manual"]["outcome"] for record in records]
    assert tests[0] == pytest.approx(1 - tests[1])
    assert records[0]["labels_used"] == 0


def test_manual_prompts_that_cannot_be_used_are_an_error_before_the_search():
    pool = make_pool(templates=(PromptTemplate(name="long", text="word " * 200 + "{input}"),))
    with pytest.raises(ValueError, match=r"none of its 1 manual prompts can be used \(too long"):
        make_search(LetterModel(), pool=pool)


def test_free_answers_are_searched_by_likelihood_and_reported_with_their_metric():
    model = LetterModel()
    search = run_round(
        make_search(model, pool=make_pool(templates=TEMPLATES[1:], free=True), generations=3, weights=WEIGHTS)
    )
    # Of the manual prompt alone, which is chosen by its outcome.
    assert model.answers == len(search.problem.search)
    record = search_record(search, choose_prompt(search), with_test=True)
    assert model.answers > 2 * len(search.problem.search)
    assert record["metric"] == "rouge_l"
    assert record["scores"]["test"]["manual"]["outcome"] == 1.0  # the model always answers "a"


def test_finalists_and_the_manual_prompt_are_right_most_often_and_then_likeliest():
    search = run_round(make_search(LetterModel(noise=1.5), generations=4))
    scorer, own = search.scorers["search"], [candidate.genome for candidate in search.problem.manual]

    def rank(genomes):
        scores = scorer.score(genomes)
        return list(zip(scores.outcome.mean(1).tolist(), scores.fitness.mean(1).tolist(), strict=True))

    assert rank([search.manual.genome]) == [max(rank(own))]
    hall = [one.candidate.genome for one in search.hall if one.candidate.genome not in own]
    assert len(hall) > search.settings.finalists
    assert rank([one.genome for one in search.finalists()]) == sorted(rank(hall), reverse=True)[:3]


def test_race_settings_reach_the_race():
    settings = SearchSettings(population=4, generations=1, race=RaceSettings(first_block=2, keep=1.0, drop_p=0.0))
    search = PromptSearch(build_problem(make_pool(), population=4, k=16), LetterModel(), OperatorSet(WEIGHTS), settings)
    run_round(search)
    assert {one.seen for one in search.population} == {6}
