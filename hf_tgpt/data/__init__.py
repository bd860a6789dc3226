"""Images and labels: where they come from, which are chosen, and how they become pixel values."""

from .fewshot import choose_classes as choose_classes
from .fewshot import sample_few_shot as sample_few_shot
from .fewshot import split_base_new as split_base_new
from .sources import class_names as class_names
from .sources import load_splits as load_splits
from .toyworld import load_toyworld as load_toyworld
from .transforms import Collator as Collator
from .transforms import FewShotImages as FewShotImages
from .transforms import ImageTransform as ImageTransform
from .transforms import decode_image as decode_image
