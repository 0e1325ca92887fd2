"""The documentation builds, and every command that it shows is one that the command line takes."""

import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sitdist.cli.main import make_parser
from sitdist.errors import ConfigError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("*/README.md"), *ROOT.glob("docs/*.md")])
BLOCK = re.compile(r"^```(?:sh|bash)?\n(.*?)^```", re.DOTALL | re.MULTILINE)
PLACEHOLDERS = {"LABEL": "0", "N": "4", "D": "1"}


def in_blocks(text: str) -> list[str]:
    lines = [line.strip() for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [line for line in lines if line.startswith("sitdist ")]


def in_sentences(text: str) -> list[str]:
    return re.findall(r"`(sitdist [a-z][^`]*)`", BLOCK.sub("", text))


def arguments_of(command: str) -> list[str]:
    words = [word for word in shlex.split(command, comments=True)[1:] if word not in ("...", "|")]
    return [PLACEHOLDERS.get(word, word).strip("[]") for word in words]


def complaint(command: str) -> str:
    """What the command line says against it; nothing if it takes it."""
    try:
        make_parser().parse_args(arguments_of(command))
    except ConfigError as error:
        return f"{command}: {error}"
    return ""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_command_line_takes_what_the_page_shows(page: Path) -> None:
    text = page.read_text()
    assert [said for command in in_blocks(text) if (said := complaint(command))] == []
    # a sentence may leave out arguments, but not invent any
    said = [complaint(command) for command in in_sentences(text)]
    assert [line for line in said if line and "are required" not in line] == []


def test_a_command_that_does_not_exist_is_seen() -> None:
    assert complaint("sitdist trian CONFIG --out RUN")
    assert complaint("sitdist train CONFIG --out RUN --resmue")
    assert sum(len(in_blocks(page.read_text())) for page in PAGES) > 40


def test_the_reference_is_what_its_generator_writes() -> None:
    written = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["page"]()
    assert (ROOT / "docs" / "reference.md").read_text() == written, "run: python docs/make_reference.py"
    for line in ("### `sitdist shards info`", "### `evaluate`", "### `splits`, kind npz"):
        assert line in written.splitlines()


@pytest.mark.distributed
def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-d", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "estimate" in (tmp_path / "site" / "api.html").read_text()
