# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest
import torch

from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

_WORDS = ("apple", "bear", "cup", "door", "egg", "fox", "gate", "hat", "ink", "jar")


def _templates(instruction, *, with_options, verbalizer=None):
    texts = [f"{instruction}\n{{input}}", f"{{input}}\n{instruction} now"]
    if with_options:
        texts = [f"{text} Options: {{options}}" for text in texts]
    roles = ("train", "heldout")
    return tuple(
        PromptTemplate(name=f"t{k}", text=text, role=roles[k], verbalizer=verbalizer if k == 0 else None)
        for k, text in enumerate(texts)
    )


def _examples(kind, salt, count):
    for number in range(count):
        words = [_WORDS[(number * 3 + salt * 5 + k * (1 + number // 10)) % 10] for k in range(3)]
        text = f"{number} {' '.join(words)}"
        if kind == "closed":
            label = ("yes", "no", "unsure")[(number * number + salt) % 3]
            yield Example(input=text, outputs=(label,), options=("yes", "no", "unsure"))
        elif kind == "open":
            options = (words[0], words[1] + "s", "none")
            answer = options[(number + salt) % 3]
            yield Example(input=text, outputs=(answer, "nothing"), options=options)
        else:
            yield Example(
                input=text, outputs=(words[salt % 3], f"{words[salt % 3]} it is") if number % 2 else (words[0],)
            )


def _task(task_id, category, kind, salt, *, role="train", count=24, **more):
    task = Task(
        task_id=task_id,
        category=category,
        family=f"family {task_id}",
        templates=_templates(f"Do {task_id}:", with_options=kind != "free", verbalizer=more.pop("verbalizer", None)),
        examples=lambda: _examples(kind, salt, count),
        role=role,
        metric="exact_match" if salt % 2 else "rouge_l",
    )
    return dataclasses.replace(task, **more)


@pytest.fixture(scope="session")
def evaluation_corpus(tmp_path_factory):
    """Four training and six held-out tasks of all kinds of answers, in bytes; categories c and d are never trained."""
    tasks = [
        _task("train closed", "a", "closed", 0, count=60),
        _task("train open", "a", "open", 1, count=60),
        _task("train free", "b", "free", 2, count=60),
        _task("train free 2", "b", "free", 1, count=60),
        _task("seen closed", "a", "closed", 3, role="heldout", verbalizer=("agreed", "denied", "open")),
        _task("seen free", "b", "free", 4, role="heldout", count=5),
        _task("new closed", "c", "closed", 5, role="heldout"),
        _task("new open", "c", "open", 6, role="heldout"),
        _task("new free", "d", "free", 7, role="heldout"),
        _task("new free 2", "d", "free", 8, role="heldout"),
    ]
    folder = tmp_path_factory.mktemp("corpus") / "compiled"
    return compile_tasks(tasks, folder, tokenizer=ByteTokenizer(), heldout_fraction=0.2, progress=False)


@pytest.fixture
def double_precision():
    """Seeded, with float64 as torch's default type."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)
