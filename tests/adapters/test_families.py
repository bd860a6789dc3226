"""Every method on every family of encoders; what is particular to one family."""

import copy
import json
import pickle

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from conftest import CLASS_NAMES, HEADS, METHODS, make_classifier, pixels, pooled, shake, siglip_tokenizer, token_ids
from peft import AutoPeftModel, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

import hf_tgpt
from hf_tgpt import config_class
from hf_tgpt.data import Collator, ImageTransform
from hf_tgpt.encoders import FAMILIES, encoder_of
from hf_tgpt.encoders.loading import load_image_processor
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.inference.explain import image_attention
from hf_tgpt.inference.onnx import export_onnx
from hf_tgpt.inference.plain_transformers import export_transformers
from hf_tgpt.texts.sentences import class_sentences, tokenize, word_ids

# A tiny model of each family beside CLIP, whose own matrix is test_promises.py.
SHAPE_OF = {"metaclip_2": "metaclip_2", "siglip": "siglip", "chinese_clip": "chinese_clip"}
PICTURE = Image.effect_noise((40, 40), 80).convert("RGB")


@pytest.fixture(params=SHAPE_OF)
def family(request):
    return request.param


# Of heads on frozen features one of each kind; test_support.py has all of them on every family.
MODELS = [name for name in METHODS if name not in HEADS or name in ("gda", "tip_adapter", "clip_adapter")]


@pytest.fixture(params=[*MODELS, "zero_shot", "lora"])
def model(request, family, adapt, load_clip):
    """Each method on the family's tiny model, in evaluation mode, with weights that are not the start's."""
    if request.param in METHODS:
        return adapt(METHODS[request.param], SHAPE_OF[family])
    torch.manual_seed(0)
    made = make_classifier(request.param, load_clip(SHAPE_OF[family]), CLASS_NAMES).eval()
    shake(made)
    return made


def classifier_of(model, folder):
    processor = load_image_processor(folder)
    return Classifier(model, ImageTransform.from_processor(processor, train=False))


def test_every_family_has_a_tiny_model_here():
    assert {"clip", *SHAPE_OF} == set(FAMILIES)


def test_a_saved_adapter_comes_back(model, family, load_clip, tmp_path):
    model.save_pretrained(tmp_path)
    torch.manual_seed(9)
    again = hf_tgpt.load_trained(load_clip(SHAPE_OF[family]), tmp_path)
    assert torch.equal(again(pixels(model.get_base_model())).logits, model(pixels(model.get_base_model())).logits)
    if (tmp_path / "adapter_config.json").is_file() and isinstance(model.learner.config.method, str):
        mapping = json.loads((tmp_path / "adapter_config.json").read_text())["auto_mapping"]
        if mapping:
            assert mapping["base_model_class"] == FAMILIES[family].model_class
            found = AutoPeftModel.from_pretrained(tmp_path)
            assert isinstance(found.get_base_model(), getattr(transformers, FAMILIES[family].model_class))


def test_the_base_model_is_itself_without_the_adapter(family, method, adapt, load_clip):
    model = adapt(method, SHAPE_OF[family])
    # As an adapter leaves it: torch multiplies in another order where a factor is to get gradients.
    plain = load_clip(SHAPE_OF[family]).requires_grad_(False)
    ids = token_ids(plain, ["a photo of a cat.", "a forest"])
    expected = plain(input_ids=ids, pixel_values=pixels(plain))
    with model.disable_adapter():
        found = model(input_ids=ids, pixel_values=pixels(plain))
    assert torch.equal(found.logits_per_image, expected.logits_per_image)
    assert type(found) is type(expected)
    assert type(model.unload()) is type(plain)


def test_an_open_method_answers_the_models_own_call_with_its_own_output(family, method, adapt):
    model = adapt(method, SHAPE_OF[family])
    ids = token_ids(model, [f"a photo of a {name}." for name in CLASS_NAMES])
    if not method.open:
        with pytest.raises(ValueError, match="baked into"):
            model(input_ids=ids, pixel_values=pixels(model))
        return
    pictures = pixels(model, len(CLASS_NAMES))
    found = model(input_ids=ids, pixel_values=pictures, return_loss=True)
    assert type(found) is encoder_of(model.get_base_model()).output_class()
    if not method.fused:
        torch.testing.assert_close(found.logits_per_image, model(pictures).logits, atol=1e-4, rtol=1e-4)


def test_models_can_be_copied_and_pickled(family, method, adapt):
    model = adapt(method, SHAPE_OF[family])
    expected = model(pixels(model)).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(pixels(model)).logits, expected)
        assert type(twin.get_base_model()) is type(model.get_base_model())


def test_prediction_and_explanation(model, family, clip_folders):
    base = model.get_base_model()
    classifier = classifier_of(model, clip_folders[SHAPE_OF[family]])
    answer = classifier(PICTURE, None)
    assert {guess["label"] for guess in answer} == set(CLASS_NAMES)
    assert image_attention(classifier, PICTURE).shape[0] == base.config.vision_config.num_attention_heads


# The image tower of each family, and both towers of one; test_export.py has each way to export, on CLIP.
@pytest.mark.parametrize(
    ("model", "family"), [("coop", "metaclip_2"), ("coop", "chinese_clip"), ("cocoop", "siglip")], indirect=True
)
def test_export_to_onnx(model, family, clip_folders, tmp_path):
    import onnxruntime

    base = model.get_base_model()
    export_onnx(classifier_of(model, clip_folders[SHAPE_OF[family]]), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(None, {"pixel_values": pixels(base).numpy()})
    np.testing.assert_allclose(logits, model(pixels(base)).logits.detach().numpy(), atol=2e-4)


@pytest.mark.parametrize(("model", "family"), [("coop", family) for family in SHAPE_OF], indirect=True)
def test_export_to_plain_transformers(model, family, clip_folders, tmp_path):
    snippet = export_transformers(classifier_of(model, clip_folders[SHAPE_OF[family]]), tmp_path)
    assert FAMILIES[family].vision_class in snippet
    base = model.get_base_model()
    check_plain_model(tmp_path, family, base, model(pixels(base)).logits.detach())


def check_plain_model(folder, family, base, expected):
    """The exported image tower gives the model's logits with transformers alone."""
    vision = getattr(transformers, FAMILIES[family].vision_class).from_pretrained(folder)
    with torch.no_grad():
        embeds = getattr(vision(pixels(base)), FAMILIES[family].vision_output)
    head = load_file(folder / "classifier.safetensors")
    logits = F.linear(F.normalize(embeds), **head)
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    assert vision.config.id2label == dict(enumerate(CLASS_NAMES))


def test_transformers_pipelines(family, method, adapt, clip_folders):
    model, folder = adapt(method, SHAPE_OF[family]), clip_folders[SHAPE_OF[family]]
    processor = AutoImageProcessor.from_pretrained(folder)
    answers = pipeline("image-classification", model=model, image_processor=processor)(PICTURE, top_k=4)
    expected = {g["label"]: pytest.approx(g["score"], abs=1e-3) for g in classifier_of(model, folder)(PICTURE)}
    assert {answer["label"]: answer["score"] for answer in answers} == expected
    if method.open and not method.fused:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        task = "zero-shot-image-classification"
        classify = pipeline(task, model=model, image_processor=processor, tokenizer=tokenizer)
        answers = classify(PICTURE, candidate_labels=CLASS_NAMES, hypothesis_template="a photo of a {}.")
        if family == "siglip":  # for which this pipeline gives each pair's own probability, by the model's bias
            with torch.no_grad():
                logits = model(processor(PICTURE, return_tensors="pt")["pixel_values"]).logits[0]
            pairs = zip(CLASS_NAMES, logits.sigmoid().tolist(), strict=True)
            expected = {name: pytest.approx(score, abs=1e-3) for name, score in pairs}
        assert {answer["label"]: answer["score"] for answer in answers} == expected


def test_an_adapter_of_another_family_is_refused(adapt, load_clip, tmp_path):
    adapt(METHODS["coop"], "metaclip_2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="The adapter was made for another CLIP"):
        PeftModel.from_pretrained(load_clip(), tmp_path)


def test_metaclip_2_reads_at_its_own_end_of_sentence_number_2(load_clip):
    model = load_clip("metaclip_2")
    encoder, ids = encoder_of(model), token_ids(model, ["a photo of a cat.", "forest"])
    assert model.config.text_config.eos_token_id == 2
    assert encoder.ends(ids).tolist() == [7, 2]  # CLIP's rule for a 2, the highest id, would read at a word
    clip = load_clip("legacy_eos")
    assert clip.config.text_config.eos_token_id == 2
    ids = token_ids(clip, ["a photo of a cat.", "forest"])
    assert encoder_of(clip).ends(ids).tolist() == [7, 2]


def test_a_model_without_prompts_answers_its_own_call_as_it_is(family, load_clip):
    """Logits with the family's bias, and its own loss."""
    plain = load_clip(SHAPE_OF[family]).requires_grad_(False)
    inputs = tokenize_like_a_user(plain, [f"a photo of a {name}." for name in CLASS_NAMES])
    pictures = pixels(plain, len(CLASS_NAMES))
    expected = plain(**inputs, pixel_values=pictures, return_loss=True)
    model = get_peft_model(load_clip(SHAPE_OF[family]), config_class("zero-shot")(class_names=CLASS_NAMES)).eval()
    found = model(**inputs, pixel_values=pictures, return_loss=True)
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds", "loss"):
        torch.testing.assert_close(found[name], expected[name], atol=2e-6, rtol=1e-6)
    torch.testing.assert_close(model(pictures).logits, expected.logits_per_image, atol=2e-6, rtol=1e-6)
    for name, given in (("get_text_features", inputs), ("get_image_features", {"pixel_values": pictures})):
        features = pooled(getattr(model, name)(**given)), pooled(getattr(plain, name)(**given))
        torch.testing.assert_close(*features, atol=2e-6, rtol=1e-6)  # bit for bit where nothing is packed


def tokenize_like_a_user(model, sentences):
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)
    padding = "max_length" if model.config.model_type == "siglip" else True
    return tokenizer(sentences, padding=padding, return_tensors="pt")


@pytest.mark.parametrize("position", ["front", "middle", "end"])
def test_coop_finds_the_name_wherever_sentences_begin_and_end(family, position, load_clip):
    config = config_class("coop")(class_names=["cat", "red circle"], prompt_length=4, class_position=position)
    model = get_peft_model(load_clip(SHAPE_OF[family]), config)
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    texts = learner.class_texts
    order = learner.order(encoder, texts.ids, texts.ends)
    names = [word_ids(learner.tokenizer(encoder), name) for name in texts.names]
    before = {"front": 0, "middle": 2, "end": 4}[position]
    for row, places, name, end in zip(texts.ids, order, names, texts.ends, strict=True):
        start = encoder.prefix + before
        assert row[places][start : start + len(name)].tolist() == name
        learned = (places >= encoder.prefix) & (places < encoder.prefix + 4)
        assert learned.sum() == 4
        assert places[int(end) :].tolist() == list(range(int(end), len(row)))  # EOS and padding stay
    model(pixels(model)).logits.sum().backward()
    assert learner.text_prompts.grad.abs().sum() > 0


def test_captions_are_spelled_from_their_first_word_to_their_end(family, adapt):
    model = adapt(METHODS["tgpt"], SHAPE_OF[family], label_smoothing=0.0, templates=["a photo of a {}."])
    learner, encoder = model.learner, encoder_of(model.get_base_model())
    tokenizer, words = learner.tokenizer(encoder), encoder.words()
    captions = ["a red cat", "a photo of the forest.", "blue " * 30]
    rows = [{"pixel_values": p, "labels": 0, "caption": c} for p, c in zip(pixels(model), captions, strict=True)]
    batch = Collator(tokenizer, encoder.shape()["context_length"])(rows)
    output = model(**batch)
    tokens = learner.bonder_tokens(encoder, learner.image_states(encoder, batch["pixel_values"]))
    losses = []
    for caption, prompt in zip(captions, learner.content_bonder(learner.content_queries, tokens), strict=True):
        targets = torch.tensor(tokenizer(caption).input_ids[encoder.prefix :][: len(prompt)])
        losses.append(F.cross_entropy(prompt[: len(targets)] @ words.T, targets, reduction="none"))
    torch.testing.assert_close(output.loss_content, torch.cat(losses).mean(), atol=1e-5, rtol=1e-5)
    weights = model.tokens_per_image(batch["labels"], batch["caption_ids"])
    assert weights["content"] == pytest.approx(sum(map(len, losses)) / len(losses))


@torch.no_grad()
def test_tgpts_prompts_stand_where_words_do(family, adapt, load_clip):
    """The text feature of a prompt is the untouched model's, of a sentence of as many words that are replaced."""
    model, plain = adapt(METHODS["tgpt"], SHAPE_OF[family]), load_clip(SHAPE_OF[family])
    encoder, count = encoder_of(model.get_base_model()), 6
    prompts = torch.randn(1, count, encoder.shape()["text_width"])
    inputs = tokenize_like_a_user(plain, [" ".join(["cat"] * count) + "."])
    start = encoder.prefix

    def replace(module, args, output):
        return torch.cat([output[:, :start], prompts, output[:, start + count :]], dim=1)

    words = encoder_of(plain).words()
    embedding = next(module for module in plain.modules() if getattr(module, "weight", None) is words)
    handle = embedding.register_forward_hook(replace)
    expected = pooled(plain.get_text_features(**inputs))
    handle.remove()
    torch.testing.assert_close(model.learner.encode_prompts(encoder, prompts), expected, atol=1e-5, rtol=1e-5)


def test_lora_changes_both_towers(family, load_clip):
    model = make_classifier("lora", load_clip(SHAPE_OF[family]), CLASS_NAMES)
    names = [name for name, weight in model.named_parameters() if weight.requires_grad and "lora_A" in name]
    base = model.get_base_model()
    layers = encoder_of(base).text_layers(), encoder_of(base).image_layers()
    for tower, own in zip(("text_model", "vision_model"), layers, strict=True):
        assert sum(tower in name for name in names) == 3 * len(own)


def test_chinese_clip_reads_chinese(load_clip):
    model = load_clip("chinese_clip").requires_grad_(False)
    names, pictures = ["猫", "狗"], pixels(model)
    inputs = tokenize_like_a_user(model, ["一张猫的照片。", "一张狗的照片。"])
    assert inputs.input_ids.shape == (2, 9)  # a token each, between CLS and SEP
    expected = model(**inputs, pixel_values=pictures).logits_per_image
    config = config_class("zero-shot")(class_names=names, templates=["一张{}的照片。"])
    torch.testing.assert_close(get_peft_model(model, config)(pictures).logits, expected, atol=1e-6, rtol=1e-6)
    config = config_class("coop")(class_names=names, prompt_length=2, initial_text="一张")
    learner = get_peft_model(load_clip("chinese_clip"), config).learner
    words = model.text_model.embeddings.word_embeddings.weight
    assert torch.equal(learner.text_prompts, words[inputs.input_ids[0, 1:3]])
    with pytest.raises(ValueError, match=r"contains '\[SEP\]', which ends a sentence"):
        get_peft_model(load_clip("chinese_clip"), config_class("coop")(class_names=["猫[SEP]"]))


@torch.no_grad()
def test_chinese_clip_sees_no_padding(load_clip):
    """Neither that of a user, with a mask or without, nor that of a class with a shorter name."""
    model = load_clip("chinese_clip")
    adapted = get_peft_model(load_clip("chinese_clip"), config_class("maple")(class_names=CLASS_NAMES, prompt_depth=2))
    adapted = adapted.eval()
    sentences = [f"a photo of a {name}." for name in CLASS_NAMES]
    inputs = tokenize_like_a_user(model, sentences)
    together = pooled(adapted.get_text_features(**inputs))
    assert torch.equal(together, pooled(adapted.get_text_features(inputs.input_ids)))
    for sentence, row in zip(sentences, together, strict=True):
        alone = pooled(adapted.get_text_features(**tokenize_like_a_user(model, [sentence])))[0]
        torch.testing.assert_close(alone, row, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("end", "padding"), [("</s>", "</s>"), ("<eos>", "<pad>")])
def test_siglip_fills_the_context_as_its_tokenizer_pads(load_clip, end, padding, tmp_path):
    """SigLIP's padding is its EOS, SigLIP 2's is not."""
    model = load_clip("siglip")
    siglip_tokenizer(end, padding).save_pretrained(tmp_path)
    tokenizer, encoder = AutoTokenizer.from_pretrained(tmp_path), encoder_of(model)
    sentences = ["A photo of a CAT.", "a photo of a red circle."]
    ids, ends = tokenize(tokenizer, sentences, encoder)
    assert torch.equal(ids, tokenizer(sentences, padding="max_length", return_tensors="pt").input_ids)
    assert ids[[0, 1], ends].tolist() == [tokenizer.eos_token_id] * 2
    assert torch.equal(encoder.ends(ids, tokenizer.eos_token_id), ends)
    ids, ends = class_sentences(tokenizer, ["cat", "red circle"], None, 5, encoder)
    assert ids.shape == (2, 64)
    assert ends.tolist() == [6, 7]
    assert ids[0, 7:].tolist() == [tokenizer.pad_token_id] * 57


@torch.no_grad()
def test_siglip_is_explained_by_its_pooling(adapt, load_clip, clip_folders):
    model = adapt(METHODS["ivlp"], "siglip")
    base, seen = model.get_base_model(), []
    classifier = classifier_of(model, clip_folders["siglip"])
    pooling = base.vision_model.head.attention
    handle = pooling.register_forward_hook(lambda module, args, output: seen.append(output[1]))
    maps = image_attention(classifier, PICTURE)
    handle.remove()
    torch.testing.assert_close(maps.mean(0).flatten(), seen[-1][0, 0])
    torch.testing.assert_close(maps.flatten(1).sum(1), torch.ones(4))
    earlier = image_attention(classifier, PICTURE, layer=0)
    assert earlier.shape == maps.shape
    assert (earlier.flatten(1).sum(1) < 1).all()  # the rest is on the prompts


def test_pictures_become_pixels_as_the_familys_image_processor_makes_them(family, clip_folders):
    processor = load_image_processor(clip_folders[SHAPE_OF[family]])
    assert type(processor).__name__.removesuffix("Pil") == FAMILIES[family].image_processor
    picture = Image.effect_noise((70, 30), 80).convert("RGB")
    transform = ImageTransform.from_processor(processor, train=False)
    theirs = torch.as_tensor(processor(picture, return_tensors="pt")["pixel_values"][0])
    torch.testing.assert_close(transform(picture), theirs, atol=1e-6, rtol=0)
    augmented = ImageTransform.from_processor(processor, train=True)(picture, np.random.default_rng(0))
    assert augmented.shape == theirs.shape


def test_a_subclass_of_a_known_model_keeps_its_class(load_clip):
    class Mine(transformers.CLIPModel):
        pass

    model = load_clip()
    model.__class__ = Mine
    adapted = get_peft_model(model, METHODS["maple"].config())
    assert isinstance(adapted.get_base_model(), Mine)
    assert type(adapted.unload()) is Mine


@pytest.mark.parametrize("name", ["maple", "coop", "cocoop"])
def test_chunks_and_shares_of_the_classes_give_the_numbers_of_all_at_once(family, name, adapt):
    """Also where padding is read and nothing is packed."""
    found = []
    for chunk in (1, 100):
        model = adapt(
            METHODS[name], SHAPE_OF[family], text_chunk_size=chunk
        ).double()  # in evaluation: BERT has dropout
        output = model(pixels(model).double(), torch.tensor([0, 3, 1]))
        output.loss.backward()
        found.append([output.logits, *(weight.grad for weight in model.parameters() if weight.requires_grad)])
    for ours, at_once in zip(*found, strict=True):
        torch.testing.assert_close(ours, at_once, atol=1e-10, rtol=1e-10)
    if not METHODS[name].conditioned:
        learner, encoder = model.learner, encoder_of(model.get_base_model())
        shares = [learner.encode_classes(encoder, learner.class_texts, share) for share in (slice(0, 3), slice(3, 4))]
        whole = learner.encode_classes(encoder, learner.class_texts)
        torch.testing.assert_close(torch.cat(shares), whole, atol=1e-10, rtol=1e-10)
