# SPDX-License-Identifier: Apache-2.0
import torch

from lightning_zeroprompt.models.t5 import T5, T5Config


def test_known_memory_and_a_fixed_number_of_steps_change_no_token():
    model = T5(T5Config.preset("nano", 50), seed=3).eval()
    with torch.no_grad():
        model.shared.weight[1] *= 3  # rows end early
    ids = torch.randint(2, 50, (5, 9), generator=torch.Generator().manual_seed(0))
    segments = torch.ones_like(ids)
    segments[2:, 6:] = 0
    plain = model.generate(ids, segments, 12)
    reused = model.generate(ids, segments, 12, memory=model.encode(ids, segments))
    assert torch.equal(plain, reused)
    full = model.generate(ids, segments, 12, stop_early=False)
    assert full.shape == (5, 12)
    assert torch.equal(full[:, : plain.shape[1]], plain)
    assert not full[:, plain.shape[1] :].any()
