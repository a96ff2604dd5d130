"""Files for results: checked to be writable before the work that fills them, and replaced as a whole or not at all."""

import io
import os
import secrets
import stat
from pathlib import Path
from typing import Any


def _unused(folder: Path) -> Path:
    """A name in a folder that nobody can have taken before."""
    return folder / f".{secrets.token_hex(8)}.new"


def _against_kind(path: Path) -> str | None:
    """Why what lies at ``path``, if anything, is not to be replaced by a file: a folder, a device, a pipe."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        return None
    return None if stat.S_ISREG(mode) else "it is a folder" if stat.S_ISDIR(mode) else "it is no ordinary file"


def against(path: Path) -> str | None:
    """Why a file cannot be written at ``path``, or None: tries it with an empty file beside it, which is removed."""
    try:
        reason = _against_kind(path)
        if reason is None:
            folder = path.parent
            while not folder.exists():  # what is missing is made when there is something to write
                folder = folder.parent
            trial = _unused(folder)
            trial.touch(exist_ok=False)
            trial.unlink()
    except OSError as error:
        return error.strerror or str(error)
    return reason


def write(path: Path, content: str | bytes) -> None:
    """Makes ``content`` the whole of the file at ``path``, in one step: a run that is cut short leaves the old file or the new.

    The content goes to a new file beside it, so that writers do not meet, and no link is followed: one at ``path`` itself is
    replaced by the file. The new file has the permissions of the old one, if any. Text is UTF-8. Raises OSError where this is
    not possible, as for a device or a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if reason := _against_kind(path):
        raise OSError(f"{path}: {reason}")
    mode = None if path.is_symlink() or not path.exists() else stat.S_IMODE(path.stat().st_mode) & 0o777
    fresh = _unused(path.parent)
    # "x" fails where the name exists, also as a link; at no moment may more users read the new file than the old one.
    with open(fresh, "xb", opener=lambda name, flags: os.open(name, flags, 0o666 if mode is None else mode)) as file:
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            if mode is not None:
                fresh.chmod(mode)
            fresh.replace(path)
        except BaseException:
            fresh.unlink(missing_ok=True)
            raise


def write_figure(path: Path, figure: Any, dpi: float | None = None) -> None:
    """Writes a figure of matplotlib as ``write`` does, in the format that the name ends in."""
    picture = io.BytesIO()
    figure.savefig(picture, format=path.suffix[1:].lower(), **({} if dpi is None else {"dpi": dpi}))
    write(path, picture.getvalue())
