"""Errors that a user can cause: one line that names the thing, the value and the remedy."""


class SitdistError(Exception):
    """Base of every error shown to the user as a single line, without a traceback, with exit code 2.

    `of_rank` is set where every process raises what one of them met: then only the main process shows it.
    """

    of_rank: int | None = None


class ConfigError(SitdistError):
    """A config, a recipe or a command line that cannot be honoured."""


class DataError(SitdistError):
    """A dataset, a shard, an image or a pose that cannot be used."""


class PoseError(SitdistError):
    """A matrix that is not the camera pose it is used as."""


class CodecError(SitdistError):
    """A codec that cannot be loaded, or that disagrees with the dataset."""


class CheckpointError(SitdistError):
    """A checkpoint that is missing, damaged or of another model."""


class NonFiniteError(SitdistError):
    """A loss or a gradient that is not finite."""


class ProcessError(SitdistError):
    """Another process of this command has failed, ended, or does not answer."""


class OutOfMemoryError(SitdistError):
    """More memory than there is."""


class RunInterrupted(BaseException):
    """A signal asked the run to stop; everything is saved and the run can be resumed (exit code 75)."""


def one_line(text: str) -> str:
    """Text for a terminal: control characters, line breaks and what UTF-8 cannot hold are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape", "surrogatepass").decode()
        for character in text
    )
