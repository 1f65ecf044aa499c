# SPDX-License-Identifier: Apache-2.0
"""zeroprompt-train and zeroprompt-eval from end to end, in this process where no fresh one is the point."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_zeroprompt.cli.config import config_dir, report_user_errors
from lightning_zeroprompt.cli.evaluate import evaluate
from lightning_zeroprompt.cli.train import train
from lightning_zeroprompt.data.compile import compile_tasks
from lightning_zeroprompt.data.corpus import Corpus
from lightning_zeroprompt.data.describe import corpus_summary
from lightning_zeroprompt.data.mixture import select_tasks
from lightning_zeroprompt.data.task import Example, PromptTemplate, Task
from lightning_zeroprompt.data.tokenizer import ByteTokenizer

# Few examples leave 5 % empty, and the instance level is the one with the fewest samples.
TINY = (
    "model=nano",
    "trainer.accelerator=cpu",
    "trainer.max_steps=4",
    "trainer.val_check_interval=2",
    "trainer.log_every_n_steps=1",
    "data.num_tasks=20",
    "data.num_source_tasks=30",
    "data.options.examples_per_task=10",
    "data.compile.heldout_fraction=0.2",
    "data.tokenizer=byte",
    "data.encoder_length=160",
    "data.decoder_length=64",
    "data.rows_per_batch=4",
)
EVALUATION = (
    "eval.examples_per_task=1",
    "eval.fit_examples_per_task=1",
    "eval.templates_per_task=1",
    "eval.instance_tasks=4",
    "eval.heldout_wordings=false",
)


def composed(name, *overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("cli-train")


@pytest.fixture(scope="module")
def tiny(root):
    """Configure a run of four steps; the compiled corpus is shared by all."""

    def configure(folder, *more):
        paths = (f"paths.output_dir={folder}", f"paths.compiled_dir={root / 'compiled'}")
        return composed("train", *TINY, *EVALUATION, *paths, *more)

    return configure


@pytest.fixture(scope="module")
def finished(root, tiny):
    folder = root / "run"
    # A checkpoint after step 3 of 4, so that a resumed run has a step to make.
    train(tiny(folder, "callbacks.checkpoint.every_n_train_steps=3", "mixture.denoising=0.3"))
    return folder


def results(folder):
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def weights(path):
    return torch.load(path, weights_only=True)["state_dict"]


def checkpoint_steps(folder):
    """The step of every checkpoint of a run, by name."""
    files = (folder / "checkpoints").iterdir()
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in files}


def test_a_run_leaves_its_results(finished):
    found = results(finished)
    assert found["num_tasks"] == 20
    assert found["steps"] == 4
    assert found["world_size"] == 1
    assert found["tokens_trained"] > 0
    assert 0 <= found["heldout_score"] <= 1
    assert {macro["level"] for macro in found["macro"]} == {"heldout", "category", "task", "instance"}
    assert all(macro["untrained"] is not None for macro in found["macro"])
    assert (finished / "results.png").read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((finished / "results.csv").open(encoding="utf-8")))
    assert {row["level"] for row in rows} == {"category", "task", "instance"}
    # What was composed and what was run are the same, without interpolations.
    assert "${" not in (finished / "config.yaml").read_text(encoding="utf-8")
    assert found["config"]["data"]["num_tasks"] == 20


def test_tensorboard_has_curves_and_hparams(finished):
    scalars, hparams = {}, []
    for file in sorted((finished / "tensorboard").glob("events.*")):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
        hparams += [tag for tag in events.summary_metadata if tag.startswith("_hparams_")]
    assert len(scalars["train/loss"]) == 4
    assert {"throughput/tokens_per_second", "throughput/examples_per_second"} <= set(scalars)
    assert {"heldout/heldout/train", "heldout/category/train", "heldout/task/train"} <= set(scalars)
    assert any(tag.startswith("heldout/categories/") for tag in scalars)
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(hparams)
    last = scalars["final/heldout_normalised"][-1].value
    assert last == pytest.approx(results(finished)["heldout_normalised"], abs=1e-6)


def test_a_resumed_run_ends_with_the_same_weights(finished, tiny, root):
    folder = root / "resumed"
    # Only what a killed run has left: the checkpoint of step 3.
    shutil.copytree(finished / "checkpoints", folder / "checkpoints", symlinks=True)
    (folder / "checkpoints" / "final.ckpt").unlink()
    assert torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    more = ("callbacks.checkpoint.every_n_train_steps=3", "mixture.denoising=0.3", "resume_from=last")
    train(tiny(folder, *more))
    whole = weights(finished / "checkpoints" / "final.ckpt")
    resumed = weights(folder / "checkpoints" / "final.ckpt")
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    before = weights(folder / "checkpoints" / "step-3.ckpt")
    assert any(not torch.equal(whole[name], before[name]) for name in whole)
    assert results(folder)["macro"] == results(finished)["macro"]
    assert checkpoint_steps(folder) == {"step-3.ckpt": 3, "last.ckpt": 4, "final.ckpt": 4}
    # Once more, now in the folder that the checkpoint was written in.
    train(tiny(folder, "trainer.max_steps=7", *more))
    assert checkpoint_steps(folder) == {"step-3.ckpt": 3, "step-6.ckpt": 6, "last.ckpt": 6, "final.ckpt": 7}


def test_a_resumed_run_refuses_other_data(finished, tiny, root, capsys):
    given = f"resume_from={finished / 'checkpoints' / 'last.ckpt'}"
    message = refused(capsys, lambda: train(tiny(root / "other", given, "mixture.denoising=0.1")))
    assert "another mixture" in message
    assert not (root / "other" / "results.json").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(finished, tiny, root, capsys):
    def resumed(path, *more):
        return refused(capsys, lambda: train(tiny(root / "unfit", f"resume_from={path}", *more)))

    path, cut = finished / "checkpoints" / "last.ckpt", root / "cut.ckpt"
    assert "checkpoint's model is T5Config(vocab_size=359, d_model=64" in resumed(path, "model=tiny")
    assert "checkpoint's optimizer is adamw, this run's adafactor" in resumed(path, "optimizer.name=adafactor")
    prompt = ("model.soft_prompt.mode=shared", "model.soft_prompt.length=2")
    assert "checkpoint's soft prompt is" in resumed(path, *prompt)
    for content in (path.read_bytes()[:10_000], b"hi", b""):
        cut.write_bytes(content)
        assert "is no checkpoint of zeroprompt-train, or it is damaged" in resumed(cut)
    assert not (root / "unfit").exists()


def test_evaluation_repeats_the_final_scores(finished, root):
    folder = root / "evaluated"
    arguments = (f"checkpoint={finished / 'checkpoints' / 'final.ckpt'}", f"paths.output_dir={folder}")
    evaluate(composed("eval", "trainer.accelerator=cpu", *arguments, *EVALUATION))
    mine, theirs = results(folder), results(finished)
    assert mine["heldout_normalised"] == theirs["heldout_normalised"]
    peers = ("untrained", "shuffled")
    for one, two in zip(mine["macro"], theirs["macro"], strict=True):
        assert {k: v for k, v in one.items() if k not in peers} == {k: v for k, v in two.items() if k not in peers}
    for name in ("num_tasks", "steps", "tokens_trained", "truncated_inputs"):
        assert mine[name] == theirs[name]


def test_what_is_cut_is_said(finished, tiny, root, capsys):
    assert results(finished)["truncated_inputs"] == results(finished)["packing"]["truncated"] == 0
    train(tiny(root / "cut", "trainer.max_steps=2", "data.encoder_length=80", "data.decoder_length=20"))
    found, printed = results(root / "cut"), " ".join(capsys.readouterr().out.split())
    cut, draws = found["packing"]["truncated"], found["packing"]["draws"]
    inputs, items = found["truncated_inputs"], found["sample_sizes"]["items"]
    assert 0 < cut < draws
    assert 0 < inputs < items
    where = "Cut to fit encoder_length=80 and decoder_length=20"
    assert f"{where}: {cut:,} of {draws:,} training examples" in printed
    assert f"{where}: {inputs:,} of {items:,} evaluation inputs" in printed


def command(*arguments):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-c", "from lightning_zeroprompt.cli.train import main; main()", *map(str, arguments)]
    return subprocess.run(line, env=environment, capture_output=True, text=True, timeout=300)


def test_a_multirun_has_a_folder_a_job_and_goes_on_after_a_failure(finished, root):
    # `finished` has compiled the corpus that the jobs share.
    sweep = root / "sweep"
    shared = (*TINY, *EVALUATION, "trainer.max_steps=2", "callbacks=none", f"paths.compiled_dir={root / 'compiled'}")
    shared = [text for text in shared if not text.startswith("data.num_tasks")]
    done = command("-m", *shared, f"hydra.sweep.dir={sweep}", "hydra.sweep.subdir=${hydra.job.num}",
                   "data.num_tasks=31,10")  # fmt: skip
    assert done.returncode != 0
    assert "asked for 31 training tasks; the corpus has 30" in done.stderr
    assert "data.num_tasks=31" in done.stderr
    assert not (sweep / "0" / "results.json").exists()
    found = results(sweep / "1")
    assert (found["num_tasks"], found["steps"]) == (10, 2)
    (folder,) = (root / "compiled").glob("builtin-*")
    tasks = Corpus.open(folder).tasks
    trained = {row["task_id"] for row in csv.DictReader((sweep / "1" / "results.csv").open())
               if row["level"] == "instance"}  # fmt: skip
    assert trained
    assert trained <= {tasks[index].task_id for index in select_tasks(tasks, 10, 0)}


@pytest.mark.slow  # a resumed job of the pipeline below is one of two ranks, too
@pytest.mark.parametrize(("strategy", "kind"), [("ddp", "DDPStrategy"), ("fsdp2", "ModelParallelStrategy")])
def test_ranks_of_a_multirun_job_share_one_configuration(finished, root, strategy, kind):
    sweep = root / strategy
    shared = (*TINY, *EVALUATION, "trainer.max_steps=2", f"paths.compiled_dir={root / 'compiled'}")
    arguments = (f"strategy={strategy}", "trainer.devices=2", "callbacks=none", "mixture.denoising=0.3")
    done = command("-m", *shared, *arguments, f"hydra.sweep.dir={sweep}", "hydra.sweep.subdir=${hydra.job.num}")
    assert done.returncode == 0, done.stderr
    found = results(sweep / "0")
    assert found["world_size"] == 2
    assert found["strategy"] == kind
    assert found["steps"] == 2
    assert [file.name for file in sweep.glob("*/results.json")] == ["results.json"]


def test_a_pipeline_of_two_ranks_gives_what_one_process_gives(finished, root):
    """Weights to 1e-4 (float32, four steps of AdamW); the resumed run ends with exactly the weights of the first."""
    shared = (*TINY, *EVALUATION, f"paths.compiled_dir={root / 'compiled'}", "strategy=zeropp", "trainer.devices=2",
              "callbacks.checkpoint.every_n_train_steps=3", "mixture.denoising=0.3")  # fmt: skip
    whole, sweep = root / "pipeline", root / "pipeline-resumed"
    done = command(*shared, f"hydra.run.dir={whole}")
    assert done.returncode == 0, done.stderr
    assert "Strategy ZeroPPStrategy on 2 ranks" in done.stdout
    assert done.stdout.count("Run folder") == 1
    found, expected = results(whole), results(finished)
    assert (found["strategy"], found["world_size"], found["steps"]) == ("ZeroPPStrategy", 2, 4)
    assert found["model"] == expected["model"]
    for one, two in zip(found["macro"], expected["macro"], strict=True):
        assert one["nll"] == pytest.approx(two["nll"], rel=1e-3)
    mine, theirs = (weights(folder / "checkpoints" / "final.ckpt") for folder in (whole, finished))
    assert mine.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(mine[name], tensor, atol=1e-4, rtol=0, msg=name)

    done = command("-m", *shared, f"hydra.sweep.dir={sweep}", "hydra.sweep.subdir=${hydra.job.num}",
                   f"resume_from={whole / 'checkpoints' / 'step-3.ckpt'}")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert results(sweep / "0")["macro"] == found["macro"]
    resumed = weights(sweep / "0" / "checkpoints" / "final.ckpt")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in mine.items())

    arguments = (f"checkpoint={whole / 'checkpoints' / 'final.ckpt'}", f"paths.output_dir={root / 'pipeline-eval'}")
    evaluate(composed("eval", "trainer.accelerator=cpu", *arguments, *EVALUATION))
    again = results(root / "pipeline-eval")["heldout_normalised"]
    assert again == pytest.approx(found["heldout_normalised"], abs=1e-6)


def refused(capsys, story):
    """The one line that bad input ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        report_user_errors(story)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.num_tasks=31"], "asked for 31 training tasks; the corpus has 30"),
        (["data.num_tasks=0"], "asked for 0 training tasks"),
        (["data.num_source_tasks=100000"], "100000"),
        (["data.holdout_categories=[countng]"], "hold-out category 'countng' is unknown"),
        (["mixture.max_per_task=0"], "max_per_task is 0"),
        (["mixture.max_per_class=0"], "max_per_class is 0"),
        (["+trainer.limit_val_batches=1"], "trainer.limit_val_batches=1 (trainer.fast_dev_run sets it too)"),
        (["+trainer.fast_dev_run=true"], "set trainer.max_steps"),
        (["trainer.max_steps=0"], "trainer.max_steps=0"),
        (["trainer.val_check_interval=9"], "val_check_interval=9 batches, but the run has 4 x 1 = 4"),
        (["data.source=csv"], "unknown source 'csv'"),
        (["data.rows_per_batch=3", "strategy=ddp", "trainer.devices=2"], "3 / 2 = 1.50 rows a rank"),
        (["strategy=fsdp2", "trainer.devices=auto"], "trainer.devices=auto: sharding needs to know the number"),
        (["strategy=zeropp", "trainer.devices=2", "strategy.strategy.num_microbatches=5"], "num_microbatches=5, but"),
        (["strategy=zeropp", "trainer.devices=2", "strategy.strategy.data_parallel_size=3"], "4 / 3 = 1.33 rows a"),
        (["model.size=gigantic"], "unknown T5 size 'gigantic'; known sizes: nano"),
        (["+model.overrides.d_modle=3"], "unknown T5Config fields ['d_modle']"),
        (["optimizer.name=sgd"], "optimizer name 'sgd' is unknown; use 'adamw' or 'adafactor'"),
        (["resume_from=nowhere/last.ckpt"], "there is no such checkpoint"),
        (["resume_from=last"], "give hydra.run.dir=FOLDER of the run to go on with"),
        (["init_from=nowhere"], "nowhere"),
        (["data.compiled=nowhere"], "nowhere"),
        (["data=parquet", "data.path=nowhere"], "nowhere"),
        (["data=parquet", "data.tokenizer=byte"], "data.path"),
        (["+mixture.denoise=0.5"], "mixture.denoise is unknown; mixture has: block_size, category_exponent, "),
        (["+data.num_task=3"], "data.num_task is unknown; data has: "),
        (["+data.compile.max_example=3"], "data.compile.max_example is unknown; data.compile has: "),
        (["+data.options.example=3"], "source 'builtin' has no option 'example'; it has: examples_per_task, "),
        (["+model.siez=tiny"], "model.siez is unknown; model has: compile, dropout, "),
        (["+model.soft_prompt.size=3"], "model.soft_prompt.size is unknown; model.soft_prompt has: dropout, "),
        (["+optimizer.beta=0.9"], "optimizer.beta is unknown; optimizer has: beta1, beta2, "),
        (["+eval.level=task"], "eval.level is unknown; eval has: examples_per_task, "),
        (["+trainer.max_step=3"], "trainer.max_step is unknown; trainer has: accelerator, "),
        (["+callbacks.checkpoint.top=3"], "callbacks.checkpoint.top is unknown; callbacks.checkpoint has: "),
        (["+callbacks.other=3"], "callbacks.other is 3; it must be a mapping with a _target_"),
        (["+strategy.devices=3"], "strategy.devices is unknown; strategy has: strategy"),
        (["eval.levels=[famlily]"], "give one or more of category, task, instance"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_settings_are_one_line_before_training(finished, tiny, tmp_path, capsys, overrides, message):
    # A group replaces what was set in it before, so the parquet rows drop the options of the built-in source.
    if overrides[0] == "data=parquet":
        given = ("model=nano", *overrides, f"paths.compiled_dir={tmp_path}", f"paths.output_dir={tmp_path / 'run'}")
        config = composed("train", *given)
    else:
        config = tiny(tmp_path / "run", *overrides)
    assert message in refused(capsys, lambda: train(config))
    assert not list(tmp_path.rglob("results*"))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_training_tasks_of_heldout_families_are_refused_or_dropped(tiny, tmp_path, capsys):
    def task(name, category, family):
        examples = [Example(input=f"{name} {i}", outputs=(f"{i}",)) for i in range(12)]
        return Task(
            task_id=name,
            category=category,
            family=family,
            templates=(PromptTemplate(name="t", text="{input}"),),
            examples=lambda: iter(examples),
            tier=int(name == "c"),
        )

    tasks = [task("a", "x", "1"), task("b", "x", "2"), task("c", "x", "3"), task("d", "y", "2")]
    corpus = compile_tasks(tasks, tmp_path / "c", tokenizer=ByteTokenizer(), heldout_fraction=0.2, progress=False)
    given = (f"data.compiled={corpus.path}", "data.holdout_categories=[y]", "data.num_tasks=null")
    message = refused(capsys, lambda: train(tiny(tmp_path / "run", *given)))
    assert "family '2' has the training task 'b' and the held-out task 'd'" in message
    assert "data.drop_shared_families=true" in message
    train(tiny(tmp_path / "run", *given, "data.drop_shared_families=true"))
    printed = " ".join(capsys.readouterr().out.split())
    assert "training on 2 training tasks (2 families), 1 of them beyond the core with 1 new families" in printed
    assert "1 tasks held out; 1 training tasks of held-out families dropped" in printed
    assert corpus_summary(corpus).splitlines()[1] in printed
    rows = list(csv.DictReader((tmp_path / "run" / "results.csv").open(encoding="utf-8")))
    assert {(row["task_id"], row["level"]) for row in rows} == {("d", "category"), ("a", "instance"), ("c", "instance")}


def test_an_interruption_is_one_line(capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as stopped:
        report_user_errors(interrupted)
    assert stopped.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_empty_folder_is_refused(tmp_path, capsys):
    (tmp_path / "data").mkdir()
    given = (f"data.path={tmp_path / 'data'}", f"paths.compiled_dir={tmp_path}", f"paths.output_dir={tmp_path / 'run'}")
    message = refused(capsys, lambda: train(composed("train", "data=parquet", *given)))
    assert str(tmp_path / "data") in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data"]


def broken_corpus(root, folder):
    (source,) = (root / "compiled").glob("builtin-*")
    shutil.copytree(source, folder)
    return folder


def test_a_truncated_corpus_is_refused(finished, root, tiny, tmp_path, capsys):
    folder = broken_corpus(root, tmp_path / "corpus")
    content = (folder / "tokens.npy").read_bytes()
    (folder / "tokens.npy").write_bytes(content[:-100])
    message = refused(capsys, lambda: train(tiny(tmp_path / "run", f"data.compiled={folder}")))
    assert "tokens.npy" in message
    (folder / "manifest.json").write_text("{")
    assert "manifest.json" in refused(capsys, lambda: train(tiny(tmp_path / "run", f"data.compiled={folder}")))
    assert not (tmp_path / "run" / "results.json").exists()


def test_checkpoints_that_cannot_be_evaluated(finished, root, tiny, tmp_path, capsys):
    def evaluated(*arguments):
        config = composed("eval", "trainer.accelerator=cpu", f"paths.output_dir={tmp_path / 'out'}", *arguments)
        return refused(capsys, lambda: evaluate(config))

    checkpoint = f"checkpoint={finished / 'checkpoints' / 'final.ckpt'}"
    assert "checkpoint" in evaluated()
    assert "no checkpoint at" in evaluated(f"checkpoint={finished / 'checkpoints' / 'no.ckpt'}")
    assert "give run=FOLDER" in evaluated("checkpoint=nowhere/checkpoints/no.ckpt")
    assert "no compiled corpus" in evaluated(checkpoint, f"corpus={tmp_path / 'none'}")
    (tmp_path / "hi.ckpt").write_text("hi")
    assert "or it is damaged" in evaluated(f"checkpoint={tmp_path / 'hi.ckpt'}", f"run={finished}")
    other = tiny(tmp_path / "run", "data.tokenizer=bpe", "data.num_tasks=31", f"paths.compiled_dir={tmp_path}")
    refused(capsys, lambda: train(other))
    (folder,) = (path for path in tmp_path.glob("builtin-*"))
    assert "was trained with the tokenizer" in evaluated(checkpoint, f"corpus={folder}")
    assert not Path(tmp_path / "out" / "results.json").exists()
