# SPDX-License-Identifier: Apache-2.0
"""Turn tasks into a compiled folder: checked, split, tokenised and written once, then read by memory map.

The work goes task by task. Each finished task is a part file in ``NAME.partial/``, named by a hash of the task's record
and of everything that changes its content; a run that was killed finds its parts again, and the finished folder appears
by one rename, so a folder under its final name is always whole. Parts are put together in task order, so the result is
the same bit by bit for any number of workers, with or without a kill. Workers are threads: reading is Python, encoding
is the tokeniser's own native code, which runs on all cores and lets Python go on meanwhile; processes would have to
pickle the sources' closures.

Measured on two shared cores: 1,244 real tasks, 718,000 rows and 130 MB of text take 131 s with a BPE of 32,000 ids that
is trained on the way (139 MiB), and 78 s as bytes (350 MiB).

After an error in the data or on the disk the partial folder is removed; after a kill or an interrupt it stays for the
next run.
"""

import collections
import dataclasses
import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lightning_zeroprompt.data.corpus import (
    ARRAYS,
    FORMAT,
    MANIFEST,
    TOKENIZER,
    Corpus,
    CorpusError,
    manifest_fingerprint,
    tokenizer_record,
)
from lightning_zeroprompt.data.shards import Limits, TaskPart, encode_task, read_part, task_record, write_part
from lightning_zeroprompt.data.task import Example, Task, TaskError
from lightning_zeroprompt.data.tokenizer import BpeTokenizer, TextTokenizer, load_tokenizer
from lightning_zeroprompt.data.workspace import clear_errors, held, open_partial, progress_bar, write_json

__all__ = ["BpeSpec", "check_tasks", "compile_settings", "compile_tasks"]

# About 1 KB each; made-up tasks cost more to make twice than to keep.
_KEPT_EXAMPLES = 400_000


@dataclasses.dataclass(frozen=True, slots=True)
class BpeSpec:
    """Train a BPE on the tasks that are compiled.

    Texts are a seeded sample, the same number of characters a task, of the training tasks only (held-out ones only
    where there are no others), so that held-out text shapes nothing.

    Attributes:
        vocab_size: Upper limit of ids.
        sample_chars: Most characters to train on, in all. 1,000 real tasks give 28 million under the default (small
            tasks have fewer than their share), which take 22 s of processor time and 1.1 GB.
    """

    vocab_size: int = 32_000
    sample_chars: int = 40_000_000


def check_tasks(tasks: Sequence[Task]) -> None:
    """Check the records of a corpus: each for itself, ids, and families on both sides.

    Raises:
        TaskError: No tasks, a task that cannot be used, an id that stands twice, or a family with training and held-out
            tasks.
    """
    if not tasks:
        raise TaskError("there are no tasks to compile; check the source's folder and filters")
    seen: set[str] = set()
    roles: dict[str, dict[str, str]] = {}
    for task in tasks:
        task.check()
        if task.task_id in seen:
            raise TaskError(f"two tasks have the id {task.task_id!r}; ids must be unique over all sources of a corpus")
        seen.add(task.task_id)
        sides = roles.setdefault(task.family, {})
        sides.setdefault(task.role, task.task_id)
        if len(sides) > 1:
            raise TaskError(
                f"family {task.family!r} is on both sides: task {sides['train']!r} trains and {sides['heldout']!r} is "
                f"held out; "
                "give both the same role, or different families if they share no data"
            )


class _Reader:
    """Reads tasks' examples; what the BPE sample has read is kept for the encoding, as far as memory should go."""

    def __init__(self) -> None:
        self._kept: dict[str, list[Example]] = {}
        self._room = _KEPT_EXAMPLES

    def sample(self, task: Task) -> list[Example]:
        examples = _examples(task)
        if len(examples) <= self._room:
            self._room -= len(examples)
            self._kept[task.task_id] = examples
        return examples

    def take(self, task: Task) -> list[Example]:
        kept = self._kept.pop(task.task_id, None)
        return _examples(task) if kept is None else kept


def _examples(task: Task) -> list[Example]:
    try:
        return list(task.examples())
    except UnicodeDecodeError as error:
        raise TaskError(
            f"task {task.task_id!r}: its source holds bytes that are not UTF-8 ({error.reason} at byte {error.start}); "
            f"convert it first"
        ) from None
    except OSError as error:
        raise TaskError(
            f"task {task.task_id!r}: its source could not be read ({error}); check that the files are still there"
        ) from None


def _sample_texts(
    tasks: Sequence[Task], reader: _Reader, chars: int, seed: int, advance: Callable[[str], None]
) -> Iterator[str]:
    chosen = [task for task in tasks if task.role == "train"] or list(tasks)
    budget = max(chars // len(chosen), 1)
    for task in chosen:
        for template in task.templates:
            yield from (segment.text for segment in template.segments() if not segment.is_placeholder)
            yield from template.verbalizer or ()
        examples = reader.sample(task)
        digest = hashlib.sha256(task.task_id.encode("utf-8", "surrogatepass")).digest()
        order = np.random.default_rng([seed, 1, *digest[:8]]).permutation(len(examples))
        used = 0
        for row in order.tolist():
            example = examples[row]
            for text in (example.input, *example.fields.values(), *example.outputs, *(example.options or ())):
                used += len(text)
                # Lone surrogates are refused with the task's name when its part is made.
                yield text[:budget].encode("utf-8", "replace").decode("utf-8")
            if used >= budget:
                break
        advance(f"sample {task.task_id}")


def _tokenizer(
    spec: TextTokenizer | BpeSpec,
    tasks: Sequence[Task],
    reader: _Reader,
    seed: int,
    cache: Path,
    advance: Callable[[str], None],
) -> TextTokenizer:
    if not isinstance(spec, BpeSpec):
        return spec
    if cache.is_file():
        return load_tokenizer(json.loads(cache.read_text(encoding="utf-8")))
    trained = BpeTokenizer.train(_sample_texts(tasks, reader, spec.sample_chars, seed, advance), spec.vocab_size)
    write_json(trained.state(), cache)
    return trained


def _encode_all(
    tasks: Sequence[Task],
    reader: _Reader,
    tokenizer: TextTokenizer,
    limits: Limits,
    parts: Path,
    num_workers: int,
    advance: Callable[[str], None],
) -> list[Path]:
    base = json.dumps([FORMAT, tokenizer.fingerprint, dataclasses.asdict(limits)], sort_keys=True)

    def encode(task: Task, examples: list[Example], path: Path) -> None:
        write_part(encode_task(task, examples, tokenizer, limits), path)

    paths = []
    pending: collections.deque[tuple[str, Future[None]]] = collections.deque()
    with ThreadPoolExecutor(max(num_workers, 1)) as pool:
        for task in tasks:
            key = hashlib.sha256((base + json.dumps(task_record(task), sort_keys=True)).encode("utf-8")).hexdigest()
            path = parts / f"{key[:32]}.npz"
            paths.append(path)
            if path.exists() and read_part(path) is not None:
                advance(f"found {task.task_id}")
                continue
            pending.append((task.task_id, pool.submit(encode, task, reader.take(task), path)))
            if len(pending) > num_workers:
                done, future = pending.popleft()
                future.result()
                advance(done)
        for done, future in pending:
            future.result()
            advance(done)
    return paths


def _concatenate(
    parts: list[TaskPart],
) -> tuple[dict[str, np.ndarray[Any, Any]], list[dict[str, Any]], list[dict[str, Any]]]:
    """Join parts without their tokens: arrays with global segment numbers, task records, template records."""
    columns: dict[str, list[np.ndarray[Any, Any]]] = collections.defaultdict(list)
    tasks: list[dict[str, Any]] = []
    templates: list[dict[str, Any]] = []
    segment = row = 0
    for index, part in enumerate(parts):
        for name, array in part.arrays.items():
            if name in (
                "row_first_segment",
                "row_option_segment",
                "template_codes",
                "template_separator",
                "template_verbalizer",
            ):
                # Negative entries are codes (no options, placeholders), not numbers of segments.
                array = np.where(array < 0, array, array + segment)
            columns[name].append(array)
        tasks.append(part.info | {"index": index, "first_row": row, "first_template": len(templates)})
        templates += [
            template | {"index": len(templates) + i, "task": index} for i, template in enumerate(part.templates)
        ]
        segment += len(part.arrays["segment_lengths"])
        row += int(part.info["num_rows"])
    arrays = {name: np.concatenate(column) for name, column in columns.items()}
    for lengths, offsets in (("segment_lengths", "segment_offsets"), ("template_code_lengths", "template_offsets")):
        arrays[offsets] = np.concatenate([np.zeros(1, np.int64), np.cumsum(arrays.pop(lengths))])
    return arrays, tasks, templates


def _narrow(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same numbers in 16, 32 or 64 bits: at 64, a sixth of a corpus of short texts would be zeros."""
    low, high = (int(array.min()), int(array.max())) if array.size else (0, 0)
    fitting = (
        kind for kind in (np.int16, np.int32, np.int64) if np.iinfo(kind).min <= low <= high <= np.iinfo(kind).max
    )
    return array.astype(next(fitting))


def _assemble(paths: Sequence[Path], final: Path, tokenizer: TextTokenizer, settings: Mapping[str, Any]) -> None:
    shutil.rmtree(final, ignore_errors=True)
    final.mkdir()

    def load(path: Path, skip: tuple[str, ...] = ()) -> TaskPart:
        part = read_part(path, skip)
        if part is None:
            raise CorpusError(f"{path} disappeared or was damaged while compiling; start the compilation again")
        return part

    arrays, tasks, templates = _concatenate([load(path, ("tokens",)) for path in paths])
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size < 65_536 else np.uint32)
    count = int(arrays["segment_offsets"][-1])
    with (final / "tokens.npy").open("wb") as file:
        # Not open_memmap: on a full disk a mapped page kills the process, a write raises.
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
        np.lib.format.write_array_header_1_0(file, header)
        for path in paths:
            file.write(load(path).arrays["tokens"].astype(dtype).tobytes())
    for name in ARRAYS[1:]:
        with (final / f"{name}.npy").open("wb") as file:
            np.save(file, arrays[name] if name.startswith("template") else _narrow(arrays[name]), allow_pickle=False)
    write_json(tokenizer.state(), final / TOKENIZER)
    files = {}
    for name in sorted([TOKENIZER, *(f"{name}.npy" for name in ARRAYS)]):
        with (final / name).open("rb") as written:
            digest = hashlib.file_digest(written, "sha256").hexdigest()
        files[name] = {"bytes": (final / name).stat().st_size, "sha256": digest}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "settings": dict(settings),
        "tokenizer": tokenizer_record(tokenizer),
        "counts": {
            "tasks": len(tasks),
            "rows": len(arrays["row_label"]),
            "segments": len(arrays["segment_offsets"]) - 1,
            "tokens": count,
            **{name: sum(task[f"num_{name}"] for task in tasks) for name in ("truncated", "dropped", "capped")},
        },
        "files": files,
        "tasks": tasks,
        "templates": templates,
    }
    # Through JSON once, so that the hash is of what a reader will load.
    manifest = json.loads(json.dumps(manifest))
    write_json(manifest | {"fingerprint": manifest_fingerprint(manifest)}, final / MANIFEST)


def compile_tasks(
    tasks: Iterable[Task] | Callable[[], Iterable[Task]],
    folder: str | Path,
    *,
    tokenizer: TextTokenizer | BpeSpec,
    seed: int = 0,
    max_input_tokens: int = 1024,
    long_inputs: Literal["truncate", "drop"] = "truncate",
    max_examples_per_task: int | None = None,
    max_examples_per_class: int | None = None,
    max_heldout_examples: int | None = None,
    heldout_fraction: float = 0.05,
    heldout_max: int = 50,
    num_workers: int = 2,
    progress: bool = True,
    source: Mapping[str, Any] | None = None,
    existing: Literal["refuse", "reuse", "replace"] = "refuse",
) -> Corpus:
    """Compile tasks into a folder and open it.

    Args:
        tasks: In the order in which they will stand, or a function that lists them, called only if there is something
            to do.
        folder: Appears only when it is whole. Processes that compile into one folder wait for each other.
        tokenizer: A tokeniser, or how to train one on these tasks.
        seed: Keys the instance hold-out, the caps and the BPE sample.
        max_input_tokens: Longest field of an example, in tokens.
        long_inputs: Cut longer fields at the end, or drop their examples; both are counted.
        max_examples_per_task: Most training rows of a task, spread evenly over its classes.
        max_examples_per_class: Most training rows of each class; replaces the limit above for tasks with a closed label
            set.
        max_heldout_examples: Most rows of a held-out task.
        heldout_fraction: Share of a training task's rows held out (instance hold-out).
        heldout_max: Most held-out rows of a training task.
        num_workers: Threads that encode while the calling one reads.
        progress: Whether to show a bar.
        source: JSON-like description of where the tasks come from, part of the settings and of the fingerprint. It
            should change when the examples do (a version, a hash of files): nothing else tells whether a corpus, or
            what a killed run has left, still fits the tasks, so without it neither is used again.
        existing: What to do where the folder is in use: refuse; reuse a corpus of equal settings and source (and refuse
            another); or reuse one of equal settings and source and replace any other. What is no corpus is never
            touched.

    Returns:
        The opened corpus.

    Raises:
        TaskError: A task, example or template cannot be used; the message names it.
        CorpusError: The folder is in use, or the disk is full or not writable.
        ValueError: A limit that keeps nothing, or reuse without a source.
    """
    if existing == "reuse" and not source:
        raise ValueError(
            f"existing='reuse' for {folder}, but without source nothing tells whether the tasks have changed since; "
            "give source={...} with a version or a hash that changes when they do, or use existing='replace'"
        )
    folder = Path(folder)
    limits = Limits(
        seed=seed,
        max_input_tokens=max_input_tokens,
        long_inputs=long_inputs,
        max_examples_per_task=max_examples_per_task,
        max_examples_per_class=max_examples_per_class,
        max_heldout_examples=max_heldout_examples,
        heldout_fraction=heldout_fraction,
        heldout_max=heldout_max,
    )
    settings = compile_settings(tokenizer, limits, source)
    with held(folder):
        found = _existing(folder, settings, existing)
        if found is not None:
            return found
        listed = tuple(tasks() if callable(tasks) else tasks)
        return _compile(listed, folder, tokenizer, limits, settings, num_workers, progress)


def compile_settings(
    tokenizer: TextTokenizer | BpeSpec, limits: Limits, source: Mapping[str, Any] | None
) -> dict[str, Any]:
    """What a manifest says under ``settings``; equal settings (and equal sources) give equal corpora."""
    if isinstance(tokenizer, BpeSpec):
        described: dict[str, Any] = {"kind": "bpe", **dataclasses.asdict(tokenizer)}
    else:
        described = {"kind": tokenizer.name, "fingerprint": tokenizer.fingerprint}
    settings = {**dataclasses.asdict(limits), "tokenizer": described, "source": dict(source or {})}
    loaded: dict[str, Any] = json.loads(json.dumps(settings))
    return loaded


def _existing(folder: Path, settings: Mapping[str, Any], policy: str) -> Corpus | None:
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / MANIFEST).is_file():
        raise CorpusError(f"{folder} is not empty and holds no whole corpus; delete it or compile into another folder")
    if policy == "refuse":
        raise CorpusError(f"{folder} already holds a compiled corpus; delete it or compile into another folder")
    corpus = Corpus.open(folder)
    if corpus.settings == settings and settings["source"]:
        return corpus
    if policy == "reuse":
        differing = sorted(key for key in settings if corpus.settings.get(key) != settings[key])
        shown = "; ".join(
            f"{key}: there {corpus.settings.get(key)!r}, asked for {settings[key]!r}" for key in differing
        )
        raise CorpusError(
            f"{folder} holds a corpus of other settings ({shown}); delete it, replace it, or compile into another "
            f"folder"
        )
    # The old corpus stays until the new one is whole.
    return None


def _compile(
    tasks: Sequence[Task],
    folder: Path,
    tokenizer: TextTokenizer | BpeSpec,
    limits: Limits,
    settings: Mapping[str, Any],
    num_workers: int,
    progress: bool,
) -> Corpus:
    check_tasks(tasks)
    partial = folder.with_name(folder.name + ".partial")
    try:
        # Parts are named by what makes them, but not by their examples; without a source no run takes them up.
        open_partial(partial, {"settings": dict(settings), "run": "" if settings["source"] else uuid.uuid4().hex})
    except OSError as error:
        raise CorpusError(f"could not write {partial}: {error}; check the folder's rights and the disk") from error
    sampled = sum(task.role == "train" for task in tasks) or len(tasks)
    trains = isinstance(tokenizer, BpeSpec) and not (partial / TOKENIZER).is_file()
    with clear_errors(folder, partial), progress_bar(progress, len(tasks) + sampled * trains) as advance:
        reader = _Reader()
        encoder = _tokenizer(tokenizer, tasks, reader, limits.seed, partial / TOKENIZER, advance)
        paths = _encode_all(tasks, reader, encoder, limits, partial / "parts", num_workers, advance)
        _assemble(paths, partial / "final", encoder, settings)
        if folder.exists():
            os.replace(folder, partial / "replaced")
        os.replace(partial / "final", folder)
    shutil.rmtree(partial, ignore_errors=True)
    return Corpus.open(folder)
