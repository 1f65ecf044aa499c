# SPDX-License-Identifier: Apache-2.0
"""Prompt search: what evolves, how it changes, and what is measured. Nothing here knows Hydra or Lightning."""

from lightning_zeroprompt.prompts.genome import SLOTS, LiteralPart, PromptGenome, option_permutation

__all__ = ["SLOTS", "LiteralPart", "PromptGenome", "option_permutation"]
