# SPDX-License-Identifier: Apache-2.0
"""zeroprompt-search, ``zeroprompt-eval prompts=`` and ``callbacks=search`` from end to end, in this process."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir

from lightning_zeroprompt.cli import search as program
from lightning_zeroprompt.cli.config import config_dir
from lightning_zeroprompt.cli.evaluate import evaluate
from lightning_zeroprompt.cli.search import search
from lightning_zeroprompt.cli.train import train
from lightning_zeroprompt.prompts.search import PromptSearch

SMALL = ("population=4", "generations=2", "k=12", "neighbours=2")
TABLE = "input,answer,more\n" + "".join(f"row {i} {'ab' * (i % 4)},{'yes' if i % 2 else 'no'},{i}\n" for i in range(60))
OWN = (
    "task=mine",
    "examples.output=answer",
    "examples.options=[yes,no]",
    'examples.templates=["Is it odd? {input}","{input} ({more}) - odd? {options}"]',
)


def composed(name, *overrides):
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        return compose(name, list(overrides))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The run folder of four steps with searches for two tasks."""
    root = tmp_path_factory.mktemp("cli-search")
    settings = (
        *("model=nano", "trainer.accelerator=cpu", "trainer.max_steps=4", "trainer.val_check_interval=2"),
        *("data.num_tasks=20", "data.num_source_tasks=30", "data.options.examples_per_task=40", "data.tokenizer=byte"),
        *("data.compile.heldout_fraction=0.1", "data.encoder_length=160", "data.decoder_length=64"),
        *("data.rows_per_batch=4", "eval.examples_per_task=1", "eval.fit_examples_per_task=1"),
        *("eval.templates_per_task=1", "eval.instance_tasks=4", "eval.heldout_wordings=false", "callbacks=search"),
        *(f"callbacks.prompt_search.{setting}" for setting in ("tasks=2", "every_n_validations=2", *SMALL[:3])),
        *(
            "+callbacks.prompt_search.neighbours=2",
            f"paths.output_dir={root}/run",
            f"paths.compiled_dir={root}/compiled",
        ),
    )
    train(composed("train", *settings))
    return root / "run"


@pytest.fixture
def run_search(trained, tmp_path):
    def run(*overrides, name="out"):
        settings = (f"search.{setting}" for setting in SMALL)
        checkpoint = f"checkpoint={trained}/checkpoints/final.ckpt"
        search(
            composed("search", checkpoint, f"paths.output_dir={tmp_path / name}", "device=cpu", *settings, *overrides)
        )
        return json.loads((tmp_path / name / "prompts.json").read_text())

    return run


def scored(trained, folder, *overrides):
    checkpoint = f"checkpoint={trained}/checkpoints/final.ckpt"
    evaluate(composed("eval", checkpoint, f"paths.output_dir={folder}", "device=cpu", *overrides))
    return json.loads((folder / "prompt_scores.json").read_text())["tasks"]


def test_a_training_run_leaves_prompts(trained, capfd):
    data = json.loads((trained / "prompts.json").read_text())
    assert len(data["tasks"]) == 2
    for record in data["tasks"]:
        assert record["rounds"] == 2
        assert record["scores"]["test"] is not None
    stored = torch.load(trained / "checkpoints" / "final.ckpt", weights_only=True)["callbacks"]["GeneticPromptSearch"]
    assert set(stored["searches"]) == {record["task"] for record in data["tasks"]}


def test_a_held_out_task_and_its_evaluation(trained, run_search, tmp_path, capsys):
    task = json.loads((trained / "prompts.json").read_text())["tasks"][0]["task"]
    data = run_search(f"task={task}")
    (record,) = data["tasks"]
    assert record["task"] == task
    assert record["model_step"] == 4
    printed = capsys.readouterr().out
    assert "manual:" in printed
    assert ("kept" in printed) or ("fell back" in printed)
    (entry,) = scored(trained, tmp_path / "eval", f"prompts={tmp_path / 'out' / 'prompts.json'}")
    for name in ("manual", "prompt"):
        assert entry[name] == pytest.approx(record["scores"]["test"][name]["outcome"], abs=1e-6)
    assert entry["rows"] == record["rows"]["test"]


def test_a_table_of_ones_own(trained, run_search, tmp_path):
    path = tmp_path / "own.csv"
    path.write_text(TABLE)
    (tmp_path / "test.csv").write_text(TABLE.replace("row ", "other "))
    files = (f"examples.path={path}", f"examples.test_path={tmp_path / 'test.csv'}")
    (record,) = run_search(*OWN, *files)["tasks"]
    assert record["rows"] == {"search": 5, "confirm": 7, "test": 60}
    given = (f"prompts={tmp_path / 'out' / 'prompts.json'}", *OWN[1:], files[0])
    (entry,) = scored(trained, tmp_path / "eval", *given, files[1])
    assert entry["prompt"] == pytest.approx(record["scores"]["test"]["prompt"]["outcome"], abs=1e-6)
    with pytest.raises(ValueError, match="the rows here are not those"):
        scored(trained, tmp_path / "eval", *given)


def test_a_search_that_is_killed_goes_on_from_its_folder(run_search, tmp_path, monkeypatch):
    path = tmp_path / "own.csv"
    path.write_text(TABLE)
    arguments = (*OWN, f"examples.path={path}")
    whole = run_search(*arguments, name="whole")
    advance, calls = PromptSearch.advance, []

    def killed(self, clock=None):
        calls.append(self.generation)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return advance(self, clock)

    monkeypatch.setattr(PromptSearch, "advance", killed)
    with pytest.raises(KeyboardInterrupt):
        run_search(*arguments, name="cut")
    monkeypatch.setattr(
        PromptSearch, "advance", lambda self, clock=None: calls.append(self.generation) or advance(self, clock)
    )
    assert run_search(*arguments, name="cut")["tasks"] == whole["tasks"]
    # The second process began behind the first one's generation.
    assert calls[:3] == [0, 1, 1]
    with pytest.raises(ValueError, match="is the state of a search for"):
        run_search(*OWN[1:], "task=other", f"examples.path={path}", name="cut")


@pytest.mark.parametrize(
    ("overrides", "match"),
    [
        (("task=nobody",), "task 'nobody' is unknown"),
        (("task=mine", "examples.path=OWN"), "has no template"),
        ((*OWN, "examples.path=OWN", "search.k=500"), "give k of at most 30"),
        ((*OWN, "examples.path=ONE"), "all 30 labelled examples outside the test part have the answer 'yes'"),
        ((*OWN, "examples.path=NONE"), "has no labelled example outside its test part"),
        ((*OWN, "examples.path=OWN", "search.budget=0"), "budget=0: give at least 1"),
        ((*OWN, "examples.path=OWN", "search.time_budget=0"), "time_budget=0"),
        ((*OWN, "examples.path=OWN", "search.operators={continue_sentence: 1}"), "needs a text model"),
        ((*OWN, "examples.path=OWN", "+search.foo=1"), "search.foo is unknown"),
        (("task=[a,b]", "examples.path=OWN"), "names 2, give one name"),
        ((*OWN, "examples.path=OWN", "run=/nowhere"), "has no config.yaml"),
    ],
)
def test_bad_input_is_an_error_before_the_search(run_search, tmp_path, monkeypatch, overrides, match):
    (tmp_path / "own.csv").write_text(TABLE)
    (tmp_path / "one.csv").write_text(TABLE.replace(",no,", ",yes,"))
    (tmp_path / "none.csv").write_text(TABLE.replace(",no,", ",,").replace(",yes,", ",,"))
    paths = {name: str(tmp_path / f"{name.lower()}.csv") for name in ("OWN", "ONE", "NONE")}
    given = [
        text
        if "=" not in text or text.split("=", 1)[1] not in paths
        else f"examples.path={paths[text.split('=', 1)[1]]}"
        for text in overrides
    ]
    monkeypatch.setattr(program, "make_records", lambda *args, **more: pytest.fail("the search has run"))
    with pytest.raises(ValueError, match=match):
        run_search(*given)


def test_a_checkpoint_of_another_tokenizer_is_refused(run_search, trained, tmp_path):
    from compiling import compiled, make_task

    from lightning_zeroprompt.data.compile import BpeSpec

    corpus = compiled([make_task(1), make_task(2, role="heldout")], tmp_path / "other", tokenizer=BpeSpec(430))
    with pytest.raises(ValueError, match="was trained with the tokenizer"):
        run_search("task=task 2", f"corpus={corpus.path}")
