# SPDX-License-Identifier: Apache-2.0
"""Checkpoints that a run starts from: found, read, and refused where they do not fit the run or its corpus."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig

from lightning_zeroprompt.cli.config import RESOLVED
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.tokenizer import PretrainedTokenizer
from lightning_zeroprompt.models.hf import load_t5
from lightning_zeroprompt.models.module import Text2TextModule

__all__ = ["check_resumed", "check_tokenizer", "load_module", "resumed_checkpoint"]


def resumed_checkpoint(config: DictConfig) -> str | None:
    """The checkpoint that ``resume_from`` names, None for a run from the start.

    Lightning's own ``ckpt_path="last"`` starts from nothing, with a warning, where it finds no checkpoint.

    Args:
        config: With ``resume_from`` and ``paths``.

    Raises:
        ValueError: There is no such checkpoint.
    """
    resumed: str | None = config.resume_from
    if resumed == "last":
        path = Path(config.paths.output_dir) / "checkpoints" / "last.ckpt"
        if not path.exists():
            raise ValueError(
                f"resume_from=last: there is no {path}; give hydra.run.dir=FOLDER of the run to go on with, or the "
                "path of a checkpoint"
            )
        return str(path)
    # Lightning reads addresses such as s3://... by itself.
    if resumed is not None and "://" not in resumed and not Path(resumed).exists():
        raise ValueError(f"resume_from={resumed}: there is no such checkpoint; give a .ckpt file of a run, or last")
    return resumed


def check_resumed(path: str, module: Text2TextModule) -> None:
    """Refuse to resume a checkpoint whose weights or optimizer state do not fit.

    Args:
        path: From :func:`resumed_checkpoint`.
        module: Of the run that is to go on.

    Raises:
        ValueError: The file cannot be read, or was written for another model, soft prompt or optimizer.
    """
    # Addresses such as s3://... and folders of sharded checkpoints are Lightning's to read.
    if "://" in path or Path(path).is_dir():
        return
    stored = Text2TextModule(**_read_checkpoint(Path(path))["hyper_parameters"])
    for name, there, here in (
        ("model", *(dataclasses.replace(one.config, dropout=0) for one in (stored, module))),
        ("soft prompt", *(dataclasses.replace(one.soft_prompt_settings, dropout=0) for one in (stored, module))),
        ("optimizer", stored.optimizer_settings.name, module.optimizer_settings.name),
    ):
        if there != here:
            raise ValueError(
                f"resume_from={path}: the checkpoint's {name} is {there}, this run's {here}; resume with the settings "
                f"of its run, which stand in the {RESOLVED} of its folder"
            )


def load_module(config: DictConfig, corpus: Corpus) -> Text2TextModule:
    """A trained model: a checkpoint file of this package, or a folder in the layout of ``transformers``' T5.

    Args:
        config: With ``checkpoint``.
        corpus: What it will be evaluated on.

    Raises:
        ValueError: The checkpoint does not exist, cannot be read, or was trained with another tokenizer than the corpus
            has.
    """
    path = Path(config.checkpoint)
    if path.is_dir():
        check_tokenizer(path, corpus)
        start = load_t5(path, dtype=torch.float32)
        return Text2TextModule(vocab_size=corpus.tokenizer.vocab_size, config=start.config, weights=start.state_dict())
    if not path.is_file():
        raise ValueError(f"there is no checkpoint at {path}; give a .ckpt file of a run, or a folder with config.json")
    trained, given = _read_checkpoint(path)["hyper_parameters"]["tokenizer"], corpus.tokenizer.fingerprint
    if trained and trained != given:
        raise ValueError(
            f"{path} was trained with the tokenizer {trained[:16]}, the corpus {corpus.path} was compiled with "
            f"{given[:16]}; compile it again with `--tokenizer FOLDER`, the folder of the corpus that was trained on"
        )
    return Text2TextModule.load_from_checkpoint(path, map_location="cpu", weights_only=True)


def check_tokenizer(folder: Path, corpus: Corpus) -> None:
    """Compare the tokenizer beside a ``transformers`` checkpoint with the corpus's; without one, warn.

    Args:
        folder: The checkpoint.
        corpus: What its model is to read.

    Raises:
        ValueError: They differ, or the folder's cannot be loaded.
    """
    if not any(folder.glob("tokenizer*.json")) and not (folder / "spiece.model").is_file():
        if folder.is_dir():
            rank_zero_warn(
                f"{folder} holds no tokenizer, so whether its weights were trained on the ids of {corpus.path} is not "
                "checked; save the tokenizer beside the weights to have them compared"
            )
        return
    theirs, ours = PretrainedTokenizer(str(folder)), corpus.tokenizer
    if theirs.fingerprint != ours.fingerprint:
        raise ValueError(
            f"the weights in {folder} belong to a tokenizer of {theirs.vocab_size:,} ids "
            f"({theirs.fingerprint[:16]}), but {corpus.path} was compiled with {ours.name} of {ours.vocab_size:,} ids "
            f"({ours.fingerprint[:16]}), where an id is another word; compile it with `--tokenizer {folder}` "
            f"(zeroprompt-train: data.tokenizer={folder})"
        )


def _read_checkpoint(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        content["hyper_parameters"]["tokenizer"]
    except Exception as error:  # damaged files raise whatever their bytes happen to mean to the reader
        raise ValueError(
            f"{path} is no checkpoint of zeroprompt-train, or it is damaged ({type(error).__name__}: {error}); give "
            "another .ckpt file of the run"
        ) from None
    return content
