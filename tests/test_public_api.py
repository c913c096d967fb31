"""What `import surgery` promises."""

from __future__ import annotations

import pkgutil
import re
from pathlib import Path

import processes

import surgery
from surgery import public


def test_all_is_what_is_there() -> None:
    offered = {
        name
        for name, value in vars(public).items()
        if not name.startswith("_") and getattr(value, "__module__", None) is not None
    }
    assert offered == set(surgery.__all__) <= set(dir(surgery))
    assert all(getattr(surgery, name) is getattr(public, name) for name in surgery.__all__)
    modules = {module.name for module in pkgutil.iter_modules(surgery.__path__)}
    assert not modules & offered  # a module is there before what is imported when asked for
    assert list(surgery.__all__) == sorted(surgery.__all__, key=lambda n: (n[0].islower(), n))


def test_no_module_of_the_library_needs_another_to_be_imported_first() -> None:
    """The package imports what is public when it is asked for something: its own modules name
    each other, or one of them is asked for before it is there."""
    root = Path(surgery.__path__[0])
    asking = re.compile(r"^\s*(from surgery import|import surgery$)", re.MULTILINE)
    files = [file.relative_to(root) for file in root.rglob("*.py")]
    found = [str(file) for file in files if asking.search((root / file).read_text("utf-8"))]
    assert [file for file in found if not file.startswith("commands")] == ["__init__.py"]


def test_what_is_not_there_is_no_attribute() -> None:
    assert not hasattr(surgery, "transplant")


def test_help_imports_no_more_than_it_shows() -> None:
    """Neither the library behind the verbs nor what it needs: starting takes no time."""
    shown = "import sys, surgery.commands.main; print(*sys.modules)"
    done = processes.surgery(code=shown)
    assert done.returncode == 0, done.stderr
    made = done.stdout.split()
    assert "surgery.commands.main" in made
    assert not {"torch", "numpy", "transformers", "surgery.public", "surgery.tensor"} & set(made)


def test_everything_public_says_what_it_is() -> None:
    assert [name for name in surgery.__all__ if not getattr(surgery, name).__doc__] == []


def test_every_error_has_an_exit_code_of_its_branch() -> None:
    from surgery import errors

    codes = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, surgery.SurgeryError)
    }
    assert codes == {
        "SurgeryError": 1,
        "ArgumentError": 2,
        "InputError": 3,
        "NotFoundError": 3,
        "FormatError": 3,
        "MismatchError": 3,
        "RecipeError": 3,
        "UnsupportedError": 4,
        "OutputError": 5,
        "VerificationError": 6,
    }
