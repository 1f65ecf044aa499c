# SPDX-License-Identifier: Apache-2.0
"""A source's name and path to an opened corpus: compiled at most once, found again on every later call.

The content of the source's files (sha256, not their dates or paths) is part of the settings, so that a changed file is
noticed and an unchanged one on another machine is not. Hashing the 50 MB of parquet files of a real corpus takes 0.1 s,
opening what is already compiled another 0.1 s; sources and their libraries are imported only when there is something to
compile.
"""

import functools
import hashlib
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from lightning_zeroprompt.data.compile import BpeSpec, compile_tasks
from lightning_zeroprompt.data.corpus import MANIFEST, Corpus
from lightning_zeroprompt.data.task import Task, TaskError
from lightning_zeroprompt.data.tokenizer import ByteTokenizer, PretrainedTokenizer, TextTokenizer

__all__ = ["SOURCES", "choose_tokenizer", "compile_source", "source_tasks"]

SOURCES = ("builtin", "parquet", "hub", "promptsource")
"""Names of the sources."""


def choose_tokenizer(name: str, vocab_size: int = 32_000) -> TextTokenizer | BpeSpec:
    """The tokeniser of a name.

    Args:
        name: ``"byte"``, ``"bpe"`` (trained on the tasks), the folder of a compiled corpus whose tokeniser to use
        again, or
            a pretrained one.
        vocab_size: Ids of a trained BPE.

    Raises:
        ValueError: The pretrained tokeniser cannot be loaded or used.
    """
    if name == "byte":
        return ByteTokenizer()
    if name == "bpe":
        return BpeSpec(vocab_size)
    if (Path(name) / MANIFEST).is_file():
        return Corpus.open(name).tokenizer
    return PretrainedTokenizer(name)


def _needs(name: str, path: str | Path | None) -> Path:
    if path is None:
        raise TaskError(f"source {name!r} needs a path; give the folder (or, for 'hub', the mapping file)")
    return Path(path)


def source_tasks(name: str, path: str | Path | None, options: Mapping[str, Any] | None = None) -> list[Task]:
    """List the tasks of a source.

    Args:
        name: One of :data:`SOURCES`.
        path: The folder of ``parquet``, the mapping file of ``hub``, the templates folder of ``promptsource``; None for
            ``builtin``.
        options: Further arguments of the source's own function (``promptsource`` needs ``data_folder``).

    Raises:
        TaskError: The source is unknown, does not take an option, its path is missing, or its tasks cannot be used.
        ValueError: It has fewer tasks than asked for.
    """
    if name not in SOURCES:
        raise TaskError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    module = importlib.import_module(f"lightning_zeroprompt.data.sources.{name}")
    function: Callable[..., Iterable[Task]] = getattr(module, f"{name}_tasks")
    given = dict(options or {})
    taken = list(inspect.signature(function).parameters)[name != "builtin" :]
    unknown = [option for option in given if option not in taken]
    if unknown:
        raise TaskError(f"source {name!r} has no option {unknown[0]!r}; it has: {', '.join(sorted(taken))}")
    if name == "builtin":
        return list(function(**given))
    if name == "promptsource" and "data_folder" not in given:
        raise TaskError("source 'promptsource' needs the option data_folder, the folder of NAME/SPLIT.parquet files")
    return list(function(_needs(name, path), **given))


def _source_files(name: str, path: str | Path | None, options: Mapping[str, Any]) -> list[tuple[str, Path]]:
    """The files whose content decides what the source yields, with names that do not depend on where they lie."""
    if name == "builtin":
        from lightning_zeroprompt.data import sources

        return [(file.name, file) for file in sorted(Path(sources.__path__[0]).glob("builtin*.py"))]
    folder = _needs(name, path)
    if name == "parquet":
        from lightning_zeroprompt.data.sources.parquet import parquet_files

        taken = ("splits", "include_noncommercial", "include_bigbench")
        return [(f.name, f) for f in parquet_files(folder, **{k: v for k, v in options.items() if k in taken})]
    if name == "hub":
        from lightning_zeroprompt.data.sources.hub import local_files

        return local_files(folder, options.get("load"))
    data = Path(options.get("data_folder", folder))
    split = options.get("split", "validation")
    files = [*folder.rglob("*.yaml"), *data.glob(f"*/{split}.parquet")]
    return sorted((str(file.relative_to(folder if file.is_relative_to(folder) else data)), file) for file in files)


def _content_hash(files: Iterable[tuple[str, Path]]) -> str:
    total = hashlib.sha256()
    for name, file in files:
        try:
            with file.open("rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            raise TaskError(f"{file} could not be read ({error}); check the path and its rights") from None
        total.update(f"{name}\0{digest}\n".encode())
    return total.hexdigest()


def compile_source(
    name: str,
    path: str | Path | None,
    out: str | Path,
    *,
    tokenizer: str = "bpe",
    vocab_size: int = 32_000,
    num_tasks: int | None = None,
    seed: int = 0,
    options: Mapping[str, Any] | None = None,
    existing: Literal["refuse", "reuse", "replace"] = "reuse",
    **limits: Any,
) -> Corpus:
    """Open the corpus of a source, compiling it first if ``out`` does not hold it yet.

    Several processes may call this with the same arguments at the same time: one compiles, the others wait and open.

    Args:
        name: One of :data:`SOURCES`.
        path: See :func:`source_tasks`.
        out: Folder of the compiled corpus.
        tokenizer: ``"byte"``, ``"bpe"`` or the name of a pretrained one.
        vocab_size: Ids of a trained BPE.
        num_tasks: Training tasks to choose (``builtin`` and ``parquet``); None takes all.
        seed: Seeds the choice of tasks, the hold-out, the caps and the BPE sample.
        options: Further arguments of the source's own function.
        existing: What to do with another corpus in ``out``; see
            :func:`~lightning_zeroprompt.data.compile.compile_tasks`.
        **limits: Further arguments of :func:`~lightning_zeroprompt.data.compile.compile_tasks`.

    Raises:
        TaskError: A task or source that cannot be used.
        CorpusError: ``out`` holds something else, or cannot be written.
        ValueError: Limits that keep nothing, fewer tasks than asked for, or an unusable tokeniser.

    Example:
        ``compile_source("parquet", "data", "corpora/real", num_tasks=1000, max_examples_per_task=256)``
    """
    if name not in SOURCES:
        raise TaskError(f"unknown source {name!r}; known: {', '.join(SOURCES)}")
    given = dict(options or {})
    if name in ("builtin", "parquet"):
        given |= {"num_tasks": num_tasks, "seed": seed}
    elif num_tasks is not None:
        raise ValueError(f"num_tasks={num_tasks}: source {name!r} always yields all its tasks; leave it out")
    content = _content_hash(_source_files(name, path, given))
    # Folders are where the content lies, not what it is.
    described = {key: value for key, value in given.items() if key != "data_folder"}
    return compile_tasks(
        functools.partial(source_tasks, name, path, given),
        out,
        tokenizer=choose_tokenizer(tokenizer, vocab_size),
        seed=seed,
        source={"name": name, "options": described, "content": content},
        existing=existing,
        **limits,
    )
