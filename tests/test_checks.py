"""What a caller gives is a number, an array, a word or a device, or one line names it."""

import numpy as np
import pytest
import torch

from sitdist.checks import array, choice, find_device, number, whole
from sitdist.errors import ConfigError, DataError

NAN = float("nan")


class Unprintable:
    def __repr__(self):
        raise RuntimeError


@pytest.mark.parametrize("value", [3, np.int64(3), torch.tensor(3), np.array(3)])
def test_whole_numbers_of_every_kind_are_ints(value):
    assert whole("it", value, 1, 5) == 3
    assert type(whole("it", value)) is int


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, np.True_, torch.tensor(True), "3", b"3", 3.0, NAN, np.float32(3), torch.tensor(3.0), [3], (), {}),
        *(0, 6, -1, 2**64, torch.tensor([3, 3]), np.array([3]), Unprintable(), object(), 3j),
    ],
)
def test_what_is_no_whole_number_within_bounds_is_named(value):
    for each in (value, 10**5000):  # more digits than Python prints
        with pytest.raises(DataError, match=r"it .*: expected a whole number from 1 to 5"):
            whole("it", each, 1, 5, DataError)


@pytest.mark.parametrize("value", [2, 2.0, np.float32(2), np.int64(2), torch.tensor(2.0), torch.tensor(2)])
def test_numbers_of_every_kind_are_floats(value):
    assert number("it", value, 1.0, 3.0) == 2.0


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, np.True_, "2", b"2", bytearray(b"2"), NAN, float("inf"), -1e300, 10**400, 0.5, 4, [2.0], {}, 2j),
        *(torch.tensor([2.0, 2.0]), np.zeros((2, 2)), torch.tensor(2.0, device="meta"), Unprintable(), object()),
    ],
)
def test_what_is_no_number_within_bounds_is_named(value):
    with pytest.raises(ConfigError, match=r"it .*: expected a number from 1 to 3"):
        number("it", value, 1.0, 3.0)


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3, 4]],
        np.array([[1, 2], [3, 4]], np.float16),
        torch.tensor([[1, 2], [3, 4]], dtype=torch.bfloat16),
        torch.tensor([[1.0, 2], [3, 4]], requires_grad=True),
        ((1.0, 2.0), (3.0, 4.0)),
    ],
)
def test_arrays_of_every_real_kind_are_float64(value):
    assert torch.equal(array("it", value), torch.tensor([[1, 2], [3, 4]], dtype=torch.float64))


@pytest.mark.parametrize(
    "value",
    [
        *(None, "1", [[1], [1, 2]], [True], {}, object(), np.array(["1"]), np.array([1], object), np.array([1j])),
        *(torch.tensor([True]), torch.eye(2).to_sparse(), torch.zeros(2, device="meta")),
    ],
)
def test_what_is_no_array_of_numbers_is_named(value):
    with pytest.raises(ConfigError, match="it: no numbers but"):
        array("it", value)


def test_a_word_is_one_of_the_choices():
    assert choice("it", "a", ("a", "b")) == "a"
    for value in ("c", "", None, 1, ["a"], np.array(["a", "b"])):
        with pytest.raises(ConfigError, match=r"it .*: unknown; choose one of a, b"):
            choice("it", value, ("a", "b"))


def test_a_device_is_there_or_named(monkeypatch):
    assert find_device("cpu") == find_device(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert find_device("auto") == torch.device("cpu")
    for name in ("foo", "", "cuda", "cuda:-1", "mps", "meta", "cpu:7", "c" * 999, None, 0):
        with pytest.raises(ConfigError, match=r"device .*: there is none here; choose one of auto, cpu$"):
            find_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("auto").type == find_device("cuda").type == find_device("cuda:1").type == "cuda"
    with pytest.raises(ConfigError, match=r"cuda:99.* choose one of auto, cpu, cuda:0, cuda:1"):
        find_device("cuda:99")
