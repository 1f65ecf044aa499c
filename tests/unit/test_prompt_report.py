# SPDX-License-Identifier: Apache-2.0
import io
import json
import os

import pytest
from rich.console import Console
from searching import LetterModel, make_pool, make_search, run_round

from lightning_zeroprompt.files import json_bytes, write_files
from lightning_zeroprompt.prompts.outcome import choose_prompt, search_record
from lightning_zeroprompt.prompts.report import draw_searches, prompts_table, prompts_text, read_prompts, write_prompts


@pytest.fixture(scope="module")
def records():
    """One that was kept, after two rounds, and one that fell back."""
    kept = run_round(make_search(LetterModel(), generations=6, pool=make_pool(120), k=60))
    run_round(kept, step=2)
    fell = run_round(make_search(LetterModel(letter="\x00"), generations=1, seed=1))
    found = [
        search_record(search, choose_prompt(search), with_test=with_test)
        for search, with_test in ((kept, True), (fell, False))
    ]
    assert [record["kept"] for record in found] == [True, False]
    return found


def test_a_record_is_plain_and_says_where_a_prompt_comes_from(records):
    kept, fell = json.loads(json_bytes(records))
    assert kept["prompt"] == kept["evolved"]
    assert kept["scores"]["confirm"]["evolved"]["p_adjusted"] < 0.05
    assert kept["scores"]["test"]["gain"] > 0
    assert kept["scores"]["test"]["gain_low"] <= kept["scores"]["test"]["gain"] <= kept["scores"]["test"]["gain_high"]
    assert (kept["labels_used"], kept["rows"], kept["counted"]) == (
        60,
        {"search": 23, "confirm": 37, "test": 60},
        False,
    )
    assert kept["seeds"] == {"parts": 0, "search": 0}
    assert kept["chance"] == 0.5
    lineage, key, steps = kept["lineage"], kept["prompt"]["fingerprint"], 0
    while lineage[key]["parents"]:
        parents = lineage[key]["parents"]
        assert set(parents) <= lineage.keys()
        assert lineage[key]["generation"] > max(lineage[parent]["generation"] for parent in parents)
        key, steps = parents[0], steps + 1
    assert steps > 0
    assert lineage[key]["origin"].startswith("template ")
    assert fell["prompt"] == fell["manual"]
    assert fell["scores"]["test"] is None


def test_files(records, tmp_path):
    paths = write_prompts(tmp_path / "run", records, {"corpus": "abc"})
    assert sorted(paths) == ["prompts.json", "prompts.md", "prompts.png"]
    assert sorted(os.listdir(tmp_path / "run")) == sorted(paths)
    read = read_prompts(paths["prompts.json"])
    assert read["corpus"] == "abc"
    genome = read["tasks"][0]["genomes"]["prompt"]
    assert genome.text == records[0]["prompt"]["text"]
    assert genome.fingerprint == records[0]["prompt"]["fingerprint"]
    text = paths["prompts.md"].read_text()
    assert "**Kept**" in text
    assert "**Fell back**" in text
    assert "no text is run" not in text
    assert genome.text in text
    assert "Gain on test: +" in text
    assert paths["prompts.png"].read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (None, "no prompts.json that can be read"),
        ("{", "no prompts.json that can be read"),
        ("[]", "no prompts.json that can be read"),
        ('{"format": 9, "tasks": []}', "has the format 9, this version reads 1"),
        ('{"format": 1, "tasks": [{"prompt": {"genome": {"evil": 1}}}]}', "unknown slots ..evil"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, content, match):
    path = tmp_path / "prompts.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=match):
        read_prompts(path)


def test_a_table_names_both_prompts_their_scores_and_the_decision(records):
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(prompts_table(records))
    text = console.export_text()
    assert "task: kept" in text
    assert "task: fell back" in text
    confirm = records[0]["scores"]["confirm"]
    for name in ("manual", "evolved"):
        line = next(line for line in text.splitlines() if f"{name}: " in line)
        assert f"{confirm[name]['fitness']:.2f}" in line
        assert f"{confirm[name]['outcome']:.2f}" in line
    assert f"{confirm['evolved']['p_adjusted']:.3f}" in text


def test_a_prompt_is_shown_and_never_interpreted(records):
    evil = dict(records[1], task="[red]t[/red]")
    evil["manual"] = dict(evil["manual"], text="```\n[bold]{input.__class__}[/bold]")
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(prompts_table([evil]))
    text = console.export_text()
    assert "[red]t[/red]" in text
    assert "[bold]{input.__class__}[/bold]" in text
    evil["prompt"] = evil["manual"]
    assert prompts_text(evil).count("```") % 2 == 0


def test_a_picture_of_many_searches_and_of_none(records):
    figure = draw_searches(records * 8)
    shown = [axis for axis in figure.axes if axis.get_visible()]
    assert len(shown) == 12
    best = shown[0].get_lines()[0]
    assert best.get_ydata().tolist() == [entry["best"] for entry in records[0]["history"]]
    draw_searches([])


def test_files_are_old_or_new_never_halves(tmp_path, monkeypatch):
    write_files(tmp_path, {"a": b"old"})
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with pytest.raises(TypeError):
        write_files(tmp_path, {"a": 3})
    assert (tmp_path / "a").read_bytes() == b"old"
