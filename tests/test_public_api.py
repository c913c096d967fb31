"""What `import surgery` promises."""

from __future__ import annotations

import surgery


def test_all_is_what_is_there() -> None:
    public = {
        name
        for name, value in vars(surgery).items()
        if not name.startswith("_") and getattr(value, "__module__", None) is not None
    }
    assert public == set(surgery.__all__)
    assert list(surgery.__all__) == sorted(surgery.__all__, key=lambda n: (n[0].islower(), n))


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
