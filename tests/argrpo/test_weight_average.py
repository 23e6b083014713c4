"""The moving average of weights."""

import pytest
import torch
from torch import nn

from argrpo.weight_average import WeightAverage


def test_the_average_follows_its_formula_and_the_weights_come_back() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data.fill_(1.0)
    average = WeightAverage(layer, 0.75)
    for value in (3.0, 5.0):
        layer.weight.data.fill_(value)
        average.update()
    address, version = layer.weight.data_ptr(), layer.weight._version
    with average.applied():
        assert layer.weight.item() == 0.75 * (0.75 * 1 + 0.25 * 3) + 0.25 * 5
        assert layer.weight.data_ptr() == address, "the engine reads this very memory"
        assert layer.weight._version > version, "caches of weights must notice"
    assert layer.weight.item() == 5.0


def test_weights_come_back_when_what_is_inside_fails() -> None:
    layer = nn.Linear(2, 2)
    average, before = WeightAverage(layer, 0.5), layer.weight.detach().clone()
    layer.weight.data.add_(1.0)
    with pytest.raises(KeyError), average.applied():
        raise KeyError
    assert torch.equal(layer.weight, before + 1.0)


def test_a_small_change_of_a_bf16_weight_is_not_lost() -> None:
    layer = nn.Linear(1, 1, bias=False, dtype=torch.bfloat16)
    layer.weight.data.fill_(1.0)
    average = WeightAverage(layer, 0.999)
    layer.weight.data.fill_(1.0078125)  # the next bf16 number
    average.update()
    assert 0 < average.state_dict()["weight"].item() - 1 < 1e-5


def test_a_saved_average_goes_on_where_it_was() -> None:
    layer = nn.Linear(2, 2)
    first = WeightAverage(layer, 0.5)
    layer.weight.data.add_(1.0)
    first.update()
    second = WeightAverage(layer, 0.5)
    second.load_state_dict({k: v.clone() for k, v in first.state_dict().items()})
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value)
    with pytest.raises(ValueError, match="bias: expected the averages of these weights"):
        second.load_state_dict({"weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"weight: expected shape \[2, 2\], got \[3, 2\]"):
        second.load_state_dict({"weight": torch.zeros(3, 2), "bias": torch.zeros(2)})


def test_a_decay_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match=r"decay: expected a number in \(0, 1\), got 1.0"):
        WeightAverage(nn.Linear(1, 1), 1.0)
