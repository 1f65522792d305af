"""Write files so that a crash never leaves half of one."""

from __future__ import annotations

import os
import tempfile
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Write the file through a temporary one beside it, so that readers see all of it or none.

    An error or an interruption leaves the file as it was and removes the temporary one.
    """
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())  # or a crash of the machine may leave the new name empty
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with suppress(FileNotFoundError):  # interrupted just after it got its name
            os.unlink(name)
        raise
