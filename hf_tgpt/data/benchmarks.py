"""The standard data sets for comparing methods: sources, class names, and templates.

A data set is one entry in `BENCHMARKS` and one file in `benchmark_classes/`, with one class per line in the order of
CoOp's labels (Zhou et al., IJCV 2022): `name`, or `name on disk or on the Hub<TAB>name`. Names and templates are
CoOp's.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from pathlib import Path

from .class_lists import normalized_name, read_class_names

_FOLDER = Path(__file__).parent / "benchmark_classes"


@dataclass(frozen=True)
class Benchmark:
    """A standard data set.

    `name` is the source for `load_splits`; `hub_id` is None if no copy on the Hub is known that `datasets` can read
    (use a folder then: "NAME:FOLDER"). `tested_split` is the split of that copy for testing. A robustness data set is
    `only_tested`: it has no training images, and its classes are a subset of ImageNet's. `by_position`: the Hub's copy
    numbers the classes in our order, but has other names for them, or none.

    Example:
        >>> hf_tgpt.data.BENCHMARKS["oxford_pets"].templates
        ['a photo of a {}, a type of pet.']
    """

    name: str
    title: str
    num_classes: int
    licence: str
    hub_id: str | None
    label_column: str | None = None  # None: found by its type
    templates: list[str] = field(default_factory=lambda: ["a photo of a {}."])
    tested_split: str = "test"
    only_tested: bool = False
    by_position: bool = False
    class_names_of: str | None = None  # another entry whose file also serves this one

    def names(self) -> dict[str, str]:
        """{name on disk or on the Hub: class name} in the order of the labels."""
        given = read_class_names(_FOLDER / f"{self.class_names_of or self.name}.txt")
        return given if isinstance(given, dict) else {name: name for name in given}

    def class_names(self) -> list[str]:
        """The class names in the order of the labels."""
        return list(self.names().values())


_IMAGENET_TERMS = "ImageNet terms of access: non-commercial research and education"
_ENTRIES = [
    Benchmark("imagenet", "ImageNet", 1000, _IMAGENET_TERMS, "ILSVRC/imagenet-1k",
              tested_split="validation", by_position=True),
    # The Hub's copy is not split; CoOp's split file or the seeded split cuts it.
    Benchmark("caltech101", "Caltech101", 100, "CC BY 4.0", "flwrlabs/caltech101"),
    Benchmark("oxford_pets", "OxfordPets", 37, "CC BY-SA 4.0", "timm/oxford-iiit-pet", label_column="label",
              templates=["a photo of a {}, a type of pet."]),
    Benchmark("stanford_cars", "StanfordCars", 196, "non-commercial research", "tanganke/stanford_cars"),
    Benchmark("flowers102", "Flowers102", 102, "not stated", "dpdl-benchmark/oxford_flowers102",
              templates=["a photo of a {}, a type of flower."]),
    Benchmark("food101", "Food101", 101, "not stated; the pictures belong to their photographers", "ethz/food101",
              templates=["a photo of {}, a type of food."], tested_split="validation"),
    Benchmark("fgvc_aircraft", "FGVCAircraft", 100, "non-commercial research", "Donghyun99/FGVC-Aircraft",
              templates=["a photo of a {}, a type of aircraft."]),
    Benchmark("sun397", "SUN397", 397, "not stated; for research", "tanganke/sun397"),
    Benchmark("dtd", "DTD", 47, "for research", "tanganke/dtd", templates=["{} texture."]),
    Benchmark("eurosat", "EuroSAT", 10, "MIT", "tanganke/eurosat",
              templates=["a centered satellite photo of {}."]),
    # Papers classify the middle frame of each video; no copy of these frames is known.
    Benchmark("ucf101", "UCF101", 101, "not stated", None, templates=["a photo of a person doing {}."]),
    Benchmark("imagenet_v2", "ImageNet V2", 1000, "MIT", "clip-benchmark/wds_imagenetv2",
              label_column="cls", only_tested=True, by_position=True, class_names_of="imagenet"),
    Benchmark("imagenet_sketch", "ImageNet Sketch", 1000, "not stated", "clip-benchmark/wds_imagenet_sketch",
              label_column="cls", only_tested=True, by_position=True, class_names_of="imagenet"),
    Benchmark("imagenet_a", "ImageNet-A", 200, "MIT", "barkermrl/imagenet-a", only_tested=True),
    Benchmark("imagenet_r", "ImageNet-R", 200, "MIT", "axiong/imagenet-r", label_column="wnid", only_tested=True),
]  # fmt: skip
BENCHMARKS = {entry.name: entry for entry in _ENTRIES}


def find_benchmark(source: str) -> tuple[Benchmark | None, str | None]:
    """The entry for "NAME" or "NAME:FOLDER", with the folder; (None, None) if there is none.

    Upper case and punctuation are ignored, so "OxfordPets" is "oxford_pets".

    Example:
        >>> benchmark, folder = hf_tgpt.data.find_benchmark("OxfordPets:pets")
        >>> benchmark.name, folder
        ('oxford_pets', 'pets')
    """
    name, _, folder = source.partition(":")
    for entry in _ENTRIES:
        if normalized_name(name) in (normalized_name(entry.name), normalized_name(entry.title)):
            return entry, folder or None
    return None, None


def nearest_benchmarks(source: str) -> list[str]:
    """The catalogue's names most similar to this one, at most three."""
    known = {normalized_name(word): entry.name for entry in _ENTRIES for word in (entry.name, entry.title)}
    near = difflib.get_close_matches(normalized_name(source.partition(":")[0]), list(known), n=4, cutoff=0.5)
    return list(dict.fromkeys(known[word] for word in near))[:3]
