# SPDX-License-Identifier: Apache-2.0
"""Prompt search: what evolves, how it changes, and what is measured. Nothing here knows Hydra or Lightning.

What loads torch (:mod:`~lightning_zeroprompt.prompts.generators`, and through the metrics'
:mod:`~lightning_zeroprompt.prompts.neighbours`) is imported by its own name.
"""

from lightning_zeroprompt.prompts.genome import SLOTS, LiteralPart, PromptGenome, option_permutation
from lightning_zeroprompt.prompts.operators import DEFAULT_WEIGHTS, OPERATORS, Candidate, Couple, Material, OperatorSet
from lightning_zeroprompt.prompts.population import gather_donors, gather_material, start_population

__all__ = [
    "DEFAULT_WEIGHTS",
    "OPERATORS",
    "SLOTS",
    "Candidate",
    "Couple",
    "LiteralPart",
    "Material",
    "OperatorSet",
    "PromptGenome",
    "gather_donors",
    "gather_material",
    "option_permutation",
    "start_population",
]
