# SPDX-License-Identifier: Apache-2.0
"""How a prompt search goes, as plain numbers: what a configuration or a user's code sets."""

import dataclasses
from typing import Literal, get_args

from lightning_zeroprompt.prompts.racing import RaceSettings

__all__ = ["SearchSettings", "Selection"]

Selection = Literal["tournament", "nsga2", "pareto"]
"""How parents are chosen; see :mod:`~lightning_zeroprompt.prompts.search`."""


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SearchSettings:
    """How a search goes.

    Attributes:
        population: Prompts that survive a generation (mu).
        offspring: Children of a generation (lambda); None: as many as survive.
        generations: Of a round, after its first race.
        selection: How parents are chosen.
        tournament_size: Prompts of a tournament.
        elite: Best prompts of the hall of fame that always survive.
        hall_of_fame: Best prompts of all generations that are kept, scored on the whole search part.
        max_age: Changes of the model that a prompt survives outside the elite; None: any number.
        budget: Most scorings of a round on the search part; None: no limit.
        finalists: Best prompts that are checked on the confirm part.
        alpha: Probability that a finalist is kept though none is better than the manual prompt.
        race: How fast losers leave a race.
        seed: Of all random decisions.

    Raises:
        ValueError: A number out of range.
    """

    population: int = 32
    offspring: int | None = None
    generations: int = 6
    selection: Selection = "tournament"
    tournament_size: int = 3
    elite: int = 2
    hall_of_fame: int = 12
    max_age: int | None = 3
    budget: int | None = None
    finalists: int = 3
    alpha: float = 0.05
    race: RaceSettings = dataclasses.field(default_factory=RaceSettings)
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"population": 2, "generations": 0, "tournament_size": 1, "elite": 1, "hall_of_fame": 1, "finalists": 1}
        optional = {"offspring": 1, "max_age": 0, "budget": 1}
        for name, bound in (least | optional).items():
            value = getattr(self, name)
            if (value is None and name in least) or (value is not None and value < bound):
                raise ValueError(f"{name}={value}: give at least {bound}" + ("" if name in least else ", or null"))
        if self.selection not in get_args(Selection):
            raise ValueError(f"selection={self.selection!r}: give one of {', '.join(get_args(Selection))}")
        if not 0 < self.alpha < 1:
            raise ValueError(f"alpha={self.alpha}: give a probability between 0 and 1")
        if self.elite > min(self.population, self.hall_of_fame) or self.finalists > self.hall_of_fame:
            raise ValueError(
                f"elite={self.elite} cannot be above population={self.population}, and neither it nor "
                f"finalists={self.finalists} above hall_of_fame={self.hall_of_fame}"
            )
