# SPDX-License-Identifier: Apache-2.0
"""TaskDataModule under a real Trainer: what reaches the module, across resumes, workers, epochs and ranks."""

import hashlib
import json
import pickle
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.data import Dataset

import lightning_zeroprompt.data as data
from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.datamodule import Loader, TaskBatches, TaskDataModule
from lightning_zeroprompt.data.mixture import MixtureSettings
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

STEPS = 12


def make_corpus(folder, *, word="word"):
    def examples(number):
        for count in range(60):
            text = f"{word} {count} of {number} " + "z" * (count * 7 % 40)
            yield Example(input=text, outputs=(("yes", "no")[count % 2],), options=("yes", "no"))

    tasks = [
        Task(
            task_id=f"task{number}",
            category=f"c{number % 2}",
            family=f"f{number}",
            templates=(
                PromptTemplate(name="a", text="{input} {options}?"),
                PromptTemplate(name="b", text="Is {input}"),
            ),
            examples=lambda number=number: examples(number),
        )
        for number in range(5)
    ]
    return compile_tasks(tasks, folder, tokenizer=ByteTokenizer(), progress=False)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_corpus(tmp_path_factory.mktemp("datamodule") / "corpus")


def make_module(corpus, **settings):
    shape = {"steps": STEPS, "encoder_length": 128, "decoder_length": 32, "rows_per_batch": 4, "window_steps": 5}
    return TaskDataModule(corpus, **(shape | settings))


def digest(batch):
    content = hashlib.sha256()
    for name in sorted(batch):
        content.update(name.encode() + batch[name].numpy().tobytes())
    return content.hexdigest()


class Recorder(LightningModule):
    """Notes every batch; its one weight counts the batches trained on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        self.seen.append(digest({name: value.cpu() for name, value in batch.items()}))
        return self.weight * 1.0

    def validation_step(self, batch, batch_idx):
        self.validated = [*getattr(self, "validated", []), batch]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class SaveAfter(Callback):
    """Saves a checkpoint in the middle of an epoch, and stops there if asked to."""

    def __init__(self, batches, path, hook="on_train_batch_end"):
        self.batches, self.path, self.count = batches, path, 0
        setattr(self, hook, self._save)

    def _save(self, trainer, *_):
        self.count += 1
        if self.count == self.batches:
            trainer.save_checkpoint(self.path)


def fit(module, datamodule, *, ckpt_path=None, callbacks=(), **settings):
    options = {
        "max_epochs": 1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
    }
    trainer = Trainer(**(options | settings), callbacks=list(callbacks))
    trainer.fit(module, datamodule=datamodule, ckpt_path=ckpt_path)
    return trainer


def expected(corpus, count, **settings):
    dataset = TaskBatches(make_module(corpus, **settings).stream)
    return [digest(dataset[step]) for step in range(count)]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_run_sees_the_steps_in_order(corpus, num_workers):
    module = Recorder()
    fit(module, make_module(corpus, num_workers=num_workers))
    assert module.seen == expected(corpus, STEPS)
    assert len(set(module.seen)) == STEPS


@pytest.mark.parametrize("workers", [(0, 0), (2, 0), (0, 2)])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_resumed_run_goes_on_exactly(corpus, tmp_path, workers, stop):
    """The checkpoint is written in the middle of an epoch, while workers have prefetched further batches."""
    path = tmp_path / "middle.ckpt"
    first = Recorder()
    fit(first, make_module(corpus, num_workers=workers[0]), callbacks=[SaveAfter(stop, path)])
    second = Recorder()
    trainer = fit(second, make_module(corpus, num_workers=workers[1]), ckpt_path=path)
    assert first.seen[:stop] + second.seen == expected(corpus, STEPS)
    assert trainer.global_step == STEPS
    assert second.weight.item() == first.weight.item()


def test_a_checkpoint_written_outside_the_step_resumes_exactly(corpus, tmp_path):
    """Written before a batch is trained on, the checkpoint's run begins with that batch."""
    path = tmp_path / "start.ckpt"
    first = Recorder()
    fit(first, make_module(corpus), callbacks=[SaveAfter(6, path, "on_train_batch_start")])
    second = Recorder()
    fit(second, make_module(corpus), ckpt_path=path)
    assert second.seen == expected(corpus, STEPS)[5:]


def test_stopping_at_a_step_and_fitting_further_goes_on(corpus, tmp_path):
    first = Recorder()
    trainer = fit(first, make_module(corpus), max_epochs=-1, max_steps=5)
    trainer.save_checkpoint(tmp_path / "five.ckpt")
    second = Recorder()
    fit(second, make_module(corpus), max_epochs=-1, max_steps=9, ckpt_path=tmp_path / "five.ckpt")
    assert first.seen + second.seen == expected(corpus, 9)


@pytest.mark.parametrize("stop", [None, 4, 6, 8])
def test_later_epochs_bring_new_batches_also_after_a_resume(corpus, tmp_path, stop):
    path = tmp_path / "epochs.ckpt"
    first = Recorder()
    callbacks = [] if stop is None else [SaveAfter(stop, path)]
    fit(first, make_module(corpus, steps=4), max_epochs=3, callbacks=callbacks)
    assert first.seen == expected(corpus, 12)
    if stop is not None:
        second = Recorder()
        fit(second, make_module(corpus, steps=4), max_epochs=3, ckpt_path=path)
        assert second.seen == first.seen[stop:]


def test_epochs_cut_short_leave_no_batch_out(corpus):
    module = Recorder()
    fit(module, make_module(corpus), max_epochs=2, limit_train_batches=5)
    assert module.seen == expected(corpus, 10)


def test_accumulated_batches_are_counted(corpus, tmp_path):
    path = tmp_path / "accumulated.ckpt"
    first = Recorder()
    fit(first, make_module(corpus), accumulate_grad_batches=3, callbacks=[SaveAfter(6, path)])
    second = Recorder()
    trainer = fit(second, make_module(corpus), accumulate_grad_batches=3, ckpt_path=path)
    assert first.seen[:6] + second.seen == expected(corpus, STEPS)
    assert trainer.global_step == 4


def test_other_data_is_refused_with_both_hashes(corpus, tmp_path):
    path = tmp_path / "checkpoint.ckpt"
    fit(Recorder(), make_module(corpus), callbacks=[SaveAfter(2, path)])
    changed = make_corpus(tmp_path / "changed", word="other")
    with pytest.raises(
        ValueError, match=f"another corpus: it has {corpus.fingerprint}, this run has {changed.fingerprint}"
    ):
        fit(Recorder(), make_module(changed), ckpt_path=path)
    for settings, name in [
        ({"seed": 1}, "mixture"),
        ({"num_tasks": 2}, "mixture"),
        ({"mixture": MixtureSettings(denoising=0)}, "mixture"),
        ({"rows_per_batch": 8}, "packing"),
    ]:
        with pytest.raises(ValueError, match=f"trained on another {name}: it has"):
            fit(Recorder(), make_module(corpus, **settings), ckpt_path=path)
    state = torch.load(path, weights_only=True)["TaskDataModule"]
    assert state["step"] == 2
    assert state["corpus"] == corpus.fingerprint


def test_a_checkpoint_is_evaluated_on_other_data(corpus, tmp_path):
    path = tmp_path / "checkpoint.ckpt"
    fit(Recorder(), make_module(corpus), callbacks=[SaveAfter(2, path)])
    other = make_module(make_corpus(tmp_path / "changed", word="other"), evaluation=evaluation)
    module = Recorder()
    trainer = Trainer(accelerator="cpu", devices=1, logger=False, enable_progress_bar=False)
    trainer.validate(module, datamodule=other, ckpt_path=path, verbose=False)
    assert len(module.validated) == 3


class Items(Dataset):
    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def evaluation(corpus, task_indices, *, num_replicas, rank):
    return [Items([{"references": [["a", "b"]], "rank": rank, "of": num_replicas, "tasks": len(task_indices)}] * 3)]


def test_validation_batches_reach_the_module_as_they_are(corpus):
    module = Recorder()
    fit(module, make_module(corpus, evaluation=evaluation, num_tasks=2))
    assert module.validated == [{"references": [["a", "b"]], "rank": 0, "of": 1, "tasks": 2}] * 3
    assert make_module(corpus).val_dataloader() == []


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("replicas", [1, 2, 4])
def test_the_global_batch_depends_on_neither_ranks_nor_workers(corpus, replicas, num_workers):
    stream = make_module(corpus, soft_prompt_length=2).stream
    loaders = [
        Loader(Steps(TaskBatches(stream, rank, replicas), 7), num_workers=num_workers) for rank in range(replicas)
    ]
    for step, parts in enumerate(zip(*loaders, strict=True)):
        whole = TaskBatches(stream)[step]
        for name, value in whole.items():
            merged = torch.stack([part[name] for part in parts], dim=1).flatten(0, 1)
            assert torch.equal(merged, value)
            assert merged.dtype == value.dtype


class Steps(Items):
    def __init__(self, items, count):
        super().__init__(items)
        self.count = count

    def __len__(self):
        return self.count


def test_spawned_workers_open_the_corpus_themselves(corpus):
    dataset = TaskBatches(make_module(corpus, num_tasks=3, seed=4).stream, 1, 2)
    stored = pickle.dumps(dataset)
    assert len(stored) < 2000
    assert digest(pickle.loads(stored)[3]) == digest(dataset[3])


def test_a_data_module_in_use_can_be_sent_to_another_process(corpus):
    module = make_module(corpus, tasks=[2, 0])
    batch = next(iter(module.train_dataloader()))
    stored = pickle.dumps(module)
    assert len(stored) < 5000
    assert digest(next(iter(pickle.loads(stored).train_dataloader()))) == digest(batch)


def test_ranks_come_from_the_strategy_not_from_the_world(corpus):
    """Four processes, two of them data-parallel: model-parallel ranks read the same rows."""
    module = make_module(corpus)
    module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 2, "rank": 1}, world_size=4)
    loader = module.train_dataloader()
    assert (loader.dataset.num_replicas, loader.dataset.rank) == (2, 1)
    module.trainer = SimpleNamespace(distributed_sampler_kwargs={"num_replicas": 3, "rank": 1}, world_size=3)
    with pytest.raises(ValueError, match=r"4 / 3 = 1.33 rows a rank"):
        module.train_dataloader()


SCRIPT = """
import json, sys, torch
from lightning.pytorch import Trainer
sys.path.insert(0, {folder!r})
import test_datamodule as t
from lightning_zeroprompt.data.corpus import Corpus

class Save(t.Recorder):
    def on_train_end(self):
        assert not {{"datasets", "pyarrow"}} & set(sys.modules)
        with open({out!r} + f"/{{self.trainer.global_rank}}.json", "w") as file:
            json.dump(self.seen, file)

    def validation_step(self, batch, batch_idx):
        assert (batch["rank"], batch["of"]) == (self.trainer.global_rank, 2)

if __name__ == "__main__":
    data = t.make_module({corpus!r}, num_workers=1, evaluation=t.evaluation)
    trainer = t.fit(Save(), data, devices=2, strategy="ddp_fork", ckpt_path={ckpt!r})
"""


def test_two_ddp_ranks_share_each_batch_and_resume_a_run_of_one(corpus, tmp_path):
    """With use_distributed_sampler left at its default, no sampler is put between: the ranks' rows are the batch."""
    path = tmp_path / "one.ckpt"
    fit(Recorder(), make_module(corpus), callbacks=[SaveAfter(5, path)])
    script = tmp_path / "script.py"
    folder = __file__.rsplit("/", 1)[0]
    script.write_text(SCRIPT.format(folder=folder, out=str(tmp_path), corpus=str(corpus.path), ckpt=str(path)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    stream = make_module(corpus).stream
    for rank in range(2):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        dataset = TaskBatches(stream, rank, 2)
        assert seen == [digest(dataset[step]) for step in range(5, STEPS)]


def test_a_loader_without_a_trainer_counts_for_itself(corpus):
    module = make_module(corpus)
    iterator = iter(loader := module.train_dataloader())
    seen = [digest(next(iterator)) for _ in range(5)]
    state = module.state_dict()
    assert state["step"] == 5
    assert len(loader) == STEPS
    again = make_module(corpus)
    again.load_state_dict(state)
    assert seen + [digest(batch) for batch in again.train_dataloader()] == expected(corpus, STEPS)


def test_tasks_are_chosen_by_number_or_by_name(corpus):
    assert sorted(make_module(corpus).task_indices) == [0, 1, 2, 3, 4]
    assert make_module(corpus, tasks=[3, 1]).task_indices == (3, 1)
    few = make_module(corpus, num_tasks=2)
    assert set(few.task_indices) < set(make_module(corpus, num_tasks=3).task_indices)
    assert few.mixture.task_indices.tolist() == list(few.task_indices)
    assert few.packing_report(1).windows == 1
    with pytest.raises(ValueError, match="give one of the two"):
        make_module(corpus, tasks=[1], num_tasks=1)
    with pytest.raises(ValueError, match="asked for 6 training tasks; the corpus has 5"):
        make_module(corpus, num_tasks=6).setup("fit")
    with pytest.raises(ValueError, match="steps is 0"):
        make_module(corpus, steps=0)
    with pytest.raises(ValueError, match="no compiled corpus at"):
        make_module(corpus.path / "nowhere").setup("validate")


def test_public_names_are_loaded_at_first_use():
    assert data.TaskDataModule is TaskDataModule
    assert data.Task is Task
    with pytest.raises(AttributeError, match=r"has no attribute 'Nothing'; it has: Mixture, Task"):
        data.Nothing  # noqa: B018
    code = "import sys, lightning_zeroprompt.data, lightning_zeroprompt.data.join, lightning_zeroprompt.data.packing\n"
    code += "print([m for m in ('torch', 'lightning', 'datasets', 'pyarrow', 'tokenizers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
