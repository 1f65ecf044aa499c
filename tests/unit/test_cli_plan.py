# SPDX-License-Identifier: Apache-2.0
"""The command zeroprompt-plan: costs from a file, a size, or a module; what it prints can be pasted; bad input."""

import json
import re
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import nn

import lightning_zeroprompt.strategies
from lightning_zeroprompt.cli.plan import main
from lightning_zeroprompt.cli.plan_costs import (
    parse_bandwidth,
    parse_batch,
    parse_bytes,
    parse_operations,
    parse_seconds,
)
from lightning_zeroprompt.pipeline import BlockCosts, Costs, Link, build_schedule, simulate
from lightning_zeroprompt.pipeline.invented import GPT_SHAPES, GptShape, gpt_costs
from lightning_zeroprompt.pipeline.meters import FlopMeter

SIZES = {"state": 2**30, "parameters": 2**28, "gradients": 2**28, "activations": 2**27, "weight_inputs": 2**26}


class Own(LightningModule):
    def __init__(self, layers=4, width=16):
        super().__init__()
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)))

    def training_step(self, batch, batch_idx):
        loss = nn.functional.mse_loss(self.net(batch["x"]), batch["y"])
        self.log("loss", loss)
        return loss


class Peeking(Own):
    def training_step(self, batch, batch_idx):
        return super().training_step(batch, batch_idx) * batch["x"].sum().item()


@pytest.fixture
def costs(tmp_path):
    made = Costs.uniform(
        8, forward=1e-3, backward=1.4e-3, weight=0.8e-3, output=2**20, message=Link(1e-6, 1e11), **SIZES
    )
    made.save(tmp_path / "costs.json")
    return made, tmp_path / "costs.json"


def printed(capsys, *argv):
    main([str(argument) for argument in argv])
    return capsys.readouterr().out


def planned(capsys, *argv):
    return json.loads(printed(capsys, *argv, "--json"))["plans"]


def fails(capsys, *argv):
    with pytest.raises(SystemExit) as stopped:
        main([str(argument) for argument in argv])
    captured = capsys.readouterr()
    assert stopped.value.code == 2
    assert captured.out == ""
    return captured.err


def test_tables_timeline_files_and_what_to_paste(costs, tmp_path, capsys):
    _, path = costs
    text = printed(capsys, "--costs", path, "--ranks", 2, "--micro-batches", 4, "--memory", "80GiB", "--out", tmp_path)
    for words in ("1f1b, V=1", "zbv, V=2", "->", "of ideal", "of limit", "bubble", "sent GiB", "0 |", "1 |"):
        assert words in text
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    events = json.loads((tmp_path / "plan.json").read_text())["traceEvents"]
    assert {event["tid"] for event in events if event["ph"] == "X"} == {0, 1}
    calls = re.findall(r"strategy = (ZeroPPStrategy\(.*\))", text)
    assert calls
    for call in calls:
        eval(call, vars(lightning_zeroprompt.strategies))  # it takes the arguments as they stand


def test_json_is_what_the_simulator_says(costs, capsys):
    made, path = costs
    [entry] = planned(capsys, "--costs", path, "--ranks", 2, "--micro-batches", 4)
    row = next(each for each in entry["candidates"] if each["label"] == "1f1b, V=1")
    step = simulate(build_schedule("1f1b", ranks=2, micro_batches=4), made, [(0, 4), (4, 8)])
    assert row["seconds"] == pytest.approx(step.seconds)
    assert row["peak_bytes"] == max(step.peak_bytes)
    assert row["share_of_ideal"] == pytest.approx(2 * 4 * 4 * 3.2e-3 / 2 / step.seconds)
    assert entry["choice"]["seconds"] <= 1.005 * min(each["seconds"] for each in entry["candidates"])


def test_how_many_gpus(costs, capsys):
    _, path = costs
    # 8 GiB of state and 8 x 128 MiB of activations: neither one GPU holds, nor two without recomputation.
    arguments = ["--costs", path, "--gpus", 4, 1, "--micro-batches", 4, "--memory", "4GiB"]
    one, four = planned(capsys, *arguments)
    assert (one["gpus"], four["gpus"]) == (1, 4)
    assert "nothing fits" in one["error"]
    assert four["choice"]["fits"]
    assert four["choice"]["peak_bytes"] <= 4 * 2**30
    text = printed(capsys, *arguments)
    assert "none, see below" in text
    assert "twice the pipeline ranks" in text


def test_links_of_a_file_can_be_replaced(costs, capsys):
    _, path = costs
    arguments = ["--costs", path, "--ranks", 2, "--micro-batches", 4]
    [fast], [slow] = planned(capsys, *arguments), planned(capsys, *arguments, "--interconnect", "100MB/s")
    assert slow["choice"]["seconds"] > 1.2 * fast["choice"]["seconds"]


def test_a_known_size_is_counted_and_saved(tmp_path, capsys):
    path = tmp_path / "saved.json"
    arguments = ["--layers", 4, "--width", 256, "--sequence", 128, "--rows", 2, "--vocabulary", 1000, "--ranks", 2]
    planned(capsys, *arguments, "--micro-batches", 2, "--save-costs", path, "--flops", "1TFLOPS")
    made = Costs.load(path)
    assert len(made.blocks) == 4
    assert made.transport == "copy_engine"
    width, tokens = 256, 256
    block = made.blocks[0]
    assert block.output == 2 * tokens * width
    assert block.parameters == 2 * (12 * width**2 + 13 * width)
    # Four Linears of 12 width^2 entries, and scores and their use over 128 positions.
    products = 2 * tokens * 12 * width**2 + 4 * tokens * 128 * width
    assert block.forward == pytest.approx((products / 1e12) + 2 * block.output / 3e12, rel=0.01)
    assert made.behind.parameters == 2 * (1000 * width + 2 * width)


def test_sizes_have_their_names():
    meter = FlopMeter(1e12, 1e12)
    made = gpt_costs(GPT_SHAPES["125m"], meter, message=Link(1e-5, 1e10), sequence=16)
    total = sum(block.parameters for block in (made.before, *made.blocks, made.behind)) / 2
    # The head is no copy of the embedding here.
    assert total == pytest.approx(125e6 + 50_304 * 768, rel=0.02)
    with pytest.raises(ValueError, match="heads"):
        GptShape(2, 100, 3)
    with pytest.raises(ValueError, match="rows=0"):
        gpt_costs(GPT_SHAPES["125m"], meter, message=Link(1e-5, 1e10), rows=0)


def test_own_module_by_import_path(tmp_path, capsys, monkeypatch):
    (tmp_path / "own_planned_module.py").write_text(
        "import importlib.util\n"
        f"spec = importlib.util.spec_from_file_location('plan_tests', {__file__!r})\n"
        "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
        "Own, Peeking = module.Own, module.Peeking\n"
    )
    monkeypatch.chdir(tmp_path)
    arguments = ["--module", "own_planned_module:Own", "--ranks", 2, "--micro-batches", 4]
    batch = ["--batch", "x=float32[8,16] y=float32[8,16]"]
    path = tmp_path / "saved.json"
    [entry] = planned(capsys, *arguments, *batch, "--arguments", '{"layers": 6}', "--save-costs", path)
    made = Costs.load(path)
    assert len(made.blocks) == 6
    assert made.blocks[0].output == 4 * 8 * 16
    assert made.blocks[0].parameters == 4 * (16 * 16 + 16)
    assert entry["strategy_arguments"]["pipeline_parallel_size"] == 2
    planned(capsys, *arguments, "--batch", "x=bfloat16[8,16] y=bfloat16[8,16]", "--dtype", "bfloat16")

    peeking = ["--module", "own_planned_module:Peeking", "--ranks", 2]
    assert "cannot be followed on the meta device" in fails(capsys, *peeking, *batch)
    assert "--module needs --batch" in fails(capsys, *arguments)
    assert "cannot be imported" in fails(capsys, "--module", "own_planned_module:Other", "--ranks", 2, *batch)
    assert "cannot be built" in fails(capsys, *arguments, *batch, "--arguments", '{"depth": 6}')
    assert "no JSON" in fails(capsys, *arguments, *batch, "--arguments", "layers=6")


def test_our_t5_as_a_module(capsys):
    batch = "input_ids=int64[2,32] input_segments=int32[2,32] decoder_input_ids=int64[2,8] decoder_segments=int32[2,8]"
    module = "lightning_zeroprompt.models:Text2TextModule"
    arguments = ["--module", module, "--arguments", '{"vocab_size": 64, "size": "nano"}', "--ranks", 2]
    [entry] = planned(capsys, *arguments, "--micro-batches", 2, "--batch", f"{batch} labels=int64[2,8]")
    assert entry["choice"]["seconds"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", 2], "none given"),
        (["--model", "9b", "--gpus", 2], "'9b' is unknown; there are 125m"),
        (["--model", "7b"], "give --gpus N"),
        (["--model", "7b", "--gpus", 2, "--ranks", 2], "give --gpus N"),
        (["--model", "7b", "--gpus", 2, "--data", 2], "--data 2 goes with --ranks"),
        (["--model", "7b", "--gpus", 0], "--gpus 0: give at least 1"),
        (["--model", "7b", "--gpus", 2, "--memory", "80"], "'80' is no such quantity; write it like 80GiB"),
        (["--model", "125m", "--ranks", 16], "16 ranks need a block each, there are 12"),
        (["--model", "125m", "--gpus", 1, "--micro-batches", 1, "--memory", "1GiB"], "The smallest is"),
        (["--costs", "missing.json", "--ranks", 2], "missing.json"),
    ],
)
def test_bad_input_is_one_line(capsys, arguments, words):
    assert words in fails(capsys, *arguments)


def test_costs_with_gaps_are_named(costs, tmp_path, capsys):
    _, path = costs
    data = json.loads(path.read_text())
    del data["blocks"][0]["weight"]
    path.write_text(json.dumps(data))
    assert "blocks[0].weight is missing" in fails(capsys, "--costs", path, "--ranks", 2)


def test_a_limit_goes_with_the_costs_that_it_is_compared_with(costs, tmp_path, capsys):
    # A head that weighs more than a block: the best order is in no catalogue.
    replace(costs[0], behind=BlockCosts(2.4e-3, 3e-3, 2e-3)).save(tmp_path / "uneven.json")
    given = ("--costs", tmp_path / "uneven.json", "--ranks", 2, "--micro-batches", 4, "--memory", "20GiB")
    lines = printed(capsys, *given).splitlines()
    pasted = next(line for line in lines if line.startswith("strategy = "))
    assert "schedule='auto'" in pasted
    assert f"memory_limit={20 * 2**30}" in pasted
    names = {"ZeroPPStrategy": lightning_zeroprompt.strategies.ZeroPPStrategy}
    eval(pasted.removeprefix("strategy = "), names)


def test_quantities():
    assert parse_bytes("80GiB") == 80 * 2**30
    assert parse_bytes("80 GB") == 80e9
    assert parse_bandwidth("200Gb/s") == parse_bandwidth("25GB/s") == 25e9
    assert parse_operations("500TFLOPS") == parse_operations("5e14") == 5e14
    assert parse_seconds("20us") == pytest.approx(2e-5)


def test_batches():
    batch = parse_batch("ids=int64[2, 8] mask=bool[2,8]")
    assert {name: (tuple(part.shape), part.dtype) for name, part in batch.items()} == {
        "ids": ((2, 8), torch.int64),
        "mask": ((2, 8), torch.bool),
    }
    assert len(parse_batch("float32[4] float32[4]")) == 2
    assert parse_batch("float32[]").shape == ()
    for text in ("", "x=float32", "x=float99[2]", "x=float32[2] float32[2]", "x=float32[2] x=float32[2]"):
        with pytest.raises(ValueError, match="--batch"):
            parse_batch(text)
