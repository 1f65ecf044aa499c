# SPDX-License-Identifier: Apache-2.0
"""GeneticPromptSearch on two gloo ranks: the same prompts as on one, under ddp, zeropp and FSDP2.

The learning rate is too small to change a weight, so all strategies search with the very same model in every round.
"""

import json
import time

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ModelParallelStrategy

from lightning_zeroprompt.callbacks import GeneticPromptSearch
from lightning_zeroprompt.callbacks import genetic_prompt_search as module
from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer
from lightning_zeroprompt.models.module import Text2TextModule
from lightning_zeroprompt.prompts import clock
from lightning_zeroprompt.prompts.forward import T5Forward
from lightning_zeroprompt.strategies import ZeroPPStrategy

SETTINGS = {"tasks": ["choice", "free"], "population": 6, "generations": 2, "k": 12, "neighbours": 2, "max_tokens": 900}


def make_task(name, free, role, salt):
    def examples():
        for number in range(40):
            answer = "ab"[(number // 2 + salt) % 2] * (1 + number % 3 if free else 1)
            options = None if free else ("a", "b")
            yield Example(input=f"{number} " + "xy"[number % 2] * (number % 7), outputs=(answer,), options=options)

    texts = [f"Say it as {name} does: {{input}}", f"{{input}} And now? {name}"]
    templates = tuple(
        PromptTemplate(name=f"t{place}", text=text if free else text + " {options}") for place, text in enumerate(texts)
    )
    return Task(task_id=name, category=f"free {free}", family=name, templates=templates, examples=examples, role=role)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tasks = [make_task(f"train {salt}", salt > 1, "train", salt) for salt in range(4)]
    tasks += [make_task("choice", False, "heldout", 0), make_task("free", True, "heldout", 1)]
    path = tmp_path_factory.mktemp("search") / "corpus"
    compile_tasks(tasks, path, tokenizer=ByteTokenizer(), progress=False)
    return str(path)


def evaluation(corpus, task_indices, *, num_replicas, rank):
    plan = plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=1, templates_per_task=1))
    return [EvaluationDataset(corpus, plan, rank=rank, num_ranks=num_replicas)]


def strategy_of(name):
    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1, save_distributed_checkpoint=False)
    return ZeroPPStrategy(num_microbatches=2, save_distributed_checkpoint=False) if name == "zeropp" else name


def search(folder, output, strategy, devices=1, spy=False, ckpt_path=None, steps=4, **settings):
    corpus = Corpus.open(folder)
    callback = GeneticPromptSearch(**SETTINGS | settings)
    scored = []
    if spy:
        score = T5Forward._score

        def spied(self, batch):
            scored.append(len(batch["input_ids"]))
            return score(self, batch)

        T5Forward._score = spied
    try:
        trainer = Trainer(
            accelerator="cpu",
            devices=devices,
            strategy=strategy_of(strategy),
            max_steps=steps,
            max_epochs=-1,
            val_check_interval=2,
            check_val_every_n_epoch=None,
            callbacks=[callback],
            logger=False,
            default_root_dir=output,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        # Too small to change a weight.
        optimizer = {"learning_rate": 1e-30}
        text_module = Text2TextModule(
            vocab_size=corpus.vocab_size, size="nano", optimizer=optimizer, overrides={"dropout": 0.0}
        )
        data = TaskDataModule(
            corpus, steps=8, encoder_length=96, decoder_length=32, rows_per_batch=4, evaluation=evaluation
        )
        trainer.fit(text_module, data, ckpt_path=ckpt_path, weights_only=True)
        if ckpt_path is None:
            trainer.save_checkpoint(f"{output}/end.ckpt")
        trainer.validate(text_module, data, verbose=False)
    finally:
        if spy:
            T5Forward._score = score
    return json.dumps(callback.records), sum(scored)


@pytest.mark.parametrize("strategy", ["ddp", "zeropp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_ranks_find_what_one_process_finds(run_ranks, folder, tmp_path, strategy):
    alone, pairs = search(folder, str(tmp_path / "one"), "auto", spy=True)
    found = run_ranks(search, 2, folder, str(tmp_path / "two"), strategy, 2, True)
    texts = {records for records, _ in found}
    assert len(texts) == 1
    mine, theirs = json.loads(alone), json.loads(texts.pop())
    for one, two in zip(mine, theirs, strict=True):
        assert one["rounds"] == two["rounds"] == 3
        assert [one[name] for name in ("prompt", "manual", "kept", "scorings", "lineage")] == [
            two[name] for name in ("prompt", "manual", "kept", "scorings", "lineage")
        ]
        assert two["scores"]["test"]["manual"]["fitness"] == pytest.approx(
            one["scores"]["test"]["manual"]["fitness"], abs=1e-5
        )
    shares = [share for _, share in found]
    if strategy == "fsdp2":
        # Its collectives need every rank in every batch.
        assert shares == [pairs, pairs]
    else:
        assert sum(shares) == pairs
        assert min(shares) > 0.3 * pairs
    assert (tmp_path / "two" / "prompts.json").is_file()


def test_a_checkpoint_of_a_pipeline_goes_on_on_one_device(run_ranks, folder, tmp_path):
    run_ranks(search, 2, folder, str(tmp_path / "two"), "zeropp", 2)
    stored = torch.load(tmp_path / "two" / "end.ckpt", weights_only=True)["callbacks"]["GeneticPromptSearch"]
    assert stored["validations"] == 2
    whole, _ = search(folder, str(tmp_path / "whole"), "auto", steps=6)
    resumed, _ = search(
        folder, str(tmp_path / "resumed"), "auto", steps=6, ckpt_path=str(tmp_path / "two" / "end.ckpt")
    )
    for one, two in zip(json.loads(whole), json.loads(resumed), strict=True):
        assert one["prompt"] == two["prompt"]
        assert one["scorings"] == two["scorings"]
        assert one["rounds"] == two["rounds"] == 4


def search_in_time(folder, output, slow_rank):
    """Ranks whose clocks say different things."""
    original = clock.TimeBudget.__init__.__kwdefaults__["now"]
    clock.TimeBudget.__init__.__kwdefaults__["now"] = lambda: (
        time.perf_counter() * (50 if torch.distributed.get_rank() == slow_rank else 1)
    )
    try:
        return search(folder, output, "ddp", 2, generations=1000, time_budget=1.0, tasks=["choice"], steps=2)
    finally:
        clock.TimeBudget.__init__.__kwdefaults__["now"] = original


def test_rank_0_decides_about_time(run_ranks, folder, tmp_path):
    (one, _), (two, _) = run_ranks(search_in_time, 2, folder, str(tmp_path), 1)
    assert one == two
    assert json.loads(one)[0]["generations"] > 2


def search_apart(folder, output):
    """Ranks whose models differ."""
    score = T5Forward._score

    def other(self, batch):
        totals = score(self, batch)
        return totals + torch.distributed.get_rank() * torch.arange(len(totals))

    T5Forward._score = other
    sharded, module.ShardedForward = module.ShardedForward, lambda forward: forward
    try:
        return search(folder, output, "ddp", 2)
    finally:
        T5Forward._score, module.ShardedForward = score, sharded


def test_ranks_that_disagree_are_an_error(run_ranks, folder, tmp_path):
    with pytest.raises(Exception, match="the ranks have found different prompts"):
        run_ranks(search_apart, 2, folder, str(tmp_path))
