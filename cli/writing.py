"""Files that commands write: they appear when they are complete."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .exits import CommandFailed
from .output import line
from .storing import is_expected


@contextmanager
def writing(file: str) -> Iterator[Callable[[bytes], Any]]:
    """A function that writes lines to standard output, a device, a pipe, or a file that is put in place at the end.

    Raises `CommandFailed` if the file cannot be written.
    """
    if file == "-":
        yield lambda text: line(text.decode())
        return
    path = Path(file)
    in_place = path.exists() and not path.is_file()
    target = path if in_place else path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        with target.open("wb") as stream:
            yield lambda text: stream.write(text + b"\n")
        if not in_place:
            target.replace(path)
    except OSError as error:
        if is_expected(error):  # some errors of natsrt are OSErrors too
            raise
        raise CommandFailed(f"{file}: {error.strerror}") from error
    finally:
        if not in_place:
            target.unlink(missing_ok=True)
