# SPDX-License-Identifier: Apache-2.0
"""Small tasks to compile, for test_compile.py and test_shards.py."""

from pathlib import Path

import numpy as np

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

PLAIN = PromptTemplate(name="t", text="Do it:\n{input}")
LABELS = ("red", "green", "blue")


def make_task(number=0, count=40, *, labels=None, examples=None, **changes):
    def generate():
        rng = np.random.default_rng(number)
        for i in range(count):
            if labels is None:
                yield Example(input=f"text {number} {i}", outputs=(f"answer {rng.integers(9)}",))
            else:
                yield Example(
                    input=f"text {number} {i}", outputs=(labels[int(rng.integers(len(labels)))],), options=labels
                )

    listed = generate if examples is None else lambda: iter(examples)
    settings = {"category": "c", "family": f"family {number}", "templates": (PLAIN,), "examples": listed}
    return Task(task_id=f"task {number}", **(settings | changes))


def compiled(tasks, folder, **settings):
    defaults = {"tokenizer": ByteTokenizer(), "progress": False, "source": {"name": "test"}}
    return compile_tasks(tasks, folder, **(defaults | settings))


def files(folder):
    return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir())}


def leftovers(folder):
    return [path.name for path in Path(folder).parent.iterdir() if path.name.startswith(Path(folder).name)]
