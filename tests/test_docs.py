"""The documentation is true: its Python runs, its commands parse, its lists are complete, its files are there."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

import uoe_peft
from tests.hub import pretend_hub
from uoe_peft.cli import STAGES
from uoe_peft.cli.help import help_of

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(ROOT).as_posix() for path in DOCS.rglob("*.md"))
TEXTS = {page: (ROOT / page).read_text(encoding="utf-8") for page in ("README.md", *PAGES)}


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(TEXTS[page], "python")])
@pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_the_python_of_a_page_runs(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pretend_hub(tmp_path / "hub", monkeypatch, models=[])
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    # One after the other: a page tells one story. What needs several processes or published weights is marked "py".
    for block in blocks(TEXTS[page], "python"):
        exec(compile(block, page, "exec"), names)


COMMANDS = [
    (page, command)
    for page, text in TEXTS.items()
    for block in blocks(text, "bash")
    for command in block.replace("\\\n", " ").splitlines()
    if command.startswith("uoe-peft ")
]
COMMANDS += [
    (page, " ".join(command.split()))
    for page, text in TEXTS.items()
    for command in re.findall(r"`(uoe-peft [a-z][^`]*)`", text)
]


@pytest.mark.parametrize(("page", "command"), COMMANDS)
def test_a_command_names_a_stage_and_its_options(page: str, command: str) -> None:
    _, stage, *words = shlex.split(command, comments=True)
    if stage == "STAGE":
        return
    assert stage in STAGES, command
    known = help_of(stage)
    for word in words:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word)}\b", known), f"{command}: {stage} has no {word}"


def test_the_paper_index_has_every_paper_that_the_code_names() -> None:
    code = [*Path(uoe_peft.__file__).parent.rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    named = {
        number
        for path in [*code, *(DOCS / "guides").glob("*.md")]
        for number in re.findall(r"\b\d{4}\.\d{5}\b", path.read_text(encoding="utf-8"))
    }
    indexed = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{5})", TEXTS["docs/papers.md"]))
    assert indexed == named


def test_files_that_the_paper_index_names_are_there() -> None:
    package = Path(uoe_peft.__file__).parent
    names = {path.relative_to(package).as_posix() for path in package.rglob("*")}
    for section in re.split(r"^## ", TEXTS["docs/papers.md"], flags=re.MULTILINE)[1:]:
        for *_, where, _ in (line.split("|") for line in section.splitlines() if line.startswith("| [")):
            for place in re.findall(r"`([^`]+)`", where):
                assert any(name == place.rstrip("/") or name.endswith(f"/{place.rstrip('/')}") for name in names), place


def test_the_reference_has_every_public_name() -> None:
    shown = re.findall(r"^::: uoe_peft\.[\w.]*\.(\w+)$", TEXTS["docs/reference/api.md"], flags=re.MULTILINE)
    assert set(uoe_peft.__all__) <= set(shown)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    assert {page.removeprefix("docs/") for page in PAGES} == set(re.findall(r": (\S+\.md)", navigation))


@pytest.mark.parametrize("page", PAGES)
def test_pictures_are_there(page: str) -> None:
    pictures = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", TEXTS[page])
    assert [picture for picture in pictures if not ((ROOT / page).parent / picture).is_file()] == []


@pytest.mark.parametrize("notebook", sorted((ROOT / "examples").glob("*.ipynb")), ids=lambda path: path.name)
def test_a_notebook_is_kept_without_what_it_printed(notebook: Path) -> None:
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert code
    assert [cell["source"] for cell in code if cell["outputs"] or cell["execution_count"] is not None] == []
