# SPDX-License-Identifier: Apache-2.0
r"""zeroprompt-search: evolve prompts for a task that a trained model never saw.

    zeroprompt-search checkpoint=runs/train/DATE/checkpoints/final.ckpt task=TASK_ID
    zeroprompt-search checkpoint=... task=reviews examples.path=reviews.csv 'examples.options=[good,bad]' \
        'examples.templates=["Is this review good or bad? {input}"]'
    zeroprompt-eval checkpoint=... prompts=runs/search/DATE/prompts.json

Results are ``prompts.json``, ``prompts.md`` and ``prompts.png`` in the output folder; its ``search.pt`` is the state
after the last generation, from which a search that was killed goes on: give ``hydra.run.dir=`` that folder.
"""

import dataclasses
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from lightning_zeroprompt.cli.build import quieten
from lightning_zeroprompt.cli.config import RESOLVED, config_dir, report_user_errors, write_atomically
from lightning_zeroprompt.cli.prompts import Loaded
from lightning_zeroprompt.cli.results import print_records
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.prompts.problem import build_problem, corpus_donors
from lightning_zeroprompt.prompts.report import write_prompts
from lightning_zeroprompt.prompts.rounds import build_operators, make_records, run_round
from lightning_zeroprompt.prompts.search import PromptSearch
from lightning_zeroprompt.prompts.settings import SearchSettings

__all__ = ["main", "search"]

_STATE = "search.pt"


def search(config: DictConfig) -> None:
    """Search, and leave the results in the output folder.

    Args:
        config: A composed configuration of ``conf/search.yaml``.
    """
    quieten()
    _check_keys(config)
    folder, given = Path(config.paths.output_dir), config.search
    names = {field.name for field in dataclasses.fields(SearchSettings)} - {"race"}
    settings = SearchSettings(**{name: given[name] for name in names})
    loaded = Loaded(config)
    module, encoding = loaded.module, loaded.encoding(given.max_prompt_tokens)
    operators = build_operators(
        OmegaConf.to_container(given.operators) if given.operators else None,  # type: ignore[arg-type]
        lambda: module.model,
        loaded.corpus.tokenizer,
        denoises=loaded.run.mixture.denoising > 0,
        continuation_model=given.continuation_model,
        translation_models=given.translation_models,
        device=loaded.device,
    )
    donors = corpus_donors(loaded.data.corpus, loaded.data.task_indices) if given.neighbours else None
    mode = module.soft_prompt_settings.mode
    tasks = [config.task] if isinstance(config.task, str) else list(config.task)
    searches = {}
    for pool, test_rows in loaded.pools(config, tasks, given.wordings):
        problem = build_problem(
            pool,
            donors,
            population=given.population,
            mode=given.mode,
            k=given.k,
            seed=given.seed,
            neighbours=given.neighbours,
            test_rows=test_rows,
            soft_prompts=("shared",) if mode == "shared" else (),
            lend_soft_prompts=mode == "per_task",
        )
        forward = T5Forward(module.model)
        searches[problem.name] = PromptSearch(
            problem, forward, operators, settings, encoding, max_tokens=given.max_tokens
        )
    write_atomically(folder / RESOLVED, OmegaConf.to_yaml(config, resolve=True))
    _restore(folder / _STATE, searches)
    run_round(
        searches,
        module.loaded_steps,
        time_budget=given.time_budget,
        on_generation=lambda _: _save(folder / _STATE, searches),
    )
    records = make_records(searches, with_test=True)
    write_prompts(folder, records, {"corpus": loaded.corpus.fingerprint, "checkpoint": str(config.checkpoint)})
    print_records(records)
    print(f"Prompts: {folder / 'prompts.md'}")


def _check_keys(config: DictConfig) -> None:
    """Refuse keys that nothing reads, which Hydra's ``+`` lets through."""
    for group, file in (("search", "search/default"), ("examples", "examples/table")):
        known = OmegaConf.load(config_dir() / f"{file}.yaml")
        unknown = sorted(str(key) for key in config[group] if key not in known)
        if unknown:
            raise ValueError(f"{group}.{unknown[0]} is unknown; {group} has: {', '.join(sorted(map(str, known)))}")


def _save(path: Path, searches: dict[str, PromptSearch]) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({name: one.state_dict() for name, one in searches.items()}, temporary)
    temporary.replace(path)


def _restore(path: Path, searches: dict[str, PromptSearch]) -> None:
    if not path.is_file():
        return
    saved = torch.load(path, weights_only=True)
    if saved.keys() != searches.keys():
        raise ValueError(
            f"{path} is the state of a search for {sorted(saved)}, not for {sorted(searches)}; give the same task, or "
            "another hydra.run.dir"
        )
    for name, one in searches.items():
        one.load_state_dict(saved[name])


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="search")
def main(config: DictConfig) -> None:
    """Console script."""
    report_user_errors(lambda: search(config))


if __name__ == "__main__":
    main()
