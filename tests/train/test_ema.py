"""The averaged weights: the recurrence, its warm-up, and what is averaged."""

import pytest
import torch
from torch import nn

from sitdist.train.ema import Ema

OK = torch.tensor(True)


def test_the_average_follows_the_recurrence_with_a_warmed_up_decay():
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 1.0)
    ema, expected = Ema(model, decay=0.5), 1.0
    for step, value in enumerate([2.0, -1.0, 4.0, 4.0, 0.0, 3.0, 7.0, 1.0, 5.0, 2.0]):
        nn.init.constant_(model.weight, value)
        ema.update(step, OK)
        decay = min(0.5, (1 + step) / (10 + step))  # 0.1, 2/11, 3/12 ... and 0.5 from step 8 on
        expected = decay * expected + (1 - decay) * value
        assert ema.model.weight.item() == pytest.approx(expected, rel=1e-6)


def test_the_average_is_kept_in_float32_in_eval_mode_and_apart_from_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)).to(torch.bfloat16).train()
    ema = Ema(model, decay=0.999)
    assert {parameter.dtype for parameter in ema.model.parameters()} == {torch.float32}
    assert not any(parameter.requires_grad for parameter in ema.model.parameters())
    assert model.training
    assert not ema.model.training
    before = ema.model[0].weight.clone()
    nn.init.constant_(model[0].weight, 5.0)
    torch.testing.assert_close(ema.model[0].weight, before, rtol=0, atol=0)


def test_small_updates_are_not_lost_to_rounding():
    """In bfloat16, 1 + 1e-4 is 1: the average of weights in bfloat16 has to be kept in more digits than they have."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    nn.init.constant_(model.weight, 1.0)
    ema = Ema(model, decay=0.9999)
    nn.init.constant_(model.weight, 2.0)
    for step in range(100_000, 100_100):
        ema.update(step, OK)
    assert ema.model.weight.item() == pytest.approx(2.0 - 0.9999**100, rel=1e-4)


def test_parameters_that_are_not_trained_are_not_averaged():
    model = nn.Linear(2, 2)
    model.bias.requires_grad_(False)
    ema = Ema(model, decay=0.0)
    before = ema.model.bias.clone()
    nn.init.constant_(model.bias, 9.0)
    nn.init.constant_(model.weight, 9.0)
    ema.update(0, OK)
    torch.testing.assert_close(ema.model.bias, before, rtol=0, atol=0)
    assert (ema.model.weight > 8).all()
