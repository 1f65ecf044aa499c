# SPDX-License-Identifier: Apache-2.0
"""Lightning callbacks, one a file."""

from lightning_zeroprompt.callbacks.genetic_prompt_search import GeneticPromptSearch
from lightning_zeroprompt.callbacks.pipeline_monitor import PipelineMonitor
from lightning_zeroprompt.callbacks.throughput import Throughput

__all__ = ["GeneticPromptSearch", "PipelineMonitor", "Throughput"]
