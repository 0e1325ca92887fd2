"""Run commands in this process."""

import pytest

from sitdist.cli import main as cli


@pytest.fixture
def run(capsys):
    """A command that has to work; gives what it printed."""

    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert code == 0, printed.err
        return printed.out

    return call


@pytest.fixture
def refused(capsys):
    """A command that has to fail with one line; gives the line without its beginning."""

    def call(*arguments):
        code = cli.run([str(argument) for argument in arguments])
        printed = capsys.readouterr()
        assert (code, printed.out) == (2, "")
        assert printed.err.startswith("sitdist: error: ")
        assert printed.err.count("\n") == 1
        assert printed.err.endswith("\n")
        return printed.err.removeprefix("sitdist: error: ").rstrip()

    return call
