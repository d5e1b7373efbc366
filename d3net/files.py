"""Paths that callers give, and files that are whole or not there."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def path_of(name: str, value: str | os.PathLike[str]) -> Path:
    """The argument `name` as a path.

    Raises:
        TypeError: it is none.
    """
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} is {value!r}; accepted is a path, a str or pathlib.Path")
    return Path(value)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; the file takes the place of `path` at the end.

    Where writing fails or is interrupted, what was there before stays.

    Raises:
        FileNotFoundError: there is no such folder.
        IsADirectoryError: `path` is a folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {path.parent} to write {path.name} to")
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; accepted is the name of a file")
    part = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        yield part
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
