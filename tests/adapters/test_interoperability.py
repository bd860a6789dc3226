"""Our adapters next to PEFT's LoRA on one CLIP, and in transformers' pipelines after loading."""

import pytest
import torch
from conftest import CLASS_NAMES, GOLDEN, METHODS, ImageProcessor, pixels, token_ids
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, pipeline
from transformers.integrations.peft import MIN_PEFT_VERSION

from hf_tgpt.data import ImageTransform
from hf_tgpt.inference.classifier import Classifier
from hf_tgpt.utils.compat import before

SENTENCES = ["a photo of a cat.", "a photo of a forest."]
SWITCHES = pytest.mark.skipif(
    before("peft", MIN_PEFT_VERSION),
    reason="transformers 5.24 wants PEFT 0.22, which is not out, for its own set_adapter and disable_adapters",
)
# PEFT's, of any two adapters that transformers' load_adapter puts on one model.
TWO = pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute:UserWarning")
PROCESSOR = dict(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def folders(load_clip, adapt, tmp_path):
    """folders("maple") -> the folders of an adapter of that method and of a LoRA, neither as it started."""

    def make(name):
        adapt(METHODS[name]).save_pretrained(tmp_path / name)
        lora = LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)
        torch.manual_seed(2)
        get_peft_model(load_clip(), lora).save_pretrained(tmp_path / "lora")
        return {"ours": tmp_path / name, "lora": tmp_path / "lora"}

    return make


def compare(clip):
    """CLIP's own answer to two sentences."""
    return clip(input_ids=token_ids(clip, SENTENCES), pixel_values=pixels(clip)).logits_per_image


@TWO
@SWITCHES
@pytest.mark.parametrize("order", [("ours", "lora"), ("lora", "ours")], ids="-".join)
@pytest.mark.parametrize("name", ["maple", "tgpt", "coop", "mutual_prompt"])
def test_ours_and_lora_are_listed_and_switched_on_one_clip(name, order, folders, load_clip):
    places = folders(name)
    alone = PeftModel.from_pretrained(load_clip(), places["ours"]).eval()
    expected = {"ours": alone(pixels(alone)).logits}
    expected["lora"] = compare(PeftModel.from_pretrained(load_clip(), places["lora"]).eval())
    clip, plain = load_clip(), compare(load_clip())
    for adapter in order:
        clip.load_adapter(places[adapter], adapter_name=adapter)
    assert set(clip.peft_config) == {"ours", "lora"}
    for adapter in ("ours", "lora", "ours"):
        clip.set_adapter(adapter)
        assert clip.active_adapters() == [adapter]
        answer = clip(pixels(clip)).logits if adapter == "ours" else compare(clip)
        torch.testing.assert_close(answer, expected[adapter], atol=0, rtol=0)
    clip.disable_adapters()
    torch.testing.assert_close(compare(clip), plain, atol=0, rtol=0)


@TWO
@SWITCHES
def test_prompts_on_top_of_a_lora_leave_nothing_behind_when_it_is_switched_off(folders, load_clip):
    """Both towers run with the LoRA then, so what is kept of the class texts must not outlive it."""
    places, clip = folders("maple"), load_clip()
    clip.load_adapter(places["ours"], adapter_name="ours")
    clip.load_adapter(places["lora"], adapter_name="lora")
    clip.set_adapter("ours")
    with torch.no_grad():
        alone = clip(pixels(clip)).logits
        clip.set_adapter(["ours", "lora"])
        both = clip(pixels(clip)).logits
        merged = PeftModel.from_pretrained(load_clip(), places["lora"]).merge_and_unload()
        merged = PeftModel.from_pretrained(merged, places["ours"]).eval()
        torch.testing.assert_close(both, merged(pixels(clip)).logits, atol=1e-4, rtol=0)
        assert (both - alone).abs().max() > 1e-3
        clip.set_adapter("ours")
        torch.testing.assert_close(clip(pixels(clip)).logits, alone, atol=0, rtol=0)


@pytest.mark.parametrize("order", [("ours", "lora"), ("lora", "ours")], ids="-".join)
def test_one_peft_model_refuses_two_kinds_of_adapter_in_pefts_words(order, folders, load_clip):
    places = folders("maple")
    model = PeftModel.from_pretrained(load_clip(), places[order[0]])
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.load_adapter(places[order[1]], adapter_name="second")


def test_a_loaded_adapter_says_in_pipelines_what_its_classifier_says(method, adapt, load_clip, tmp_path):
    adapt(method).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(load_clip(), tmp_path).eval()
    classifier = Classifier(model, ImageTransform.from_processor(ImageProcessor(**PROCESSOR), train=False))
    picture = Image.effect_noise((40, 50), 80).convert("RGB")
    processor = CLIPImageProcessor(**PROCESSOR)
    expected = {part["label"]: pytest.approx(part["score"], abs=1e-3) for part in classifier(picture)}
    answers = pipeline("image-classification", model=model, image_processor=processor)(picture, top_k=4)
    assert {part["label"]: part["score"] for part in answers} == expected
    if method.open and not method.fused:
        tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
        ask = dict(candidate_labels=CLASS_NAMES, hypothesis_template="a photo of a {}.")
        task = "zero-shot-image-classification"
        answers = pipeline(task, model=model, image_processor=processor, tokenizer=tokenizer)(picture, **ask)
        assert {part["label"]: part["score"] for part in answers} == expected
