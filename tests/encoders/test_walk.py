"""Prompts in the towers of any family: what the walk computes is what the untouched model does with them in place.

The reference never touches this package: hooks on a transformers model put prompts among its hidden states.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_NAMES, CLIPS, SHAPES, pixels, pooled, token_ids
from peft import get_peft_model
from transformers import AutoTokenizer

from hf_tgpt import MaPLeConfig
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.packing import common_length, pack
from hf_tgpt.encoders.walk import encode_image, encode_text, encode_words, image_tokens, split_tokens, unit
from hf_tgpt.utils.compat import before

N = 2
SENTENCES = ["a photo of a cat.", "a photo of a blue striped square.", "a photo of the forest"]
TEXT_PLACES = {"every layer": (0, 1), "the first": (0,), "an upper layer": (1,)}

pytestmark = pytest.mark.skipif(
    before("transformers", "5"), reason="transformers 4 makes its masks in float32, and its layers give tuples"
)


@pytest.fixture(params=SHAPES)
def model(request, load_clip):
    return load_clip(request.param).double()


@pytest.fixture(params=SHAPES)
def shape(request):
    return request.param


@pytest.fixture(params=CLIPS)
def causal_model(request, load_clip):
    return load_clip(request.param).double()


def prompts_for(tower, layers, width, samples=None):
    """{layer: tokens}, each (n, width), or with `samples` one for each sample."""
    generator = torch.Generator().manual_seed(len(layers) + len(tower))
    shape = (N, width) if samples is None else (samples, N, width)
    return {layer: torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for layer in layers}


def hooked(modules, change):
    """Registers hooks that change the hidden states that go into each of the modules; returns their handles."""

    def hook_of(number):
        def hook(module, args, kwargs):
            return (change(number, args[0]), *args[1:]), kwargs

        return hook

    return [module.register_forward_pre_hook(hook_of(i), with_kwargs=True) for i, module in enumerate(modules)]


@dataclass(frozen=True)
class Parts:
    """Where the reference hooks a family's model, and how it reads what comes out."""

    words: str = "embeddings.token_embedding"  # of the text tower
    text_layers: str = "encoder.layers"
    start: int = 1  # tokens of a sentence before its first word, and of a picture before its patches
    mask: Callable = lambda ends, length: torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    inputs: Callable = lambda ids, ends: {}  # of the text tower, beside ids
    before_layers: str = "pre_layrnorm"  # of the image tower, where its prompts enter
    read_text: Callable = lambda model, hidden, ends: model.text_projection(
        model.text_model.final_layer_norm(hidden[torch.arange(len(hidden)), ends])
    )
    read_image: Callable = lambda model, hidden, patches: model.visual_projection(
        model.vision_model.post_layernorm(hidden[:, 0])
    )


FAMILIES = {
    "chinese_clip": Parts(
        words="embeddings.word_embeddings",
        text_layers="encoder.layer",
        mask=lambda ends, length: (torch.arange(length) <= ends[:, None])[:, None, None].expand(-1, 1, length, -1),
        inputs=lambda ids, ends: {"attention_mask": (torch.arange(ids.shape[1]) <= ends[:, None]).long()},
        read_text=lambda model, hidden, ends: model.text_projection(hidden[:, 0]),
    ),
    "siglip": Parts(
        start=0,
        mask=lambda ends, length: None,
        before_layers="encoder.layers.0",
        read_text=lambda model, hidden, ends: model.text_model.head(model.text_model.final_layer_norm(hidden[:, -1])),
        read_image=lambda model, hidden, patches: model.vision_model.head(
            model.vision_model.post_layernorm(hidden[:, :patches])
        ),
    ),
}


def parts_of(model):
    return FAMILIES.get(model.config.model_type, Parts())


def text_reference(model, ids, ends, prompts, insert):
    """T by the model's own text tower, with hooks that put the prompts in place."""
    tower, parts = model.text_model, parts_of(model)
    start, layers = parts.start, tower.get_submodule(parts.text_layers)

    def embed(module, args, output):
        if 0 in prompts and not insert:  # before positions are added
            own = prompts[0].expand(len(output), -1, -1)
            return torch.cat([output[:, :start], own, output[:, start + N :]], dim=1)
        return output

    state = {"inserted": False}

    def change(layer, hidden):
        if layer not in prompts or (layer == 0 and not insert):
            return hidden
        own = prompts[layer].expand(len(hidden), -1, -1)
        skip = 0 if insert and not state["inserted"] else N
        state["inserted"] = True
        return torch.cat([hidden[:, :start], own, hidden[:, start + skip :]], dim=1)

    handles = [tower.get_submodule(parts.words).register_forward_hook(embed), *hooked(layers, change)]
    states = []
    handles.append(layers[-1].register_forward_hook(lambda module, args, output: states.append(output)))
    if insert:  # the tower makes its mask for the length of the ids, so the longer rows need one of their own
        mask = parts.mask(ends + N, ids.shape[1] + N)
        first = min(prompts)

        def masked(number):
            def hook(module, args, kwargs):
                return (args[0], mask, *args[2:]) if number >= first else args, kwargs

            return hook

        handles += [layer.register_forward_pre_hook(masked(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        tower(input_ids=ids, **parts.inputs(ids, ends))
    finally:
        for handle in handles:
            handle.remove()
    return parts.read_text(model, states[-1], ends + (N if insert else 0))


def image_reference(model, pictures, prompts, behind_class_token=False):
    """V by the model's own image tower, with hooks that put the prompts in place, and its last hidden states."""
    state, parts = {"inserted": False}, parts_of(model)
    start, patches = parts.start, (model.config.vision_config.image_size // model.config.vision_config.patch_size) ** 2

    def change(layer, hidden):
        if layer in prompts:
            own = prompts[layer].expand(len(hidden), -1, -1)
            count = N if state["inserted"] else 0
            state["inserted"] = True
            if behind_class_token:
                return torch.cat([hidden[:, :start], own, hidden[:, start + count :]], dim=1)
            return torch.cat([hidden[:, : hidden.shape[1] - count], own], dim=1)
        return hidden

    tower = model.vision_model
    handles = hooked([tower.get_submodule(parts.before_layers), *tower.encoder.layers[1:]], change)
    states = []
    last = tower.encoder.layers[-1]
    handles.append(last.register_forward_hook(lambda module, args, output: states.append(output)))
    try:
        tower(pixel_values=pictures)
    finally:
        for handle in handles:
            handle.remove()
    last_states = states[-1]
    if behind_class_token:  # the picture's own tokens first, as they are where prompts stand at the end
        last_states = torch.cat([states[-1][:, :start], states[-1][:, start + N :]], dim=1)
    return parts.read_image(model, last_states, patches), states[-1]


def ends_of(model, ids):
    return encoder_of(model).ends(ids, AutoTokenizer.from_pretrained(model.name_or_path).eos_token_id)


def gradients(output, prompts):
    return torch.autograd.grad(output.square().sum(), list(prompts.values()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("insert", [False, True])
@pytest.mark.parametrize("layers", TEXT_PLACES.values(), ids=list(TEXT_PLACES))
def test_text_prompts_replaced_or_inserted_at_chosen_layers(model, layers, insert, packed):
    encoder, ids = encoder_of(model), token_ids(model, SENTENCES)
    if packed and not encoder.causal:
        pytest.skip("such sentences are not packed")
    ends, prompts = ends_of(model, ids), prompts_for("text", layers, encoder.shape()["text_width"])
    expected = text_reference(model, ids, ends, prompts, insert)
    # Prompts that replace words make the sentences alike up to the words behind them.
    packing = (
        pack(ends, min(common_length(ids, ends), 1 + N), encoder.shape()["context_length"] - N) if packed else None
    )
    found = encode_text(encoder, encoder.words()[ids], ends, prompts, packing, insert)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for mine, theirs in zip(gradients(found, prompts), gradients(expected, prompts), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)


def test_sentences_that_begin_alike_for_less_than_the_prompts_are_not_packed(causal_model):
    model = causal_model
    encoder, ids = encoder_of(model), token_ids(model, ["cat.", "forest at night.", "a blue striped square"])
    ends, prompts = encoder.ends(ids), prompts_for("text", (1,), encoder.shape()["text_width"])
    packing = pack(ends, common_length(ids, ends), encoder.shape()["context_length"])  # BOS alone
    found = encode_text(encoder, encoder.words()[ids], ends, prompts, packing)
    torch.testing.assert_close(found, text_reference(model, ids, ends, prompts, False), atol=1e-10, rtol=1e-10)


def test_prompts_without_a_place_are_refused(load_clip):
    model = load_clip()
    encoder, ids = encoder_of(model), token_ids(model, SENTENCES)
    words, ends, few, many = encoder.words()[ids], encoder.ends(ids), torch.zeros(2, 32), torch.zeros(40, 32)
    with pytest.raises(ValueError, match="`prompts` are for layer 2 of a tower with layers 0 to 1; choose one"):
        encode_text(encoder, words, ends, {2: few})
    with pytest.raises(ValueError, match="`prompts` are 40 in place of"):
        encode_text(encoder, words, ends, {1: many})
    for encode in (
        lambda: encode_text(encoder, words, ends, {0: few, 1: few[:1]}, insert=True),
        lambda: encode_image(encoder, pixels(model), {0: torch.zeros(2, 48), 1: torch.zeros(1, 48)}),
    ):
        with pytest.raises(ValueError, match=r"`prompts` by layer are \{0: 2, 1: 1\}; .* must be as many"):
            encode()
    with pytest.raises(ValueError, match="layer 7 of a tower with layers 0 to 2"):
        encode_image(encoder, pixels(model), {7: torch.zeros(2, 48)})


@pytest.mark.parametrize("layers", TEXT_PLACES.values(), ids=list(TEXT_PLACES))
def test_each_sentence_may_have_text_prompts_of_its_own(model, layers):
    encoder, ids = encoder_of(model), token_ids(model, SENTENCES)
    ends, prompts = ends_of(model, ids), prompts_for("text", layers, encoder.shape()["text_width"], len(SENTENCES))
    packing = pack(ends, 1, encoder.shape()["context_length"]) if encoder.causal else None
    found = encode_text(encoder, encoder.words()[ids], ends, prompts, packing)
    torch.testing.assert_close(found, text_reference(model, ids, ends, prompts, False), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("behind_class_token", [False, True])
@pytest.mark.parametrize("layers", [(0, 1), (0,), (1,)])
def test_vision_prompts_at_the_end_or_behind_the_class_token_at_chosen_layers(model, layers, behind_class_token):
    encoder, pictures = encoder_of(model), pixels(model).double()
    prompts = prompts_for("vision", layers, encoder.shape()["vision_width"])
    expected, last = image_reference(model, pictures, prompts, behind_class_token)
    found = encode_image(encoder, pictures, prompts, behind_class_token)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)
    for mine, theirs in zip(gradients(found, prompts), gradients(expected, prompts), strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-9, rtol=1e-9)
    tokens = image_tokens(encoder, pictures, prompts, behind_class_token)
    torch.testing.assert_close(tokens, last, atol=1e-10, rtol=1e-10)
    picture, inserted = split_tokens(tokens, prompts, behind_class_token, encoder.class_tokens)
    assert inserted.shape[1] == N
    assert picture.shape[1] == encoder.class_tokens + encoder.patch_rows() ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_an_adapted_models_logits_and_gradients_are_those_of_hooks_on_a_plain_one(shape, dtype, load_clip):
    plain = load_clip(shape).to(dtype)
    torch.manual_seed(0)
    config = MaPLeConfig(class_names=CLASS_NAMES, prompt_length=N, prompt_depth=2)
    model = get_peft_model(load_clip(shape), config).to(dtype).eval()
    learner, pictures = model.learner, pixels(plain).to(dtype)
    ids = token_ids(plain, [f"a photo of a {name}." for name in CLASS_NAMES])
    texts = text_reference(plain, ids, ends_of(plain, ids), dict(enumerate(learner.text_prompts)), insert=False)
    coupled = [couple(prompt) for couple, prompt in zip(learner.couplings, learner.text_prompts, strict=True)]
    images, _ = image_reference(plain, pictures, dict(enumerate(coupled)))
    cosines = F.normalize(images, dim=-1) @ F.normalize(texts, dim=-1).T
    expected = plain.logit_scale.exp() * cosines + getattr(plain, "logit_bias", 0)
    found, weights = model(pictures).logits, list(learner.parameters())
    close = dict(atol=1e-5, rtol=1e-5) if dtype is torch.float32 else dict(atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(found, expected, **close)
    theirs = torch.autograd.grad(expected.square().sum(), weights)
    most = max(float(gradient.abs().max()) for gradient in theirs)
    for mine, gradient in zip(torch.autograd.grad(found.square().sum(), weights), theirs, strict=True):
        torch.testing.assert_close(mine / most, gradient / most, **close)


def test_without_prompts_features_are_the_models_own_bit_for_bit(load_clip):
    for shape in SHAPES:
        model = load_clip(shape)
        encoder, ids = encoder_of(model), token_ids(model, SENTENCES)
        assert torch.equal(encode_image(encoder, pixels(model)), pooled(model.get_image_features(pixels(model))))
        ends = ends_of(model, ids)
        inputs = parts_of(model).inputs(ids, ends)
        own = pooled(model.get_text_features(ids, **inputs))
        embeddings = torch.nn.functional.embedding(ids, encoder.words())
        assert torch.equal(encode_text(encoder, embeddings, ends), own)
        torch.testing.assert_close(encode_words(encoder, ids, ends), own, atol=1e-5, rtol=1e-5)  # packed
        cosines = unit(encode_image(encoder, pixels(model))) @ unit(encode_text(encoder, embeddings, ends)).T
        logits = model(input_ids=ids, pixel_values=pixels(model), **inputs).logits_per_image
        torch.testing.assert_close(encoder.scale(cosines), logits, atol=1e-6, rtol=1e-6)


def test_an_image_attention_is_the_towers_own(model):
    encoder, layer, weights, states = encoder_of(model), 1, [], []
    model.set_attn_implementation("eager")
    attention = model.vision_model.encoder.layers[layer].self_attn
    handle = attention.register_forward_hook(lambda module, args, output: weights.append(output[1]))
    encoder.on_image_layer = lambda i, hidden: states.append(hidden) if i == layer else None
    with torch.no_grad():
        encode_image(encoder, pixels(model).double())
    handle.remove()
    torch.testing.assert_close(encoder.image_attention(layer, states[0]), weights[0].float(), atol=1e-5, rtol=1e-5)


def test_a_model_of_another_kind_is_refused_with_the_families_that_are_known(load_clip):
    with pytest.raises(
        ValueError, match=r"a CLIPVisionTransformer|a CLIPVisionModel.*one of CLIPModel, MetaClip2Model"
    ):
        encoder_of(load_clip().vision_model)
    with pytest.raises(ValueError, match=r"The base model is a Linear; .*one of CLIPModel, MetaClip2Model"):
        encoder_of(torch.nn.Linear(1, 1))
