# SPDX-License-Identifier: Apache-2.0
"""The training stream of 1,000 tasks: examples/s drawn and joined, against ``datasets.interleave_datasets``.

Writes a corpus of random tokens (1,000 tasks x 512 rows, four templates a task, half of the tasks closed with two to
four labels; input lengths log-normal, a mean of about 60 tokens as in 1,000 public tasks under a BPE of 32,000) and
the same rows as 1,000 parquet files. Each part runs in a process of its own on one core, so that memory and handles
are its own:

* ours: the default mixture (with 15 % span corruption), windows of 4,096 draws, drawn and joined to token arrays with
  templates, options and end marks; beside it packed batches.
* the peer: one streaming data set a file, ``interleave_datasets`` with equal probabilities, rows handed over as lists
  of ids: nothing joined, which is less work.

Rates are examples a second on the wall; ``processor`` marks those by the processor's time of the process, which a
machine shared with other work disturbs less. Resume is the time from a closed folder to the first batch at a random
step. Anonymous memory is ``RssAnon`` above what the imports take; mapped files are not counted, as the kernel can drop
them.

Example:
    python benchmarks/data_stream.py                      # some five minutes, 2 GB of disk under --folder
    python benchmarks/data_stream.py --corpus FOLDER      # a compiled corpus, ours alone
"""

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

ROWS, TEMPLATES, HELDOUT = 512, 4, 25
WINDOW = 4096


def write_corpus(folder: Path, num_tasks: int) -> None:
    """Write a compiled corpus of random tokens."""
    from lightning_zeroprompt.data.corpus import (
        FORMAT,
        MANIFEST,
        TOKENIZER,
        TaskInfo,
        TemplateInfo,
        manifest_fingerprint,
        tokenizer_record,
    )
    from lightning_zeroprompt.data.tokenizer import ByteTokenizer

    generator = np.random.default_rng(num_tasks)
    folder.mkdir(parents=True)
    lengths: list[np.ndarray[Any, Any]] = []
    columns: dict[str, list[Any]] = {name: [] for name in ("first", "options", "count", "label")}
    codes, ends, separators, tasks = [], [0], [], []
    templates: list[TemplateInfo] = []
    segments = 0
    for index in range(num_tasks):
        choices = 2 + index % 3 if index % 2 else 0
        head = np.concatenate([[1], generator.integers(1, 4, choices), generator.integers(4, 24, TEMPLATES)])
        lengths.append(head)
        literal = segments + 1 + choices
        for place in range(TEMPLATES):
            codes += [literal + place, -2] + ([-1] if choices and place % 2 else [])
            ends.append(len(codes))
            separators.append(segments)
            templates.append(
                TemplateInfo(
                    index=len(templates),
                    task=index,
                    name=str(place),
                    text="",
                    role="train",
                    instruction="",
                    verbalizer=None,
                    option_separator=", ",
                )
            )
        inputs = np.clip(generator.lognormal(3.55, 1.08, ROWS), 2, 1024).astype(np.int64)
        outputs = generator.integers(1, 4, ROWS) if choices else np.clip(generator.lognormal(1.9, 1, ROWS), 1, 400)
        lengths.append(np.stack([inputs, outputs.astype(np.int64)], axis=1).ravel())
        columns["first"].append(segments + len(head) + 2 * np.arange(ROWS))
        columns["options"].append(np.full(ROWS, segments + 1 if choices else -1))
        columns["count"].append(np.full(ROWS, choices))
        columns["label"].append(
            np.arange(ROWS) * choices // (ROWS - HELDOUT) % choices if choices else np.full(ROWS, -1)
        )
        sizes = np.bincount(columns["label"][-1][: ROWS - HELDOUT]) if choices else [ROWS - HELDOUT]
        segments += len(head) + 2 * ROWS
        tasks.append(
            TaskInfo(
                index=index,
                task_id=f"task{index}",
                category=f"category{index % 60}",
                family=f"family{index}",
                role="train",
                metric="exact_match",
                language="en",
                licence="none",
                origin="synthetic",
                domain="",
                tier=0,
                benchmark="",
                source="",
                cluster="",
                fields=("input",),
                labels=tuple(map(str, range(choices))) or None,
                first_row=index * ROWS,
                num_rows=ROWS,
                num_heldout_rows=HELDOUT,
                class_counts=tuple(int(size) for size in sizes),
                first_template=index * TEMPLATES,
                num_templates=TEMPLATES,
                kind="choice" if choices else "generation",
            )
        )
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(lengths))]).astype(np.int64)
    np.save(folder / "segment_offsets.npy", offsets)
    tokens = np.lib.format.open_memmap(folder / "tokens.npy", mode="w+", dtype=np.uint16, shape=(int(offsets[-1]),))
    for start in range(0, len(tokens), 1 << 24):
        part = tokens[start : start + (1 << 24)]
        part[:] = generator.integers(3, 259, len(part), dtype=np.uint16)
    tokens.flush()
    arrays: dict[str, Any] = {
        "row_first_segment": np.concatenate(columns["first"]).astype(np.int64),
        "row_num_outputs": np.ones(num_tasks * ROWS, dtype=np.int16),
        "row_option_segment": np.concatenate(columns["options"]).astype(np.int64),
        "row_num_options": np.concatenate(columns["count"]).astype(np.int16),
        "row_label": np.concatenate(columns["label"]).astype(np.int32),
        "template_codes": np.asarray(codes, dtype=np.int64),
        "template_offsets": np.asarray(ends, dtype=np.int64),
        "template_separator": np.asarray(separators, dtype=np.int64),
        "template_verbalizer": np.full(len(templates), -1, dtype=np.int64),
        "template_role": np.zeros(len(templates), dtype=np.int8),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / TOKENIZER).write_text(json.dumps(ByteTokenizer().state()))
    files = {}
    for file in sorted(folder.iterdir()):
        with file.open("rb") as content:
            digest = hashlib.file_digest(content, "sha256").hexdigest()
        files[file.name] = {"bytes": file.stat().st_size, "sha256": digest}
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "settings": {},
        "tokenizer": tokenizer_record(ByteTokenizer()),
        "counts": {"tasks": num_tasks, "rows": num_tasks * ROWS},
        "files": files,
        "tasks": [dataclasses.asdict(task) for task in tasks],
        "templates": [dataclasses.asdict(template) for template in templates],
    }
    (folder / MANIFEST).write_text(json.dumps(manifest | {"fingerprint": manifest_fingerprint(manifest)}))


def write_parquet(corpus_folder: Path, folder: Path) -> None:
    """Write the rows of a corpus as one parquet file a task: token ids of input and output."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from lightning_zeroprompt.data.corpus import Corpus

    corpus = Corpus.open(corpus_folder)
    folder.mkdir()
    for task in corpus.tasks:
        first = corpus.row_first_segment[task.first_row : task.first_row + task.num_rows]
        columns = {}
        for name, place in (("input_ids", 0), ("labels", 1)):
            columns[name] = pa.array([corpus.segment(int(segment) + place) for segment in first], pa.list_(pa.uint16()))
        pq.write_table(pa.table(columns), folder / f"{task.task_id}.parquet")


def anonymous_bytes() -> int:
    """RssAnon of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_ours(folder: Path, draws: int, repeats: int) -> dict[str, Any]:
    """Rates, handles, memory and resume of the compiled corpus."""
    from lightning_zeroprompt.data.corpus import Corpus
    from lightning_zeroprompt.data.join import Joiner
    from lightning_zeroprompt.data.mixture import Mixture, select_tasks
    from lightning_zeroprompt.data.packing import BatchStream, PackingSettings

    shape = PackingSettings(encoder_length=512, decoder_length=128, rows_per_batch=64)
    before = anonymous_bytes()
    corpus = Corpus.open(folder)
    indices = select_tasks(corpus.tasks)
    mixture = Mixture(corpus, indices, seed=0)
    joiner = Joiner(corpus, encoder_length=512, decoder_length=128)
    memory, rates, processor, encoder_tokens, decoder_tokens = 0, [], 0.0, 0, 0
    for repeat in range(repeats):
        begin, begin_processor = time.perf_counter(), time.process_time()
        for window in range(draws // WINDOW):
            encoder, decoder = joiner.join(mixture.draws((repeat * draws // WINDOW + window) * WINDOW, WINDOW))
            encoder_tokens += len(encoder.tokens)
            decoder_tokens += len(decoder.tokens)
        rates.append(draws // WINDOW * WINDOW / (time.perf_counter() - begin))
        processor += time.process_time() - begin_processor
        memory = max(memory, anonymous_bytes() - before)
    stream = BatchStream(corpus, mixture, shape)
    steps, begin = 300, time.perf_counter()
    for step in range(steps):
        stream.batch(step)
    batches = steps / (time.perf_counter() - begin)
    memory = max(memory, anonymous_bytes() - before)
    handles = len(os.listdir("/proc/self/fd"))
    report = stream.report(16)
    closed, opened = [], []
    for step in np.random.default_rng(0).integers(0, 10**7, 7).tolist():
        begin = time.perf_counter()
        again = Corpus.open(folder)
        middle = time.perf_counter()
        BatchStream(again, Mixture(again, indices, seed=0), shape).batch(step)
        opened.append(time.perf_counter() - middle)
        closed.append(time.perf_counter() - begin)
    total = draws // WINDOW * WINDOW * repeats
    return {
        "tasks": len(indices),
        "examples_per_s": round(statistics.median(rates)),
        "examples_per_s_range": [round(min(rates)), round(max(rates))],
        "examples_per_processor_s": round(total / processor),
        "tokens_per_s": round(statistics.median(rates) * (encoder_tokens + decoder_tokens) / total),
        "mean_encoder_tokens": round(encoder_tokens / total, 1),
        "mean_decoder_tokens": round(decoder_tokens / total, 1),
        "packed_batches_per_s": round(batches, 1),
        "packed_examples_per_s": round(batches * shape.rows_per_batch * report.examples_per_row),
        "encoder_fill": round(report.encoder_fill, 4),
        "decoder_fill": round(report.decoder_fill, 4),
        "leftover_share": round(report.leftovers / report.draws, 5),
        "file_handles": handles,
        "anonymous_mb": round(memory / 1e6, 1),
        "resume_s": round(statistics.median(closed), 4),
        "resume_s_range": [round(min(closed), 4), round(max(closed), 4)],
        "resume_open_corpus_s": round(statistics.median(opened), 4),
    }


def measure_peer(folder: Path, seconds: float) -> dict[str, Any]:
    """Rate of ``datasets``' interleaved streams over the parquet files."""
    from datasets import disable_progress_bars, interleave_datasets, load_dataset

    disable_progress_bars()
    before = anonymous_bytes()
    begin = time.perf_counter()
    files = {path.stem: str(path) for path in sorted(folder.glob("*.parquet"))}
    streams = load_dataset("parquet", data_files=files, streaming=True)
    share = [1 / len(files)] * len(files)
    rows = iter(interleave_datasets(list(streams.values()), probabilities=share, seed=0))
    next(rows)
    ready = time.perf_counter()
    count = 0
    while time.perf_counter() - ready < seconds:
        next(rows)
        count += 1
    rate = count / (time.perf_counter() - ready)
    return {
        "peer_examples_per_s": round(rate, 1),
        "peer_examples": count,
        "peer_first_example_s": round(ready - begin, 1),
        "peer_file_handles": len(os.listdir("/proc/self/fd")),
        "peer_anonymous_mb": round((anonymous_bytes() - before) / 1e6, 1),
    }


def run_part(*arguments: str) -> dict[str, Any]:
    """Run a part of this script in a process of its own on one thread, and read its figures."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def main() -> None:
    """Write the data, measure both sides, print one JSON object last."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--corpus", type=Path, help="measure this compiled corpus in place of random ones; no peer")
    parser.add_argument("--folder", type=Path, help="where random data is written (a temporary folder, removed)")
    parser.add_argument("--tasks", type=int, default=1000)
    parser.add_argument("--many-tasks", type=int, default=10_000, help="number of tasks of the larger corpus")
    parser.add_argument("--draws", type=int, default=204_800, help="draws of each of the five repeats")
    parser.add_argument("--peer-seconds", type=float, default=30)
    parser.add_argument("--part", choices=["write", "parquet", "ours", "peer"], help=argparse.SUPPRESS)
    parser.add_argument("paths", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        figures: dict[str, Any] = {}
        paths = [Path(path) for path in options.paths]
        if options.part == "write":
            write_corpus(paths[0], options.tasks)
        elif options.part == "parquet":
            write_parquet(paths[0], paths[1])
        elif options.part == "ours":
            figures = measure_ours(paths[0], options.draws, 5)
        else:
            figures = measure_peer(paths[0], options.peer_seconds)
        print(json.dumps(figures))
        return
    draws = ("--draws", str(options.draws))
    machine = {"cpu": platform.machine(), "cores": os.cpu_count(), "python": platform.python_version()}
    if options.corpus:
        print(json.dumps(run_part("--part", "ours", *draws, str(options.corpus)) | machine))
        return
    folder = Path(tempfile.mkdtemp(dir=options.folder))
    try:
        for name, tasks in (("few", options.tasks), ("many", options.many_tasks)):
            begin = time.perf_counter()
            run_part("--part", "write", "--tasks", str(tasks), str(folder / name))
            print(f"wrote {tasks} tasks in {time.perf_counter() - begin:.0f} s", flush=True)
        few = run_part("--part", "ours", *draws, str(folder / "few"))
        print(f"ours, {options.tasks} tasks: {json.dumps(few)}", flush=True)
        many = run_part("--part", "ours", *draws, str(folder / "many"))
        print(f"ours, {options.many_tasks} tasks: {json.dumps(many)}", flush=True)
        run_part("--part", "parquet", str(folder / "few"), str(folder / "parquet"))
        peer = run_part("--part", "peer", "--peer-seconds", str(options.peer_seconds), str(folder / "parquet"))
        print(f"datasets, {options.tasks} tasks: {json.dumps(peer)}", flush=True)
        result: dict[str, Any] = few | peer | machine
        result["speed_ratio"] = round(few["examples_per_s"] / peer["peer_examples_per_s"])
        result["many_tasks"] = many["tasks"]
        result["many_examples_per_s"] = many["examples_per_s"]
        result["many_ratio"] = round(many["examples_per_s"] / few["examples_per_s"], 3)
        result["many_processor_ratio"] = round(many["examples_per_processor_s"] / few["examples_per_processor_s"], 3)
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
