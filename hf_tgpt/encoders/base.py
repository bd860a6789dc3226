"""What prompt learning needs of a transformers dual encoder. Only this folder reads a model's attributes.

`DualEncoder` implements CLIP; a family of encoders is a subclass, in its own file, that overrides what differs.

Letters: b images, s sentences, t text tokens, p vision tokens (class token and patches), v words of the vocabulary,
d_t text width, d_v vision width, d joint (projection) width.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
import transformers
from torch import nn

from ..utils.compat import causal_mask, encoder_layer

Layer = Callable[[torch.Tensor, torch.Tensor | None], torch.Tensor]  # hidden states and a mask -> hidden states


class DualEncoder:
    """Two towers and how tokens go through them, as in CLIP.

    An object is a view of `model` without its own state: `encoder_of(model)` makes one whenever it is needed.
    """

    # transformers' names: `config.model_type`, the model's class, the vision tower's class, the entry of the vision
    # tower's output with the image features, and the image processor's class.
    model_type: ClassVar[str]
    model_class: ClassVar[str]
    vision_class: ClassVar[str]
    vision_output: ClassVar[str] = "image_embeds"
    image_processor: ClassVar[str] = "CLIPImageProcessor"
    # The tokenizer's outputs beside `input_ids` and `attention_mask` that carry no information for one sentence.
    tokenizer_extras: ClassVar[frozenset[str]] = frozenset()
    # The linear layers that make queries, keys and values, in both towers.
    attention_inputs: ClassVar[tuple[str, ...]] = ("q_proj", "k_proj", "v_proj")
    # Whether prompts can enter its layers; otherwise only its features are used.
    takes_prompts: ClassVar[bool] = True
    # Whether it is trained to give each pair of picture and text its own probability, the sigmoid of its logit.
    sigmoid: ClassVar[bool] = False
    # Tokens before the first word of a sentence (BOS).
    prefix: ClassVar[int] = 1
    # Whether a token attends only to itself and the tokens before it, so that sentences may be cut and packed.
    causal: ClassVar[bool] = True
    # Whether padding is read like words, so that every sentence must be as long as the context.
    fills_context: ClassVar[bool] = False
    # Image tokens before the patches (CLS).
    class_tokens: ClassVar[int] = 1

    def __init__(self, model: transformers.PreTrainedModel):
        self.model = model
        # Called before each layer of the image tower with its number and its input, the hidden states.
        self.on_image_layer: Callable[[int, torch.Tensor], None] | None = None

    # The model as a whole ---------------------------------------------------------------------------------------------

    def shape(self) -> dict[str, int]:
        """The sizes that an adapter depends on: it fits another model if and only if all of these agree."""
        text, vision = self.model.config.text_config, self.model.config.vision_config
        return {
            "text_width": text.hidden_size,
            "text_layers": text.num_hidden_layers,
            "context_length": text.max_position_embeddings,
            "vocabulary": text.vocab_size,
            "vision_width": vision.hidden_size,
            "vision_layers": vision.num_hidden_layers,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "projection_width": self.projection_width(),
        }

    def projection_width(self) -> int:
        """d, the width of the joint space."""
        return self.model.config.projection_dim

    @property
    def dtype(self) -> torch.dtype:
        """The type that the towers compute in. (The model's own `dtype` may be that of its logits' scale.)"""
        return next(weight.dtype for weight in self.model.parameters() if weight.numel() > 1)

    def logit_scale(self) -> torch.Tensor:
        """s, the factor that turns cosines into logits; a scalar."""
        return self.model.logit_scale.exp()

    def scale(self, cosines: torch.Tensor) -> torch.Tensor:
        """Logits from cosines (b, s), as the model itself computes them."""
        return self.logit_scale() * cosines

    def projections(self) -> tuple[Any, Any]:
        """The last layers of both towers, whose weights distinguish one trained model from another."""
        return self.model.text_projection, self.model.visual_projection

    def use_eager_attention(self) -> None:
        """Switches the model's attention to plain operations, which every exporter supports."""
        self.model.set_attn_implementation("eager")

    def output(
        self,
        logits: torch.Tensor,
        image_embeds: torch.Tensor,
        text_embeds: torch.Tensor,
        return_loss: bool,
        **parts: Any,
    ) -> transformers.utils.ModelOutput:
        """The output of the model's own call, from logits (b, s) and unit features."""
        loss = self.contrastive_loss(logits) if return_loss else None
        return self.output_class()(
            loss=loss,
            logits_per_image=logits,
            logits_per_text=logits.T,
            text_embeds=text_embeds,
            image_embeds=image_embeds,
            **parts,
        )

    def contrastive_loss(self, logits: torch.Tensor) -> torch.Tensor:
        """The model's own training loss, from logits (b, b) of pictures and their texts."""
        pairs = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits.T, pairs) + F.cross_entropy(logits, pairs)) / 2

    def output_class(self) -> type[transformers.utils.ModelOutput]:
        """The class of the model's output, which transformers defines beside the model's class."""
        plain = getattr(transformers, self.model_class)
        return getattr(sys.modules[plain.__module__], f"{self.model_class.removesuffix('Model')}Output")

    # Text -------------------------------------------------------------------------------------------------------------

    def words(self) -> torch.Tensor:
        """The vocabulary E, (v, d_t)."""
        return self.model.text_model.embeddings.token_embedding.weight

    def ends(self, input_ids: torch.Tensor, end_token: int | None = None) -> torch.Tensor:
        """Where each sentence ends, its first EOS: input_ids (s, t) -> (s,).

        `end_token` is the tokenizer's EOS, for a family whose models do not define theirs.
        """
        return (input_ids == self.model.config.text_config.eos_token_id).int().argmax(dim=-1)

    def last_words(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last token of each sentence that is not padding: input_ids (s, t) -> (s,)."""
        places = torch.arange(input_ids.shape[1], device=input_ids.device)
        return (places * (input_ids != self.model.config.text_config.pad_token_id)).amax(dim=-1)

    def reading_places(self, ends: torch.Tensor, length: int) -> torch.Tensor:
        """The positions (s,) at which sentences of `length` tokens with ends (s,) are read: their ends."""
        return ends

    def text_parameters(self) -> Iterator[nn.Parameter]:
        """All that text features rest on."""
        yield from self.model.text_model.parameters()
        yield from self.model.text_projection.parameters()

    def text_settings(self) -> dict[str, Any]:
        """The settings, beside the weights, that text features depend on."""
        return self.model.config.text_config.to_diff_dict()

    def text_is_random(self) -> bool:
        """Whether the text tower's output varies in training, as with dropout."""
        return self.model.config.text_config.attention_dropout > 0

    def text_takes_masks(self) -> bool:
        """Whether its attention takes arbitrary masks, as packed sentences need; flash attention does not."""
        return self.model.text_model.config._attn_implementation in ("sdpa", "eager")

    def text_mask(self, hidden: torch.Tensor, ends: torch.Tensor) -> torch.Tensor | None:
        """The attention mask for hidden states (s, t, d_t) of sentences that end at `ends` (s,)."""
        return causal_mask(self.model.text_model.config, hidden)

    def packed_mask(self, sees: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Which places attend to which, (r, 1, l, l), as the mask that the tower's attention takes."""
        if self.model.text_model.config._attn_implementation != "eager":
            return sees
        return torch.zeros_like(sees, dtype=hidden.dtype).masked_fill(~sees, torch.finfo(hidden.dtype).min)

    def enter_text(self, embeddings: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
        """Token embeddings (s, t, d_t) -> hidden states with positions (s, t, d_t)."""
        return self.model.text_model.embeddings(inputs_embeds=embeddings, position_ids=positions)

    def text_layers(self) -> list[Layer]:
        """The text tower's layers, each from hidden states (s, t, d_t) and a mask to hidden states."""
        return [encoder_layer(layer, causal=self.causal) for layer in self.model.text_model.encoder.layers]

    def text_features(self, input_ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        """The text features of a model that takes no prompts: ids (s, t), ends (s,) -> (s, d), not normalised."""
        raise NotImplementedError

    def leave_text(self, hidden: torch.Tensor) -> torch.Tensor:
        """Hidden states where the sentences are read (s, d_t) -> text features (s, d), not normalised."""
        return self.model.text_projection(self.model.text_model.final_layer_norm(hidden))

    # Images -----------------------------------------------------------------------------------------------------------

    def vision_parameters(self) -> Iterator[nn.Parameter]:
        """All that image features rest on."""
        yield from self.model.vision_model.parameters()
        yield from self.model.visual_projection.parameters()

    def image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The image features of a model that takes no prompts: (b, 3, h, w) -> (b, d), not normalised."""
        raise NotImplementedError

    def patch_rows(self) -> int:
        """The number of rows, and of columns, of patches in a picture of the model's size."""
        shape = self.shape()
        return shape["image_size"] // shape["patch_size"]

    def vision_settings(self) -> dict[str, Any]:
        """The settings, beside the weights, that image features depend on."""
        return self.model.config.vision_config.to_diff_dict()

    def enter_image(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> torch.Tensor:
        """Pictures (b, 3, h, w) -> tokens with positions (b, p, d_v), before `after_prompts`.

        Raises ValueError if the picture's size is not the model's.
        """
        vision = self.model.vision_model
        size = vision.config.image_size
        if not interpolate_pos_encoding and tuple(pixel_values.shape[-2:]) != (size, size):
            height, width = pixel_values.shape[-2:]
            raise ValueError(
                f"`pixel_values` has pictures of {height}x{width} pixels but this model takes {size}x{size}; resize "
                "them with the model's own image processor or pass interpolate_pos_encoding=True."
            )
        return vision.embeddings(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding)

    def after_prompts(self, hidden: torch.Tensor) -> torch.Tensor:
        """What happens between the entry of prompts and the first layer: (b, p + n, d_v) -> the same shape."""
        return self.model.vision_model.pre_layrnorm(hidden)

    def image_layers(self) -> list[Layer]:
        """The image tower's layers, each from hidden states (b, p + n, d_v) to hidden states."""
        return [encoder_layer(layer, causal=False) for layer in self.model.vision_model.encoder.layers]

    def normalize_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The norm of image tokens before the projection: (..., d_v) -> (..., d_v)."""
        return self.model.vision_model.post_layernorm(tokens)

    def project_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """Image tokens in the joint space: (..., d_v) -> (..., d)."""
        return self.model.visual_projection(tokens)

    def leave_image(self, tokens: torch.Tensor) -> torch.Tensor:
        """The last layer's tokens without prompts (b, p, d_v) -> image features (b, d), not normalised."""
        return self.project_tokens(self.normalize_tokens(tokens[:, 0]))

    def vision_tower(self, class_names: Sequence[str]) -> transformers.PreTrainedModel:
        """A copy of only the image tower, with its projection: a plain transformers model with these labels."""
        config = self.labelled(class_names)
        config.projection_dim = self.projection_width()
        tower = getattr(transformers, self.vision_class)(config).to(self.dtype)
        tower.vision_model.load_state_dict(self.model.vision_model.state_dict())
        tower.visual_projection.load_state_dict(self.model.visual_projection.state_dict())
        return tower

    def labelled(self, class_names: Sequence[str]) -> Any:
        """The image tower's config with these labels."""
        config = copy.deepcopy(self.model.config.vision_config)
        config.id2label = dict(enumerate(class_names))
        config.label2id = {name: label for label, name in enumerate(class_names)}
        return config

    def image_attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The attention of tokens in a layer with input (b, p, d_v): (b, heads, p, p), rows that sum to 1."""
        block = self.model.vision_model.encoder.layers[layer]
        attention, hidden = block.self_attn, block.layer_norm1(hidden)
        heads = (*hidden.shape[:-1], -1, attention.head_dim)
        queries = attention.q_proj(hidden).view(heads).transpose(1, 2)  # (b, heads, p, d_v / heads)
        keys = attention.k_proj(hidden).view(heads).transpose(1, 2)
        return (attention.scale * queries @ keys.transpose(-1, -2)).softmax(-1, dtype=torch.float32)

    def feature_attention(self, layer: int, hidden: torch.Tensor) -> torch.Tensor:
        """The attention of the token that becomes the image feature, as in `image_attention`: (b, heads, p)."""
        return self.image_attention(layer, hidden)[:, :, 0]
