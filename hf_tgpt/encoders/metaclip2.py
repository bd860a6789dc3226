"""MetaCLIP 2: Chuang et al., Meta CLIP 2: A Worldwide Scaling Recipe, NeurIPS 2025, arXiv 2507.22062.

CLIP's towers with a multilingual vocabulary, whose end-of-sentence token really is number 2.
"""

from __future__ import annotations

from .base import DualEncoder


class MetaCLIP2(DualEncoder):
    """transformers' MetaClip2Model."""

    model_type = "metaclip_2"
    model_class = "MetaClip2Model"
    vision_class = "MetaClip2VisionModelWithProjection"
