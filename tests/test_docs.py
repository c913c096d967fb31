"""What the documentation shows: recipes that load, commands that exist, jobs that are YAML."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
import yaml
from surgery.commands.main import EXIT_CODES, app

from surgery.recipe import load_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


def commands() -> Iterator[tuple[str, str]]:
    for page in PAGES:
        for text in blocks(page, "bash") + blocks(page, "console") + blocks(page, "yaml"):
            for line in text.splitlines():
                if match := re.match(r"(?:\$ |\s*- run: |\s*- )?(surgery .*)", line):
                    yield page.name, match.group(1)


def test_the_recipe_that_is_shown_loads(tmp_path: Path) -> None:
    shown, *_ = blocks(ROOT / "docs" / "recipes.md", "yaml")
    path = tmp_path / "recipe.yaml"
    path.write_text(shown)
    recipe = load_recipe(path)
    assert [step.name for step in recipe.steps] == ["merged", "grown"]
    assert recipe.output == "grown"


def test_the_jobs_that_are_shown_are_yaml() -> None:
    github, gitlab = (yaml.safe_load(text) for text in blocks(ROOT / "docs" / "ci.md", "yaml"))
    runs = [step.get("run", "") for step in github["jobs"]["merge"]["steps"]]
    assert any("--report junit.xml" in line for line in runs)
    assert gitlab["release"]["artifacts"]["reports"] == {"junit": "junit.xml"}


@pytest.mark.parametrize(("page", "line"), list(commands()))
def test_options_that_are_shown_exist(page: str, line: str) -> None:
    """Every `surgery VERB --option` of the pages: verb and options are known."""
    verbs = typer.main.get_command(app).commands  # type: ignore[attr-defined]
    _, verb, *rest = shlex.split(line, comments=True)
    if verb.startswith("-"):
        return
    known = {name for parameter in verbs[verb].params for name in parameter.opts}
    known |= {name for parameter in verbs[verb].params for name in parameter.secondary_opts}
    given = [word.partition("=")[0] for word in rest if re.match(r"--?[a-z]", word)]
    assert [option for option in given if option not in known and option != "-h"] == []


def test_the_exit_codes_of_the_page_are_those_of_the_help() -> None:
    page = (ROOT / "docs" / "ci.md").read_text()
    assert re.findall(r"^\| (\d+) \|", page, re.MULTILINE) == re.findall(r"\b(\d+) ", EXIT_CODES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    missing = [
        link for link in links if not link.startswith("http") and not (page.parent / link).exists()
    ]
    assert missing == []
