"""The plan of a comparison: its methods, and its training runs with their names and folders."""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..data import find_benchmark
from ..evaluation.comparison import Case
from ..methods import available_methods, method_name

# The names for --methods: a method of `hf-tgpt train` and its options.
FAST = {
    "zero-shot": "zero_shot",
    "linear probe": "linear_probe",
    "GDA": "gda",
    "Tip-Adapter": "tip_adapter",
    "Tip-Adapter-F": "tip_adapter --config tip_adapter_f.json",
    "ProKeR": "proker",
    "ZS-LP": "zs_lp",
    "CLAP": "clap",
    "LP++": "lp_plus_plus",
    "TaskRes": "task_res",
    "CLIP-Adapter": "clip_adapter",
}
THROUGH_THE_TOWERS = {
    "CoOp": "coop",
    "KgCoOp": "kgcoop",
    "CoCoOp": "cocoop",
    "VPT": "ivlp --text_prompt_length 0",
    "deep text": "ivlp --vision_prompt_length 0",
    "IVLP": "ivlp",
    "MaPLe": "maple",
    "PromptSRC": "promptsrc",
    "MMRL": "mmrl",
    "TGP-T": "tgpt",
    "mutual": "mutual_prompt",
    "LoRA": "lora",
    "CLIP-LoRA": "lora --use_rslora",
    "2SFS": "two_stage",
}
LABELS = FAST | THROUGH_THE_TOWERS
# Methods of other packages go by their own names.
LABELS |= {name: name for name in available_methods() if not any(name in words.split() for words in LABELS.values())}


@dataclass(frozen=True)
class Method:
    label: str
    words: tuple[str, ...]  # options of train after --method


@dataclass(frozen=True)
class Trial:
    """One training run and its tests."""

    case: Case
    source: str  # the data set as it was typed
    method: Method
    seed: int
    classes: str
    folder: Path

    @property
    def done(self) -> bool:
        return (self.folder / "results.json").exists()

    @property
    def log(self) -> Path:
        return self.folder.with_suffix(".log")

    def __str__(self) -> str:
        classes = "" if self.classes == "all" else f", {self.classes} classes"
        shots = f"{self.case.shots} shot{'s' * (self.case.shots > 1)}"
        return f"{self.case.dataset}{classes}, {shots}, {self.case.method}, seed {self.seed}"


def chosen_methods(asked: Sequence[str]) -> list[Method]:
    """The methods in --methods; case, spaces and hyphens are ignored.

    Raises ValueError for an unknown name and for a label that two methods share.

    Example:
        >>> [method.label for method in chosen_methods(["clip-adapter", "Short: maple --prompt_depth 1"])]
        ['CLIP-Adapter', 'Short']
    """
    known = {_plain(name): entry for entry in LABELS.items() for name in (*entry, entry[1].replace("_", "-"))}
    ours = {words.split()[0] for words in LABELS.values()}
    of_others = [name for name in available_methods() if name not in ours]
    groups = {"fast": list(FAST), "all": [*LABELS, *of_others]}
    chosen: dict[str, Method] = {}
    for text in (member for name in asked for member in groups.get(name.lower(), [name])):
        label, _, words = (part.strip() for part in text.partition(": "))
        if not words:
            label, words = known.get(_plain(label), (label, label))
        name, *options = shlex.split(words)
        try:
            method = Method(label, (method_name(name), *options))
        except ValueError:
            names = ", ".join(["fast", "all", *LABELS, *of_others])
            raise ValueError(
                f'`methods`: {text!r} is unknown; choose from {names}, or write "LABEL: METHOD OPTIONS".'
            ) from None
        if chosen.setdefault(label, method) != method:
            raise ValueError(f"`methods`: two are called {label!r}; give one of them another label.")
    return list(chosen.values())


def _plain(label: str) -> str:
    """A label without case, spaces and hyphens; LP++ keeps its plus signs."""
    return re.sub(r"[\s_-]", "", label.lower())


def short_names(sources: Sequence[str]) -> dict[str, str]:
    """The names of data sets in tables: known names and Hub ids unchanged, paths shortened to as few parts as possible.

    Example:
        >>> list(short_names(["dtd", "org/pictures", "/data/birds"]).values())
        ['dtd', 'org/pictures', 'birds']
        >>> list(short_names(["/old/birds", "/new/birds", "dtd:/data/dtd"]).values())
        ['old/birds', 'new/birds', 'dtd']
    """
    parts = dict.fromkeys(sources, 1)
    while True:
        names = {source: _called(source, count) for source, count in parts.items()}
        taken = list(names.values())
        longer = {source: count + 1 for source, count in parts.items() if taken.count(names[source]) > 1}
        if not longer or max(longer.values()) > 30:  # more parts than any path has
            return names
        parts |= longer


def _called(source: str, parts: int) -> str:
    place, known = _place(source)
    if place is None or (known and parts == 1):
        return known or source
    return known + ":" * bool(known) + "/".join(place.parts[1:][-parts:])


def _place(source: str) -> tuple[Path | None, str]:
    """The path that a data set is read from, if any, and the name before it in NAME:FOLDER."""
    path = Path(source).expanduser()
    benchmark, folder = (None, None) if path.exists() else find_benchmark(source)
    if benchmark is not None:
        return Path(folder).expanduser().absolute() if folder else None, source.partition(":")[0]
    is_path = path.exists() or source.startswith((".", "/", "~")) or source.count("/") > 1
    return path.absolute() if is_path and not source.startswith("toyworld") else None, ""


def data_folder(source: str) -> str:
    """A data set's folder: its name and, since that may not be unique, a hash of the path."""
    place, _ = _place(source)
    mark = "" if place is None else f"-{_mark(str(place.resolve()))}"
    return file_name(_called(source, 1)) + mark


def method_folder(method: Method, for_all: Sequence[str]) -> str:
    """A method's folder: its words, and a hash of the options that apply to all methods."""
    mark = f"-{_mark(' '.join(for_all))}" if for_all else ""
    return file_name(" ".join(method.words)) + mark


def file_name(text: str) -> str:
    """The text as a file name; a long one is cut, with a hash."""
    name = re.sub(r"[^\w.+-]+", "_", text).strip("._")
    return name if len(name) <= 100 else f"{name[:80]}-{_mark(text)}"


def _mark(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
