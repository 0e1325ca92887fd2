"""argparse with one-line errors, and with options that are added only to the command that was chosen."""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from sitdist.errors import ConfigError, shortened


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line that names the nearest right word.

    `options` adds a command's options when the command is chosen, as some of them are slow to derive; `run` runs it.
    """

    def __init__(
        self,
        *args: Any,
        options: Callable[[Parser], None] | None = None,
        run: Callable[[argparse.Namespace], int | None] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._add_options = options
        if run is not None:
            self.set_defaults(command=run)

    def add_actions(self) -> argparse._SubParsersAction[Parser]:
        """The actions of a group of commands; each is added with `add_parser`."""
        return self.add_subparsers(required=True, metavar="ACTION")

    def complete(self) -> Parser:
        """Add the command's options, if they are not there yet; returns itself."""
        add_options, self._add_options = self._add_options, None
        if add_options is not None:
            add_options(self)
        return self

    def add_argument(self, *names: str, **given: Any) -> argparse.Action:  # type: ignore[override]
        """argparse's, which also tells the default in the help."""
        default = given.get("default")
        if default is not None and default != [] and default is not argparse.SUPPRESS:
            shown = f"{default:g}" if isinstance(default, float) else default
            given["help"] = f"{given.get('help', '')} Default: {shown}.".lstrip()
        return super().add_argument(*names, **given)

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[no-untyped-def, override]
        self.complete()
        namespace, rest = super().parse_known_args(args, namespace)
        if rest:  # here and not in parse_args, so that the command itself knows which options are near
            self.error(f"unrecognized arguments: {rest[0]}")
        return namespace, rest

    def error(self, message: str) -> NoReturn:
        unknown = re.search(r"unrecognized arguments: (\S+)|invalid choice: '([^']*)'", message)
        if unknown:
            word = unknown[1] or unknown[2]
            known = list(self._option_string_actions)
            for action in self._actions:
                known += [str(choice) for choice in action.choices or ()]
            near = difflib.get_close_matches(word, known, 1, 0.5)
            what = "unknown option" if word.startswith("-") else "unknown"
            remedy = f"did you mean '{near[0]}'?" if near else f"see `{self.prog} --help`"
            message = f"{what} '{word}'; {remedy}"
        raise ConfigError(f"{self.prog}: {shortened(message, 400)}")

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        sys.stdout.flush()  # of --help and --version, where a closed pipe can still be told
        super().exit(status, message)
