"""SHA-256 digests of files, and the file `SHA256SUMS` that holds them, as `sha256sum` writes it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath

from surgery.checkpoint import CHECKSUMS, SIGNATURE
from surgery.errors import FormatError, InputError
from surgery.parallel import Progress, run_all

READ_BYTES = 1 << 20
_LINE = re.compile(r"(?P<escaped>\\?)(?P<digest>[0-9a-fA-F]{64}) [ *](?P<name>.+)")
_ESCAPES = {"\\": "\\\\", "\n": "\\n", "\r": "\\r"}
_UNESCAPES = {escape[1]: character for character, escape in _ESCAPES.items()}


def sha256(path: Path, progress: Progress | None = None) -> str:
    """The digest of a file, read a part at a time."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(READ_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while got := file.readinto(buffer):
                digest.update(buffer[:got])
                if progress is not None:
                    progress(got)
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    return digest.hexdigest()


def sha256_of_all(
    paths: Iterable[Path], threads: int | None = None, progress: Progress | None = None
) -> dict[Path, str]:
    """The digest of every file, several at a time."""
    wanted = list(dict.fromkeys(paths))
    found: dict[Path, str] = {}

    def work(path: Path) -> None:
        found[path] = sha256(path, progress)

    run_all(iter(wanted), work, threads, with_torch=False)
    return {path: found[path] for path in wanted}


def hub_digest(path: Path) -> str | None:
    """The digest that the Hub's cache knows a file by: a large file's blob is named by it."""
    if not path.is_symlink():
        return None
    blob = path.resolve()
    known = re.fullmatch(r"[0-9a-f]{64}", blob.name) and blob.parent.name == "blobs"
    return blob.name if known else None


def files_below(folder: Path) -> list[str]:
    """The files of a model by relative path, in order: all but hidden ones, compiled Python, and
    the two that are about the others."""
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(
        name.as_posix()
        for name in names
        if not any(part.startswith(".") or part == "__pycache__" for part in name.parts)
        and name.as_posix() not in (CHECKSUMS, SIGNATURE)
    )


def sums_bytes(digests: Mapping[str, str]) -> bytes:
    """What `sha256sum` would write of these files."""
    lines = []
    for name, digest in sorted(digests.items()):
        escaped = "".join(_ESCAPES.get(character, character) for character in name)
        mark = "" if escaped == name else "\\"
        lines.append(f"{mark}{digest}  {escaped}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def read_sums(path: Path) -> dict[str, str]:
    """The digests in a file that `sha256sum` could check. Raises FormatError for a line that says
    something else, or a name that leads out of the directory."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror}") from error
    digests: dict[str, str] = {}
    problems = []
    for number, line in enumerate(text.split("\n"), 1):
        line = line.removesuffix("\r")
        if not line:
            continue
        match = _LINE.fullmatch(line)
        if match is None:
            problems.append(f"{path}, line {number}: no SHA-256 and a file name, as sha256sum has")
            continue
        name = match["name"]
        if match["escaped"]:
            name = re.sub(r"\\(.)", lambda found: _UNESCAPES.get(found[1], found[0]), name)
        place = PurePosixPath(name)
        if place.is_absolute() or ".." in place.parts:
            problems.append(f"{path}, line {number}: {name!r} isn't below the directory")
        elif (
            digests.setdefault(place.as_posix(), match["digest"].lower()) != match["digest"].lower()
        ):
            problems.append(f"{path}, line {number}: {name!r} has two digests")
    FormatError.raise_if(problems)
    return digests
