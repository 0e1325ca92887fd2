"""What the tests of training share."""

import pytest

from sitdist.config.experiment import Config
from sitdist.config.load import load_yaml


@pytest.fixture
def config(tiny_yaml):
    """The tiny config with overrides, such as "train.steps=3"."""

    def load(*overrides: str) -> Config:
        return load_yaml(Config, tiny_yaml, list(overrides))

    return load
