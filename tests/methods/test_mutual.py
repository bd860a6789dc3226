"""What mutual prompt learning's reconstruction means, pinned by special cases and by an independent forward."""

import pytest
import torch
import torch.nn.functional as F
from conftest import CLASS_NAMES, pixels, shake, token_ids
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from releases import TOLERANCE, Case

from hf_tgpt import CoCoOpConfig, CoOpConfig, MutualPromptConfig
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import encode_image, encode_text, unit
from hf_tgpt.methods.mutual import MutualPrompt

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture
def make(load_clip):
    """make(...) -> a shaken MutualPrompt model on a tiny CLIP."""

    def make(seed=1, config_class=MutualPromptConfig, shape="plain", **fields):
        torch.manual_seed(seed)
        model = get_peft_model(load_clip(shape), config_class(class_names=CLASS_NAMES, **fields)).eval()
        shake(model)
        return model

    return make


def adapter(model):
    prefix = "base_model.model.prompts.learners."
    return {name.removeprefix(prefix): value for name, value in get_peft_model_state_dict(model).items()}


def give(model, tensors):
    """Sets the named adapter tensors."""
    prefix = "base_model.model.prompts.learners."
    full = adapter(model) | tensors
    set_peft_model_state_dict(model, {prefix + name: value for name, value in full.items()})


def test_equal_heads_are_cocoop_exactly():
    case = Case("cocoop_ctx4")
    reference = case.model()
    learned = adapter(reference)
    config = MutualPromptConfig(class_names=case.metadata["class_names"], vision_prompt_length=0)
    model = get_peft_model(reference.unload(), config)
    give(
        model,
        {
            "text_prompts": learned["text_prompts"],
            "decompose.0.weight": learned["shift.0.weight"],
            "decompose.0.bias": learned["shift.0.bias"],
            "decompose.2.weight": learned["shift.2.weight"].repeat(4, 1),
            "decompose.2.bias": learned["shift.2.bias"].repeat(4),
        },
    )
    output = model(**case.inputs())
    torch.testing.assert_close(output.logits, case["logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, case["loss"], **TOLERANCE)


def test_a_shared_head_is_cocoop(make):
    model = make(text_heads="shared", vision_prompt_length=0)
    reference = make(config_class=CoCoOpConfig)
    learned = adapter(model)
    give(reference, {name.replace("decompose", "shift"): value for name, value in learned.items()})
    torch.testing.assert_close(model(pixels(model)).logits, reference(pixels(model)).logits)


def test_no_visual_prompts_and_no_heads_are_coop(make):
    zero_heads = make(vision_prompt_length=0)
    last = {n: torch.zeros_like(v) for n, v in adapter(zero_heads).items() if n.startswith("decompose.2")}
    give(zero_heads, last)
    no_heads = make(vision_prompt_length=0, text_heads="none")
    coop = make(config_class=CoOpConfig, prompt_length=4, initial_text="a photo of a")
    prompts = adapter(zero_heads)["text_prompts"]
    for model in (no_heads, coop):
        name = next(iter(adapter(model)))
        give(model, {name: prompts})
        torch.testing.assert_close(zero_heads(pixels(model)).logits, model(pixels(model)).logits)


def test_one_relevant_class_alone_describes_the_image(make):
    model = make(top_k=1, temperature=1.0)
    learner: MutualPrompt = model.learner
    images, texts = unit(torch.randn(3, 8)), unit(torch.randn(3, 5, 8).abs())
    images = images.abs()
    weights = learner.relevance(images, texts)
    best = torch.einsum("bd,bsd->bs", images, texts).argmax(-1)
    assert torch.equal(weights, F.one_hot(best, 5).float())


def test_classes_of_negative_relevance_have_no_influence(make):
    learner: MutualPrompt = make(top_k=4, temperature=1.0).learner
    image = unit(torch.randn(1, 8))
    texts = torch.stack([image[0], 0.5 * image[0], -image[0], -0.1 * image[0]])[None]
    weights = learner.relevance(image, texts)
    assert torch.equal(weights[0, 2:], torch.zeros(2))
    torch.testing.assert_close(weights[0, :2], torch.softmax(torch.tensor([1.0, 0.5]), 0))
    worst = learner.relevance(image, -texts.abs() * image.sign())
    assert torch.equal(worst, torch.zeros(1, 4))  # nothing is relevant: no description, and no NaN


def test_without_relevance_weighting_all_classes_take_part_alike(make):
    learner: MutualPrompt = make(relevance_weighting=False).learner
    weights = learner.relevance(unit(torch.randn(2, 8)), unit(torch.randn(2, 5, 8)))
    assert torch.equal(weights, torch.full((2, 5), 0.2))


@pytest.mark.parametrize("fields", [{}, {"conditioned_texts": False}, {"vision_prompt_depth": 3}])
def test_permuting_the_classes_permutes_the_logits(make, fields):
    model = make(**fields)
    logits = model(pixels(model)).logits
    order = [2, 0, 3, 1]
    model.set_class_names([CLASS_NAMES[i] for i in order])
    torch.testing.assert_close(model(pixels(model)).logits, logits[:, order], atol=1e-5, rtol=1e-5)


def test_clips_own_call_gives_the_same_logits(make):
    model = make()
    ids = token_ids(model, [f"a photo of a {name}." for name in CLASS_NAMES])
    output = model(input_ids=ids, pixel_values=pixels(model))
    assert output.text_embeds.shape == (3, 4, 32)
    torch.testing.assert_close(output.logits_per_image, model(pixels(model)).logits)
    with pytest.raises(ValueError, match="no text features without an image"):
        model.get_text_features(ids)


def plain_forward(model, pixel_values, labels):
    """The equations of the module's docstring, image by image and class by class."""
    clip, learner, config = model.get_base_model(), model.learner, model.learner.config
    encoder, logits = encoder_of(clip), []
    for picture in pixel_values:
        x0 = unit(encode_image(encoder, picture[None]))[0]
        z = torch.relu(learner.decompose[0](x0))
        texts = []
        for ids, end in zip(learner.class_texts.ids, learner.class_texts.ends, strict=True):
            words = clip.text_model.embeddings.token_embedding(ids)
            width = words.shape[-1]
            tokens = []
            for m in range(config.prompt_length):
                head = learner.decompose[2].weight[m * width : (m + 1) * width]
                bias = learner.decompose[2].bias[m * width : (m + 1) * width]
                tokens.append(learner.text_prompts[m] + head @ z + bias)
            sentence = torch.stack([words[0], *tokens, *words[1 + config.prompt_length :]])
            texts.append(unit(encode_text(encoder, sentence[None], end[None]))[0])
        cosines = torch.stack([x0 @ text for text in texts])
        best = [int(k) for k in cosines.argsort(descending=True)[: config.top_k] if cosines[k] > 0]
        weights = torch.softmax(torch.stack([cosines[k] for k in best]) / config.temperature, 0)
        description = sum(weight * texts[k] for weight, k in zip(weights, best, strict=True))
        shift = learner.guide(description).reshape(learner.vision_prompts.shape)
        prompts = {j: learner.vision_prompts[j] + shift[j] for j in range(config.vision_prompt_depth)}
        f = unit(encode_image(encoder, picture[None], prompts))[0]
        logits.append(torch.stack([clip.logit_scale.exp() * f @ text for text in texts]))
    logits = torch.stack(logits)
    return logits, F.cross_entropy(logits, labels)


@pytest.mark.parametrize("chunk", [256, 5])
@pytest.mark.parametrize("fields", [{"top_k": 3}, {"top_k": 2, "vision_prompt_depth": 2, "temperature": 0.1}])
def test_the_forward_is_its_equations_in_logits_and_gradients(make, fields, chunk):
    model = make(text_chunk_size=chunk, **fields).double().train()
    trained = [p for p in model.parameters() if p.requires_grad]
    pictures = pixels(model).double()
    logits, loss = plain_forward(model, pictures, LABELS)
    expected = torch.autograd.grad(loss, trained)
    output = model(pictures, LABELS)
    torch.testing.assert_close(output.logits, logits, atol=1e-10, rtol=1e-10)
    for ours, theirs in zip(torch.autograd.grad(output.loss, trained), expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-10, rtol=1e-8)


def test_a_shortlist_of_all_classes_is_exact_and_a_short_one_keeps_the_nearest(make):
    exact = make()
    same = make(shortlist=4)
    assert torch.equal(same(pixels(exact)).logits, exact(pixels(exact)).logits)
    short = make(shortlist=2, vision_prompt_length=0)
    exact = make(vision_prompt_length=0)
    agree = short(pixels(exact)).logits == exact(pixels(exact)).logits
    close = torch.isclose(short(pixels(exact)).logits, exact(pixels(exact)).logits, atol=1e-5)
    assert (close.sum(1) == 2).all(), agree
    short.train()(pixels(short), LABELS).loss.backward()
    assert all(p.grad is not None for p in short.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(text_heads="many"), "`text_heads`='many': choose one of per_token, shared, none"),
        (dict(top_k=0), "`top_k`=0: choose 1 or more"),
        (dict(temperature=0.0), "`temperature`=0.0: choose a number above 0"),
        (dict(vision_prompt_length=-1), "`vision_prompt_length`=-1: choose 0 or more"),
        (dict(shortlist=0), "`shortlist`=0"),
    ],
)
def test_fields_have_ranges(fields, message):
    with pytest.raises(ValueError, match=message):
        MutualPromptConfig(class_names=CLASS_NAMES, **fields)


def test_visual_prompts_deeper_than_the_tower_are_refused(make):
    with pytest.raises(ValueError, match="`vision_prompt_depth`=4: the vision tower has 3 layers; choose 1 to 3"):
        make(vision_prompt_depth=4)
