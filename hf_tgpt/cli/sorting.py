"""Pictures in a folder for each class, as links or copies; the pictures themselves stay where they are."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

UNSURE = "unsure"
_LONGEST = 200  # bytes, of the 255 that file systems allow
# Characters that a system forbids in file names, or interprets.
_UNSAFE = re.compile(r'[\x00-\x1f\x7f/\\:*?"<>|\ud800-\udfff]')


class Sorter:
    """Puts pictures into a folder for each class, and those with a low score or no class into the folder `unsure`.

    Two pictures with one name get two names there; a picture that is already there is not added again.

    Example:
        >>> put = Sorter("sorted", ["cat", "black/white cat"], min_score=0.5)
        >>> put("cat.jpg", "black/white cat", 0.9)
        >>> [str(path) for path in Path("sorted").rglob("*.jpg")]
        ['sorted/black_white cat/cat.jpg']
    """

    def __init__(
        self, folder: str | os.PathLike[str], class_names: Sequence[str], min_score: float = 0.0, copy: bool = False
    ):
        self.folder, self.min_score, self.copy = Path(folder), min_score, copy
        self.folders = folder_names(class_names)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"`sort_into`={str(folder)!r} cannot be made ({error.strerror}); name a folder.") from None

    def __call__(self, picture: str, label: str | None, score: float) -> None:
        """Puts one picture there. Raises ValueError if the folder cannot take it."""
        folder = self.folder / (UNSURE if label is None or score < self.min_score else self.folders[label])
        try:
            put_into(folder, picture, self.copy)
        except (OSError, NotImplementedError) as error:
            remedy = "choose another folder" if self.copy else "choose another folder, or set `copy`=True"
            raise ValueError(f"`sort_into`={str(self.folder)!r} cannot take {picture} ({error}); {remedy}.") from error


def put_into(folder: Path, picture: str, copy: bool = False) -> None:
    """Puts a link to a picture, or a copy, into a folder. One that is already there is not added again.

    Raises OSError or NotImplementedError if the folder cannot take it.
    """
    folder.mkdir(exist_ok=True)
    source, number = Path(os.path.abspath(picture)), 1
    place = folder / source.name
    while os.path.lexists(place):
        if _is_there(place, source, copy):
            return
        number += 1
        place = folder / f"{source.stem} ({number}){source.suffix}"
    if copy:
        draft = folder.parent / f".{os.getpid()}{source.suffix}"
        shutil.copy2(source, draft)
        os.replace(draft, place)
    else:
        place.symlink_to(source)


def _is_there(place: Path, source: Path, copy: bool) -> bool:
    if not copy:
        return place.is_symlink() and os.readlink(place) == str(source)
    there, own = place.stat(), source.stat()
    return not place.is_symlink() and (there.st_size, there.st_mtime_ns) == (own.st_size, own.st_mtime_ns)


def folder_names(class_names: Sequence[str]) -> dict[str, str]:
    """A folder's name for each class, no two alike, and none that leads elsewhere or is `unsure`.

    Example:
        >>> folder_names(["and/or", "and_or", "..", "Unsure"])
        {'and/or': 'and_or', 'and_or': 'and_or (2)', '..': '_', 'Unsure': 'Unsure (2)'}
    """
    names, taken = {}, {UNSURE}
    for name in class_names:
        safe = _UNSAFE.sub("_", name).strip(" .").encode()[:_LONGEST].decode(errors="ignore") or "_"
        number, free = 1, safe
        while free.casefold() in taken:  # some file systems ignore case
            number += 1
            free = f"{safe} ({number})"
        taken.add(free.casefold())
        names[name] = free
    return names
