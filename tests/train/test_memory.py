"""The estimated memory against tensors that are there."""

import pytest
import torch

from sitdist.model.sit import SiT
from sitdist.train.memory import parameters, state_bytes


@pytest.fixture
def model():
    return SiT(8, 2, 4, hidden_size=32, depth=3, num_heads=2)


def test_one_process_holds_weights_gradients_two_moments_and_an_average(model):
    optimizer = torch.optim.AdamW(model.parameters())
    x = torch.randn(2, 4, 8, 8)
    model(x, torch.rand(2), torch.zeros(2, dtype=torch.int64)).sum().backward()
    optimizer.step()
    held = [*model.parameters(), *model.parameters()]  # the second: the average
    held += [each.grad for each in model.parameters() if each.grad is not None]
    held += [value for of in optimizer.state.values() for value in of.values() if value.ndim]
    there = sum(each.numel() * each.element_size() for each in held)
    fixed = 3 * model.pos_embed.numel() * 4  # it has no gradient and no moments
    assert state_bytes(model, "ddp", 1) == there + fixed == state_bytes(model, "fsdp2", 1)


def test_what_is_shared_out_gets_smaller_with_the_number_of_devices(model):
    def held(backend, world):
        return state_bytes(model, backend, world) / (4 * parameters(model))

    assert held("ddp", 8) == pytest.approx(5.0)
    assert held("zero1", 10**6) == pytest.approx(3.0, abs=1e-3)
    assert held("zero2", 10**6) == pytest.approx(2.0, abs=1e-3)
    assert held("fsdp2", 8) < held("zero2", 8) < held("zero1", 8) < held("ddp", 8)
    assert held("fsdp2", 64) < held("fsdp2", 8)
