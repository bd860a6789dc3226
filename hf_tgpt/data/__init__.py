"""Images and labels: where they come from, which are chosen, and how they become pixel values."""

from .benchmarks import BENCHMARKS as BENCHMARKS
from .benchmarks import Benchmark as Benchmark
from .benchmarks import find_benchmark as find_benchmark
from .damage import without_damaged as without_damaged
from .duplicates import count_duplicates as count_duplicates
from .fewshot import choose_classes as choose_classes
from .fewshot import sample_few_shot as sample_few_shot
from .fewshot import split_base_new as split_base_new
from .images import Collator as Collator
from .images import FewShotImages as FewShotImages
from .images import ImageTransform as ImageTransform
from .images import decode_image as decode_image
from .readers.captions import attach_captions as attach_captions
from .readers.captions import read_class_descriptions as read_class_descriptions
from .readers.coop import load_coop_split as load_coop_split
from .readers.coop import select_draw as select_draw
from .remarks import DataWarning as DataWarning
from .sources import class_names as class_names
from .sources import load_splits as load_splits
from .toyworld.world import load_toyworld as load_toyworld
