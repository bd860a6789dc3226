"""Class names of any language that the base model's tokenizer knows, and what happens to those that it does not."""

import pytest
import torch
from conftest import METHODS, READERS, pixels
from peft import get_peft_model
from transformers import AutoTokenizer

from hf_tgpt import config_class
from hf_tgpt.encoders import encoder_of
from hf_tgpt.texts.sentences import class_sentences, class_template, words_before

# A class sentence and names, and the tiny models whose tokenizers know them.
LANGUAGES = {
    "Chinese": ("一张{}的照片。", ["猫", "狗", "红色圆形"], ["chinese_clip", "metaclip_2"]),
    "Arabic": ("صورة {}.", ["قطة", "كلب", "قطة كلب"], ["siglip", "chinese_clip"]),
    "Hebrew": ("תמונה {}", ["חתול", "כלב", "חתול כלב"], ["metaclip_2"]),
    "German": ("Ein Foto von {}.", ["Hündin", "Kater", "grün"], ["siglip"]),
    "Thai": ("ภาพ{}", ["แมว", "หมา", "แมวหมา"], ["metaclip_2"]),
}
CASES = [(language, shape) for language, (_, _, shapes) in LANGUAGES.items() for shape in shapes]


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
@pytest.mark.parametrize(("language", "shape"), CASES)
def test_every_method_learns_and_answers_by_names_of_a_language(language, shape, adapt):
    sentence, names, _ = LANGUAGES[language]
    texts = {"initial_text": sentence, "templates": [sentence], "prompt_length": 1, "text_prompt_length": 1}
    for method in map(METHODS.get, [*READERS, "task_res"]):  # one head for all: they get CLIP's features
        model = adapt(method, shape, class_names=names, **{name: texts[name] for name in texts if method.has(name)})
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        if weights:
            model.train()(pixels(model), torch.tensor([0, 2, 1])).loss.backward()
            assert all(weight.grad is not None for weight in weights)
        logits = model.eval()(pixels(model)).logits
        assert logits.shape == (3, 3)
        assert logits.isfinite().all()
        assert model.class_names == names


@pytest.fixture
def tiny(load_clip, clip_folders):
    """tiny(shape) -> encoder and tokenizer."""
    return lambda shape: (encoder_of(load_clip(shape)), AutoTokenizer.from_pretrained(clip_folders[shape]))


def test_a_text_with_a_place_is_the_whole_class_sentence(tiny):
    encoder, tokenizer = tiny("chinese_clip")
    ids, ends = class_sentences(tokenizer, ["猫", "红色圆形"], "一张{}的照片。", 2, encoder)
    rows = [row[: end + 1] for row, end in zip(ids.tolist(), ends.tolist(), strict=True)]
    assert rows == tokenizer(["一张猫的照片。", "一张红色圆形的照片。"]).input_ids
    assert (class_template("a photo of a"), words_before("a photo of a")) == ("a photo of a {}.", "a photo of a")
    assert (class_template("صورة {}"), words_before("صورة {}")) == ("صورة {}", "صورة")


@pytest.mark.parametrize("method", ["coop", "maple", "ivlp", "cocoop", "mutual_prompt"])
def test_learned_tokens_start_from_the_words_before_the_name_and_never_take_its_place(method, load_clip):
    def build(text, shape="metaclip_2", names=("猫", "狗")):
        fields = {"ivlp": {"text_prompt_length": 3, "text_prompt_depth": 1, "vision_prompt_depth": 1}}
        fields = fields.get(method, {"prompt_length": 3, **({"prompt_depth": 1} if method == "maple" else {})})
        return get_peft_model(load_clip(shape), config_class(method)(class_names=names, initial_text=text, **fields))

    model = build("一张{}的照片。")
    prompts = model.learner.text_prompts
    words = model.learner.class_texts.ids[0, 1:4]  # the mark of a beginning, 一, 张
    start = prompts if isinstance(prompts, torch.nn.Parameter) else prompts[0]
    assert torch.equal(start, encoder_of(model.get_base_model()).words()[words])
    with pytest.raises(ValueError, match="has 0 tokens"):
        build("{}的照片。")
    with pytest.raises(ValueError, match=r"merges words before \{\} and the class name 'at' into one token"):
        build("photo of c{}", names=["at", "cat"])  # "cat" is one token


def test_a_text_says_where_the_name_stands_or_coops_position_does():
    coop = config_class("coop")
    with pytest.raises(
        ValueError, match=r"`class_position`='front': `initial_text` already places the class name by \{\}"
    ):
        coop(class_names=["猫"], initial_text="一张{}。", prompt_length=1, class_position="front")
    coop(class_names=["猫"], initial_text="一张", prompt_length=1, class_position="front")


@pytest.mark.parametrize("method", ["coop", "tgpt", "gda", "zero_shot", "lora"])
@pytest.mark.parametrize(
    ("shape", "names"),
    [
        ("chinese_clip", ["grün", "cat", "grun"]),  # its tokenizer takes accents off
        ("siglip", ["cat", "cat!"]),  # its tokenizer drops punctuation
    ],
)
def test_names_that_are_the_same_tokens_are_refused(method, shape, names, load_clip):
    config = config_class(method)(class_names=names, **({"num_content_queries": 8} if method == "tgpt" else {}))
    with pytest.raises(ValueError, match=f"{names[0]!r} and {names[-1]!r}, which are the same tokens"):
        config.build(load_clip(shape))


@pytest.mark.parametrize("method", ["coop", "gda", "zero_shot"])
def test_two_names_that_the_tokenizer_does_not_know_are_told(method, load_clip):
    with pytest.warns(
        UserWarning, match="does not know the class names 'ขนม' and 'ร้าน' and makes the same tokens of both"
    ):
        config_class(method)(class_names=["ขนม", "cat", "ร้าน"]).build(load_clip("chinese_clip"))


@pytest.mark.parametrize("shape", ["chinese_clip", "siglip", "metaclip_2"])
def test_a_name_that_the_tokenizer_does_not_know_is_told(shape, tiny):
    encoder, tokenizer = tiny(shape)
    with pytest.warns(UserWarning, match="does not know the class name 'ร้าน'"):
        class_sentences(tokenizer, ["cat", "ร้าน"], "a photo of a", 0, encoder)
    class_sentences(tokenizer, ["cat", "cat ร้าน"], "a photo of a", 0, encoder)  # a part of it is known


def test_names_are_read_in_nfc(tiny):
    """As macOS does not write them; SigLIP 2's tokenizer leaves them as they are."""
    encoder, tokenizer = tiny("siglip")
    found = class_sentences(tokenizer, ["hu\u0308ndin"], "ein foto von", 0, encoder)
    for ours, theirs in zip(found, class_sentences(tokenizer, ["hündin"], "ein foto von", 0, encoder), strict=True):
        assert torch.equal(ours, theirs)
