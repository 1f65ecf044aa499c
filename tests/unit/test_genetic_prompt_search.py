# SPDX-License-Identifier: Apache-2.0
"""GeneticPromptSearch in a Trainer on one device."""

import json

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_zeroprompt.callbacks import GeneticPromptSearch
from lightning_zeroprompt.data.datamodule import TaskDataModule
from lightning_zeroprompt.data.evaluation import EvaluationDataset, EvaluationSettings, plan_evaluation
from lightning_zeroprompt.models.module import Text2TextModule

TASKS = ["seen closed", "new open", "new free"]
SETTINGS = {"tasks": TASKS, "population": 6, "generations": 2, "k": 10}


class Killed(Callback):
    """Ends a run at step 5, behind the round of step 4."""

    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 5:
            raise RuntimeError("killed")


def evaluation(corpus, task_indices, *, num_replicas, rank):
    plan = plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=1, templates_per_task=1))
    return [EvaluationDataset(corpus, plan, rank=rank, num_ranks=num_replicas)]


def data_of(corpus, steps):
    return TaskDataModule(
        corpus, steps=steps, encoder_length=128, decoder_length=64, rows_per_batch=2, evaluation=evaluation
    )


def module_of(corpus, **more):
    return Text2TextModule(vocab_size=corpus.vocab_size, size="nano", **more)


def trainer_of(folder, callbacks, steps=4, logger=False, every=1, **more):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=every,
        check_val_every_n_epoch=None,
        callbacks=callbacks,
        logger=logger,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=1,
        **more,
    )


def fit(corpus, folder, callback, steps=4, ckpt_path=None, every=2, **more):
    trainer = trainer_of(
        folder, [callback, *more.pop("callbacks", [])], steps, every=every, enable_checkpointing=True, **more
    )
    module, data = module_of(corpus), data_of(corpus, 8)
    trainer.fit(module, data, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module, data


def test_rounds_in_a_fit_and_a_last_one_behind_it(evaluation_corpus, tmp_path):
    callback = GeneticPromptSearch(**SETTINGS)
    logger = TensorBoardLogger(tmp_path, name="", version="")
    trainer, module, data = fit(evaluation_corpus, tmp_path, callback, logger=logger)
    during = json.loads((tmp_path / "prompts.json").read_text())
    assert [record["task"] for record in during["tasks"]] == TASKS
    for record in during["tasks"]:
        assert record["scores"]["test"] is None
        assert record["scorings"]["test"] == 0
        assert (record["rounds"], record["model_step"], record["mode"]) == (2, 4, "few_label")
        assert [entry["step"] for entry in record["history"]] == [2, 2, 2, 4, 4, 4]
    trainer.validate(module, data, verbose=False)
    data_after = json.loads((tmp_path / "prompts.json").read_text())
    for record in data_after["tasks"]:
        assert record["rounds"] == 3
        assert record["scores"]["test"]["manual"]["outcome"] >= 0
        assert record["scorings"]["test"] > 0
    assert "## new free" in (tmp_path / "prompts.md").read_text()
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0, "images": 0})
    events.Reload()
    assert [event.step for event in events.Scalars("prompts/new open/best")] == list(range(1, 10))
    assert {"prompts/new free/diversity", "prompts/new free/median", "prompts/seen closed/mean"} <= set(
        events.Tags()["scalars"]
    )
    assert "prompts" in events.Tags()["images"]
    (text, *_) = events.Tensors("prompts/new open/text_summary")
    assert b"manual" in text.tensor_proto.string_val[0]


def test_validations_between_rounds_and_an_untrained_model(evaluation_corpus, tmp_path):
    callback = GeneticPromptSearch(**SETTINGS | {"tasks": ["new open"]}, every_n_validations=2)
    _, _, data = fit(evaluation_corpus, tmp_path, callback, every=1)
    assert callback.records[0]["rounds"] == 2
    fresh = GeneticPromptSearch(**SETTINGS)
    trainer_of(tmp_path / "fresh", [fresh]).validate(module_of(evaluation_corpus), data, verbose=False)
    assert fresh.records == []
    assert not (tmp_path / "fresh" / "prompts.json").exists()


@pytest.mark.parametrize(("mode", "task"), [("few_label", "new open"), ("zero_label", "seen closed")])
def test_a_run_that_is_killed_finds_the_same_prompts(evaluation_corpus, tmp_path, mode, task):
    settings = SETTINGS | {"tasks": [task], "mode": mode}

    def checkpoints(name):
        return ModelCheckpoint(tmp_path / name, filename="{step}", every_n_train_steps=3, save_top_k=-1)

    whole = GeneticPromptSearch(**settings)
    fit(evaluation_corpus, tmp_path / "a", whole, steps=6, callbacks=[checkpoints("whole")])
    first = GeneticPromptSearch(**settings)
    with pytest.raises(RuntimeError, match="killed"):
        fit(evaluation_corpus, tmp_path / "b", first, steps=6, callbacks=[checkpoints("cut"), Killed()])
    path = tmp_path / "cut" / "step=3.ckpt"
    stored = torch.load(path, weights_only=True)["callbacks"]["GeneticPromptSearch"]
    assert stored["searches"].keys() == {task}
    assert (stored["validations"], first.records[0]["rounds"]) == (1, 2)
    second = GeneticPromptSearch(**settings)
    fit(evaluation_corpus, tmp_path / "c", second, steps=6, ckpt_path=path)
    assert second.records == whole.records
    assert second.records[0]["rounds"] == 3


def test_a_number_of_tasks_and_wordings(evaluation_corpus, tmp_path):
    callback = GeneticPromptSearch(tasks=2, wordings="heldout", k=10, population=4, generations=0, seed=1)
    fit(evaluation_corpus, tmp_path, callback, steps=2)
    assert len(callback.records) == 2
    for record in callback.records:
        # Five rows are too few, so "seen free" is passed over.
        assert record["task"] != "seen free"
        assert record["manual"]["origin"] == "template t1"


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tasks": ["train open"]}, "is trained on"),
        ({"tasks": ["nobody"]}, "is unknown; 6 tasks"),
        ({"tasks": ["new open"], "k": 500}, "give k of at most"),
        ({"tasks": ["new free"], "mode": "zero_label"}, "zero_label needs options"),
        ({"tasks": ["new open"], "k": 10, "budget": 3}, "the manual prompts alone take 2 x 5 = 10"),
        ({"tasks": ["new open"], "operators": {"no such": 1}}, "unknown operators no such"),
        ({"tasks": ["new open"], "operators": {"continue_sentence": 1}}, "needs a text model for 'continuation'"),
        ({"tasks": ["new open"], "continuation_model": "/nowhere"}, "there is no model at /nowhere"),
    ],
)
def test_what_cannot_be_searched_is_said_before_training(evaluation_corpus, tmp_path, settings, match):
    callback = GeneticPromptSearch(**settings)
    with pytest.raises(ValueError, match=match):
        fit(evaluation_corpus, tmp_path, callback)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tasks": []}, "give the ids of tasks"),
        ({"tasks": 0}, "give the ids of tasks"),
        ({"budget": 0}, "budget=0: give at least 1"),
        ({"time_budget": 0.0}, "time_budget=0.0"),
        ({"population": 1}, "population=1: give at least 2"),
        ({"selection": "best"}, "selection='best'"),
        ({"wordings": "new"}, "wordings='new'"),
        ({"every_n_validations": -1}, "every_n_validations=-1"),
        ({"alpha": 1.0}, "alpha=1.0"),
        ({"elite": 40}, "elite=40 cannot be above population=32"),
    ],
)
def test_impossible_settings(settings, match):
    with pytest.raises(ValueError, match=match):
        GeneticPromptSearch(**settings)


def test_a_checkpoint_of_other_searches_is_refused(evaluation_corpus, tmp_path):
    fit(
        evaluation_corpus,
        tmp_path,
        GeneticPromptSearch(**SETTINGS | {"tasks": ["new open"], "generations": 0}),
        steps=2,
    )
    (path,) = tmp_path.rglob("*.ckpt")
    for changed, match in (({"tasks": ["new free"]}, "this run searches for"), ({"seed": 7}, "is of other rows")):
        callback = GeneticPromptSearch(**SETTINGS | {"tasks": ["new open"]} | changed)
        with pytest.raises(ValueError, match=match):
            fit(evaluation_corpus, tmp_path / "other", callback, ckpt_path=path)


def test_lightning_cli_builds_it(tmp_path):
    parser = pytest.importorskip("jsonargparse").ArgumentParser()
    parser.add_class_arguments(GeneticPromptSearch, "search")
    given = parser.parse_args(["--search.tasks=[a, b]", "--search.mode=zero_label", "--search.k=null"])
    built = parser.instantiate_classes(given).search
    assert built._tasks == ["a", "b"]
    assert (built._mode, built._k) == ("zero_label", None)


@pytest.mark.parametrize(
    "soft_prompt", [{"mode": "shared", "length": 3}, {"mode": "per_task", "length": 3, "unseen": "mean"}]
)
def test_soft_prompts(evaluation_corpus, tmp_path, soft_prompt):
    callback = GeneticPromptSearch(
        tasks=["new open"], k=10, population=8, generations=2, operators={"change_soft_prompt": 1, "crossover": 1}
    )
    module = module_of(evaluation_corpus, soft_prompt=soft_prompt, num_tasks=4)
    data = TaskDataModule(
        evaluation_corpus,
        steps=4,
        encoder_length=128,
        decoder_length=64,
        rows_per_batch=2,
        evaluation=evaluation,
        soft_prompt_length=3,
    )
    data.evaluation = lambda corpus, task_indices, *, num_replicas, rank: [
        EvaluationDataset(
            corpus,
            plan_evaluation(corpus, task_indices, EvaluationSettings(examples_per_task=1, templates_per_task=1)),
            soft_prompt_length=3,
            prompt_ids={},
            rank=rank,
            num_ranks=num_replicas,
        )
    ]
    trainer_of(tmp_path, [callback], 2, every=2).fit(module, data)
    (record,) = callback.records
    sources = {entry["genome"]["soft_prompt"] for entry in callback._searches["new open"].lineage.values()}
    assert len(sources) > 1, sources
    assert record["rounds"] == 1
