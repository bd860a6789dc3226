"""Descriptions of pictures and of classes, read from files and matched to images."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

import numpy as np
from datasets import Dataset, Image, Value

from ...utils.files import parse_json, read_json, read_text
from ...utils.names import composed
from ..class_lists import normalized_name
from ..remarks import remark
from .coop import match_images

CAPTIONS_FILE = "captions.jsonl"
# The term in results and cards for each source of captions.
DESCRIPTIONS, CLASS_DESCRIPTIONS, TEMPLATE = "descriptions", "class descriptions", "template"


def attach_captions(
    dataset: Dataset,
    descriptions: str | os.PathLike[str] | None = None,
    template: str = "a photo of a {}.",
    seed: int = 0,
) -> tuple[Dataset, str]:
    """The dataset with a sentence for each image as `caption`, and where the sentences came from, one of:

    - "descriptions": one sentence per image, from a file of JSON lines {"file_name", "caption"}, from a text file of
      lines `image<TAB>description[<TAB>class]` as TGP-T's release uses, or, without `descriptions`, from the column
      `caption` that the dataset has. Images are found by path or by file name and class, see `match_images`. Images
      that the file does not describe get the template, with a warning that counts them.
    - "class descriptions": one of the sentences about the image's class, from a .json file {class: [sentences]},
      chosen by `seed` and the image's row.
    - "template": `template` with the class name, if there is nothing else.

    Source: the content descriptions of TGP-T (Tan et al., AAAI 2024, section 3.3); CuPL (Pratt et al., ICCV 2023).

    Raises FileNotFoundError for a missing file, and ValueError for a damaged one, one that describes none of the
    images, or class descriptions that lack a class.

    Example:
        >>> train = hf_tgpt.data.load_splits("pictures")["train"]
        >>> train, source = hf_tgpt.data.attach_captions(train, template="a blurry photo of a {}.")
        >>> source, train[0]["caption"]
        ('template', 'a blurry photo of a cat.')
    """
    names = dataset.features["label"].names
    labels = dataset["label"][:]
    sentences = [template.replace("{}", names[label]) for label in labels]
    word = TEMPLATE
    if descriptions is None and "caption" in dataset.column_names:
        return dataset, DESCRIPTIONS
    if descriptions is not None:
        file = _existing(descriptions)
        if file.suffix.lower() == ".json":
            word, of_class = CLASS_DESCRIPTIONS, read_class_descriptions(file, names)
            for row, label in enumerate(labels):
                choices = of_class[names[label]]
                sentences[row] = choices[np.random.default_rng([seed, row]).integers(len(choices))]
        else:
            word, described = DESCRIPTIONS, _find_captions(dataset, read_captions(file), file)
            for row, sentence in described.items():
                sentences[row] = sentence
            if len(described) < len(dataset):
                remark(
                    f"{file} describes {len(described)} of {len(dataset)} images; the other "
                    f"{len(dataset) - len(described)} get {template!r} with the class name."
                )
    if "caption" in dataset.column_names:
        dataset = dataset.remove_columns("caption")
    return dataset.add_column("caption", sentences, feature=Value("string")), word


def read_class_descriptions(file: str | os.PathLike[str], class_names: list[str]) -> dict[str, list[str]]:
    """Sentences about every class, {class name: [sentences]} in the order of `class_names`.

    The file is a JSON object {class: [sentences]} as in CuPL; its class names may be spelled differently ("car_side"),
    and it may describe more classes.

    Raises FileNotFoundError for a missing file and ValueError for a damaged one or one that lacks a class.

    Example:
        >>> from pathlib import Path
        >>> written = Path("cupl.json").write_text('{"Cat": ["A cat has whiskers."], "dog": ["A dog barks."]}')
        >>> hf_tgpt.data.read_class_descriptions("cupl.json", ["cat", "dog"])
        {'cat': ['A cat has whiskers.'], 'dog': ['A dog barks.']}
    """
    file = _existing(file)
    try:
        content = read_json(file)
        given = {normalized_name(name): [_sentence(text) for text in texts] for name, texts in content.items()}
        if len(given) < len(content):
            raise ValueError("it has two lists of sentences for one class")
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(f"{file} is not a JSON object of {{class: [sentences]}} ({error}); correct it.") from error
    missing = [name for name in class_names if not given.get(normalized_name(name))]
    if missing:
        known = {normalized_name(name) for name in class_names}
        others = [name for name in content if normalized_name(name) not in known]
        raise ValueError(
            f"{file} has no sentences for {len(missing)} of {len(class_names)} classes ({', '.join(missing[:8])})"
            + (f", but for others ({', '.join(others[:8])})" if others else "")
            + "; add them, or rename classes in the file."
        )
    return {name: given[normalized_name(name)] for name in class_names}


def read_captions(file: str | os.PathLike[str]) -> dict[str, tuple[str, str | None]]:
    """{image: (description, class or None)} from JSON lines or from lines `image<TAB>description[<TAB>class]`.

    Raises FileNotFoundError for a missing file, and ValueError for a line that is neither or repeats an image.
    """
    file = _existing(file)
    captions: dict[str, tuple[str, str | None]] = {}
    for number, line in enumerate(read_text(file).split("\n"), start=1):
        if not line.strip():
            continue
        name, caption, class_name = _read_line(line.rstrip("\r"), f"{file}, line {number}", file.suffix.lower())
        if not caption or name in captions:
            problem = "is there twice" if caption else "has an empty caption"
            raise ValueError(f"{file}, line {number}: {name} {problem}; give every image one caption.")
        captions[name] = (caption, class_name)
    return captions


def caption_folder(splits: dict[str, Dataset], root: Path) -> dict[str, Dataset]:
    """Splits of pictures in a folder, with the captions of its `captions.jsonl` if it has one; None where it has none.

    Raises ValueError for a damaged file, or one that does not describe every image of a train folder.
    """
    file = root / CAPTIONS_FILE
    if not file.exists():
        return splits
    captions = read_captions(file)
    captioned = {}
    for split, data in splits.items():
        files = [os.path.relpath(record["path"], root) for record in undecoded_images(data)]
        texts = [captions.get(Path(name).as_posix(), (None,))[0] for name in files]
        missing = [name for name, text in zip(files, texts, strict=True) if text is None]
        if missing and split == "train" and len(splits) > 1:
            raise ValueError(
                f"{file} has no caption for {len(missing)} of {len(files)} images in {root / 'train'}, the first is "
                f"{missing[0]}; add them or remove the file."
            )
        captioned[split] = data.add_column("caption", texts, feature=Value("string"))
    return captioned


def image_key(record: dict, root: str | os.PathLike[str] | None = None) -> str:
    """An image's name {"bytes", "path"} in a captions file: its path, relative to `root` if below, or its "sha256:...".

    The hash is for images that are not separate files, such as in Hub data sets.
    """
    path = record.get("path")
    if record.get("bytes") is not None or not path:
        return "sha256:" + hashlib.sha256(record["bytes"]).hexdigest()
    if root is not None and Path(path).is_relative_to(root):
        path = os.path.relpath(path, root)
    return Path(path).as_posix()


def _find_captions(dataset: Dataset, captions: dict[str, tuple[str, str | None]], file: Path) -> dict[int, str]:
    """The description of each row that has one. Raises ValueError if none has."""
    keys = [composed(image_key(record)) for record in undecoded_images(dataset)]
    captions = {composed(name): caption for name, caption in captions.items()}
    names = dataset.features["label"].names
    exact = set(keys)
    # A name that is a key identifies its images: one, or all that are equal.
    wanted = [(name, class_name) for name, (_, class_name) in captions.items() if name not in exact]
    rows = match_images(wanted, file, keys, classes=[names[label] for label in dataset["label"]])
    sentences = {row: captions[name][0] for (name, _), row in zip(wanted, rows, strict=True) if row is not None}
    sentences |= {row: captions[key][0] for row, key in enumerate(keys) if key in captions}
    if not sentences:
        raise ValueError(
            f"{file} describes none of the {len(dataset)} images: it names {next(iter(captions), 'no image')}, the "
            f"data {keys[0]}; use the descriptions of this data set."
        )
    return sentences


def undecoded_images(dataset: Dataset) -> Dataset:
    """The images as {"bytes", "path"}, read one at a time."""
    return dataset.select_columns("image").cast_column("image", Image(decode=False))["image"]


def _read_line(line: str, place: str, suffix: str) -> tuple[str, str, str | None]:
    if suffix == ".jsonl":
        try:
            entry = parse_json(line, place)
            class_name = entry.get("class")
            if class_name is not None and not isinstance(class_name, str):
                raise TypeError("the class is not a string")
            return Path(entry["file_name"]).as_posix(), entry["caption"].strip(), class_name
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f'{place}: {line[:80]!r} is not {{"file_name": path, "caption": text}}; correct it.'
            ) from error
    fields = [field.strip() for field in line.split("\t")]
    if not 2 <= len(fields) <= 3 or not fields[0]:
        raise ValueError(f"{place}: {line[:80]!r} is not image<TAB>description<TAB>class; correct it.")
    return Path(fields[0]).as_posix(), fields[1], fields[2] if len(fields) == 3 else None


def _sentence(text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{text!r} is not a sentence")
    return re.sub(r"\s+", " ", text).strip()


def _existing(file: str | os.PathLike[str]) -> Path:
    file = Path(file).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"The descriptions {str(file)!r} do not exist; correct the path.")
    return file
