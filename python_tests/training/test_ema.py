"""Moving averages of weights."""

import pytest
import torch
from torch import nn

from vtok_ext.training.ema import ExponentialMovingAverage


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))


def test_decay_warms_up():
    network = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        network.weight.zero_()
        averages = ExponentialMovingAverage(network, 0.3)
        network.weight.fill_(1.0)
    averages.update()
    assert float(averages.averages["weight"]) == pytest.approx(1 - 2 / 11)
    averages.update()
    assert float(averages.averages["weight"]) == pytest.approx(1 - 2 / 11 * 3 / 12)
    for _ in range(10):
        averages.update()
    before = 1 - float(averages.averages["weight"])
    averages.update()
    assert 1 - float(averages.averages["weight"]) == pytest.approx(0.3 * before, rel=1e-2, abs=1e-7)


def test_applied_and_back():
    network = model()
    averages = ExponentialMovingAverage(network, 0.9)
    own = network[0].weight.detach().clone()
    with torch.no_grad():
        network[0].weight += 1
    with pytest.raises(RuntimeError, match="inside"), averages.applied():
        assert torch.equal(network[0].weight, own)
        raise RuntimeError("inside")
    torch.testing.assert_close(network[0].weight, own + 1)


def test_state_goes_on():
    network, other = model(), model()
    first = ExponentialMovingAverage(network, 0.9)
    with torch.no_grad():
        network[0].weight += 1
    first.update()
    second = ExponentialMovingAverage(other, 0.9)
    second.load_state_dict(first.state_dict())
    other.load_state_dict(network.state_dict())
    first.update()
    second.update()
    for name, average in first.averages.items():
        assert torch.equal(average, second.averages[name])
    with pytest.raises(ValueError, match="averages must be those of the same model"):
        ExponentialMovingAverage(nn.Linear(3, 2), 0.9).load_state_dict(first.state_dict())


def test_frozen_parameters_are_not_followed():
    network = model()
    network[0].requires_grad_(False)
    assert set(ExponentialMovingAverage(network, 0.9).averages) == {"1.weight", "1.bias"}
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1.0"):
        ExponentialMovingAverage(network, 1.0)
