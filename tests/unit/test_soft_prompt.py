# SPDX-License-Identifier: Apache-2.0
"""Soft prompts: which vector stands where, dropout of whole prompts, remedies for unseen tasks. Exact unless stated."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_zeroprompt.models.soft_prompt import SoftPrompt, mean_encoding, mean_weights, retrieval_weights
from lightning_zeroprompt.models.t5 import T5, T5Config

VOCAB, LENGTH, TASKS, WIDTH = 50, 3, 4, 64
MARKS = torch.arange(VOCAB, VOCAB + LENGTH)


def prompts(mode: str = "per_task", **options: float) -> SoftPrompt:
    torch.manual_seed(0)
    return SoftPrompt(mode, length=LENGTH, num_tasks=TASKS, d_model=WIDTH, first_id=VOCAB, **options)


def packed_row(tasks: list[int], words: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    """One row of prompted examples and a padding token: ids, segments, task ids."""
    pieces = [torch.cat((MARKS, torch.randint(2, VOCAB, (words,)))) for _ in tasks]
    size = LENGTH + words
    ids = torch.cat((*pieces, torch.zeros(1, dtype=torch.int64)))[None]
    numbers = torch.arange(1, len(tasks) + 1).repeat_interleave(size)
    segments = F.pad(numbers, (0, 1))[None].int()
    task_ids = F.pad(torch.tensor(tasks).repeat_interleave(size), (0, 1))[None].int()
    return ids, segments, task_ids


def test_every_position_holds_its_tasks_vector_or_its_token() -> None:
    soft, embedding = prompts(), nn.Embedding(VOCAB, WIDTH)
    tasks = [2, 0, 4, 5]
    soft.set_unseen(torch.randn(1, LENGTH, WIDTH))
    ids, segments, task_ids = packed_row(tasks)
    out = soft(ids, embedding, task_ids, segments)
    assert soft.weight is not None
    table = torch.cat((torch.zeros(1, LENGTH, WIDTH), soft.weight.detach(), soft.unseen))
    for position, (token, task) in enumerate(zip(ids[0].tolist(), task_ids[0].tolist(), strict=True)):
        expected = table[task, token - VOCAB] if token >= VOCAB else embedding.weight[token]
        assert torch.equal(out[0, position], expected)


def test_shared_and_absent_prompts() -> None:
    embedding = nn.Embedding(VOCAB, WIDTH)
    ids, segments, _ = packed_row([1, 1])
    shared = prompts("shared")
    assert shared.weight is not None
    out = shared(ids, embedding, None, segments)
    assert torch.equal(out[0, :LENGTH], shared.weight[0])
    assert torch.equal(out[0, 7 : 7 + LENGTH], shared.weight[0])
    absent = prompts("none")
    assert list(absent.parameters()) == []
    assert torch.equal(absent(ids, embedding, None)[0, :LENGTH], torch.zeros(LENGTH, WIDTH))


def test_ids_between_the_tokenizer_and_a_larger_embedding_are_prompts() -> None:
    # Released checkpoints have more embedding rows (32,128) than the tokenizer has tokens (32,100).
    embedding = nn.Embedding(VOCAB + 14, WIDTH)
    out = prompts("shared")(MARKS[None], embedding, None)
    assert not torch.equal(out[0, 0], embedding.weight[VOCAB])


def test_gradients_reach_only_the_tasks_in_the_batch() -> None:
    soft = prompts()
    ids, segments, task_ids = packed_row([2, 4])
    soft(ids, nn.Embedding(VOCAB, WIDTH), task_ids, segments).sum().backward()
    assert soft.weight is not None
    assert soft.weight.grad is not None
    assert soft.weight.grad.abs().sum((1, 2)).gt(0).tolist() == [False, True, False, True]


def test_dropout_drops_whole_prompts_of_single_examples_in_training_only() -> None:
    soft, embedding = prompts(dropout=0.3), nn.Embedding(VOCAB, WIDTH)
    ids, segments, task_ids = packed_row([1, 2, 3, 4] * 500, words=1)
    soft.eval()
    kept = soft(ids, embedding, task_ids, segments)[0, :-1].unflatten(0, (2000, LENGTH + 1))
    soft.train()
    out = soft(ids, embedding, task_ids, segments)[0, :-1].unflatten(0, (2000, LENGTH + 1))
    dropped = (out[:, :LENGTH] == 0).all(2)
    assert torch.equal(dropped.any(1), dropped.all(1))
    # 2,000 draws: 0.3 within five standard errors.
    assert float(dropped[:, 0].float().mean()) == pytest.approx(0.3, abs=0.05)
    assert torch.equal(out[~dropped[:, 0]], kept[~dropped[:, 0]])
    assert torch.equal(out[:, LENGTH:], kept[:, LENGTH:])
    # Without segments each row is one example.
    rows = soft(MARKS.expand(500, LENGTH), embedding, torch.ones(500, LENGTH, dtype=torch.int32))
    zero = (rows == 0).all(2)
    assert torch.equal(zero.any(1), zero.all(1))
    assert 0 < int(zero[:, 0].sum()) < 500


def test_model_with_prompts_packs_like_single_examples() -> None:
    model = T5(T5Config.preset("nano", VOCAB), soft_prompt=prompts()).eval()
    ids, segments, task_ids = packed_row([3, 0, 1])
    targets = torch.randint(2, VOCAB, (1, 6))
    decoder_segments = torch.tensor([[1, 1, 2, 2, 3, 3]])
    with torch.no_grad():
        packed = model(ids, targets, input_segments=segments, decoder_segments=decoder_segments, task_ids=task_ids)
        for index in range(3):
            here = slice(index * 7, index * 7 + 7)
            single = model(ids[:, here], targets[:, 2 * index : 2 * index + 2], task_ids=task_ids[:, here])
            torch.testing.assert_close(packed[:, 2 * index : 2 * index + 2], single, atol=1e-5, rtol=1e-5)
        other = model(
            ids, targets, input_segments=segments, decoder_segments=decoder_segments, task_ids=task_ids * 0 + 2
        )
    assert not torch.allclose(packed, other, atol=1e-3)


def test_initialisation_covers_prompts() -> None:
    config = T5Config.preset("nano", VOCAB)
    direct = T5(config, seed=5, soft_prompt=prompts())
    with torch.device("meta"):
        late = T5(config, soft_prompt=prompts())
    late.to_empty(device="cpu").init_weights(5)
    for model in (direct, late):
        assert model.soft_prompt is not None
    assert torch.equal(direct.soft_prompt.weight, late.soft_prompt.weight)  # type: ignore[union-attr]
    assert torch.equal(late.soft_prompt.keys, torch.zeros(TASKS, WIDTH))  # type: ignore[union-attr]


def test_mixtures_are_weighted_means() -> None:
    soft = prompts()
    assert soft.weight is not None
    weights = torch.rand(2, TASKS)
    expected = torch.stack([sum(weights[k, n] * soft.weight[n] for n in range(TASKS)) for k in range(2)])
    torch.testing.assert_close(soft.mix(weights), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(soft.mix(mean_weights(TASKS))[0], soft.weight.mean(0), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="only 'per_task'"):
        prompts("shared").mix(weights)


def test_mean_encoding_ignores_padding() -> None:
    memory = torch.randn(3, 5, 8)
    segments = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]])
    expected = torch.stack((memory[0].mean(0), memory[1, :2].mean(0), torch.zeros(8)))
    torch.testing.assert_close(mean_encoding(memory, segments), expected, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(mean_encoding(memory), memory.mean(1), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 3, 99])
def test_retrieval_weighs_the_most_similar_tasks(top_k: int) -> None:
    queries, keys = torch.randn(5, 16), torch.randn(7, 16)
    weights = retrieval_weights(queries, keys, top_k=top_k, temperature=0.1)
    for query, row in zip(queries, weights, strict=True):
        similarity = torch.stack([F.cosine_similarity(query, key, dim=0) for key in keys])
        best = similarity.argsort(descending=True)[:top_k]
        expected = torch.zeros(7)
        expected[best] = (similarity[best] / 0.1).exp() / (similarity[best] / 0.1).exp().sum()
        torch.testing.assert_close(row, expected, atol=1e-5, rtol=1e-5)


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="mode 'each'"):
        prompts("each")
    with pytest.raises(ValueError, match="length=0"):
        SoftPrompt("shared", length=0, num_tasks=1, d_model=8, first_id=9)
    with pytest.raises(ValueError, match="dropout=1"):
        prompts(dropout=1.0)
    with pytest.raises(ValueError, match="no task_ids"):
        prompts()(MARKS[None], nn.Embedding(VOCAB, WIDTH), None)
    with pytest.raises(ValueError, match="expected"):
        prompts().set_unseen(torch.zeros(1, LENGTH + 1, WIDTH))
    with pytest.raises(ValueError, match="top_k=0"):
        retrieval_weights(torch.zeros(1, 2), torch.zeros(1, 2), top_k=0)
