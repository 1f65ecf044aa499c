# SPDX-License-Identifier: Apache-2.0
"""Searches over several tasks side by side: what a callback and the command line share."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lightning_zeroprompt.data.tokenizer import TextTokenizer
from lightning_zeroprompt.models.t5 import T5
from lightning_zeroprompt.prompts.clock import TimeBudget
from lightning_zeroprompt.prompts.generators import BackTranslation, SentenceContinuation, SpanInfiller
from lightning_zeroprompt.prompts.operators import DEFAULT_WEIGHTS, OperatorSet, TextGenerator, TextRequest
from lightning_zeroprompt.prompts.outcome import choose_prompt, search_record
from lightning_zeroprompt.prompts.search import PromptSearch

__all__ = ["build_operators", "make_records", "run_round"]


def build_operators(
    weights: Mapping[str, float] | None,
    model: Callable[[], T5],
    tokenizer: TextTokenizer,
    *,
    denoises: bool,
    continuation_model: str | None = None,
    translation_models: Sequence[str] | None = None,
    device: str = "cpu",
    agree: Callable[[list[list[str]]], list[list[str]]] = list,
) -> OperatorSet:
    """The operators of a search, with the text models that they ask.

    Args:
        weights: Operator to weight; None for the defaults, without span infilling where the model has not learned it,
            and with weight 1 for what a given text model makes possible.
        model: Gives the model that is searched with, when it is there.
        tokenizer: The model's.
        denoises: Whether the model has learned span corruption.
        continuation_model: Folder of a language model for ``continue_sentence``.
        translation_models: Folders of two models for ``back_translate``: there and back.
        device: Where these run.
        agree: Turns the texts of this rank into those of all ranks.

    Raises:
        ValueError: An unknown operator, no weight, or a text model that is missing or cannot be loaded.
    """
    if weights is None:
        weights = {name: weight for name, weight in DEFAULT_WEIGHTS.items() if denoises or name != "infill_span"}
        if continuation_model is not None:
            weights["continue_sentence"] = 1.0
        if translation_models is not None:
            weights["back_translate"] = 1.0
    if translation_models is not None and len(translation_models) != 2:
        raise ValueError(f"translation_models={list(translation_models)}: give two folders, there and back")
    generators: dict[str, TextGenerator] = {}
    if denoises:
        generators["infilling"] = lambda requests, *, seed: SpanInfiller(model(), tokenizer)(requests, seed=seed)
    if continuation_model is not None:
        generators["continuation"] = SentenceContinuation(continuation_model, device=device)
    if translation_models is not None:
        generators["back_translation"] = BackTranslation(*translation_models, device=device)
    agreed = {name: _Agreed(generator, agree) for name, generator in generators.items()}
    return OperatorSet(weights, generators=agreed)


class _Agreed:
    """A text model whose answers are the same on every rank."""

    def __init__(self, generator: TextGenerator, agree: Callable[[list[list[str]]], list[list[str]]]) -> None:
        self._generator, self._agree = generator, agree

    def __call__(self, requests: Sequence[TextRequest], *, seed: int) -> list[list[str]]:
        return self._agree(self._generator(requests, seed=seed))


def run_round(
    searches: Mapping[str, PromptSearch],
    step: int,
    *,
    time_budget: float | None = None,
    decide: Callable[[bool], bool] = bool,
    on_generation: Callable[[PromptSearch], None] | None = None,
) -> None:
    """Run a round of every search, or the rest of one that a saved state left open.

    Args:
        searches: By task.
        step: Training step of the model.
        time_budget: Seconds for all of them together, in equal shares; what one leaves over goes to those behind it.
        decide: Turns this rank's view of the clock into that of all ranks.
        on_generation: Called behind each generation.
    """
    whole = None if time_budget is None else TimeBudget(time_budget)
    for place, search in enumerate(searches.values()):
        clock = None
        if whole is not None:
            share = max(whole.left / (len(searches) - place), 1e-9)
            reserve = (1 + search.settings.finalists) * len(search.problem.confirm)
            clock = TimeBudget(share, reserve=reserve, decide=decide)
        search.begin(step)
        while search.advance(clock):
            if on_generation is not None:
                on_generation(search)


def make_records(searches: Mapping[str, PromptSearch], *, with_test: bool) -> list[dict[str, Any]]:
    """Decide on the confirm part, for every search, and write down what came out.

    Args:
        searches: By task, after a round.
        with_test: Whether the test parts are scored now.
    """
    return [search_record(search, choose_prompt(search), with_test=with_test) for search in searches.values()]
