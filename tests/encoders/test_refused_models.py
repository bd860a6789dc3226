"""A base model that cannot serve is named with the remedy, before any work is done."""

import json
import shutil

import pytest
import transformers
from conftest import CLASS_NAMES, METHODS, ImageProcessor
from peft import get_peft_model
from transformers import AutoTokenizer, CLIPForImageClassification

import hf_tgpt
from hf_tgpt.cli.main import main
from hf_tgpt.inference.loading import load_classifier


def folder_of(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("kind", ["CLIPVisionModelWithProjection", "CLIPTextModelWithProjection", "ViTModel"])
def test_one_tower_alone_is_refused(kind, load_clip, tmp_path):
    model_class = getattr(transformers, kind)
    config = model_class.config_class(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8
    )
    model = model_class(config)
    with pytest.raises(ValueError, match=r"not a CLIP with both towers; choose a model of one of .*SiglipModel"):
        hf_tgpt.load_clip(folder_of(model, tmp_path))
    with pytest.raises(ValueError, match=f"is a {kind}; prompt learning needs a .* model with both towers"):
        get_peft_model(model, METHODS["gda"].config())


def test_a_classifier_of_the_same_type_lacks_a_tower(load_clip, tmp_path):
    config = load_clip().config
    folder = folder_of(CLIPForImageClassification(config), tmp_path)
    with pytest.raises(ValueError, match=r"lacks \d+ of the weights of a CLIPModel, such as .* only one tower"):
        hf_tgpt.load_clip(folder)


def test_naflex_is_refused_with_a_checkpoint_of_fixed_resolution(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "siglip2", "text_config": {}, "vision_config": {}}))
    with pytest.raises(ValueError, match=r"NaFlex form.*google/siglip2-base-patch16-224"):
        hf_tgpt.load_clip(tmp_path)


@pytest.mark.parametrize(
    ("model", "other"),
    [("plain", "metaclip_2"), ("siglip", "chinese_clip"), ("chinese_clip", "siglip"), ("metaclip_2", "plain")],
)
def test_a_tokenizer_of_another_model_is_refused(model, other, load_clip, clip_folders):
    config = METHODS["maple"].config(tokenizer_name_or_path=clip_folders[other])
    with pytest.raises(ValueError, match=r"tokenizer_name_or_path.*use the tokenizer that the base model was trained"):
        get_peft_model(load_clip(model), config)


def test_a_tokenizer_of_a_far_smaller_vocabulary_is_refused(load_clip, tmp_path):
    model = load_clip("siglip")
    model.config.text_config.vocab_size = 3 * len(AutoTokenizer.from_pretrained(model.name_or_path))
    with pytest.raises(ValueError, match="it is another model's; use the tokenizer"):
        get_peft_model(model, METHODS["gda"].config())


@pytest.fixture
def spoilt(clip_folders, tmp_path):
    """A base model whose image processor makes pictures of another size, and an adapter on it."""
    folder = tmp_path / "clip"
    shutil.copytree(clip_folders["plain"], folder)
    ImageProcessor(size={"shortest_edge": 48}, crop_size={"height": 48, "width": 48}).save_pretrained(folder)
    return str(folder)


def test_a_processor_of_another_size_is_named_wherever_pictures_come_in(spoilt, tmp_path, capsys):
    model = get_peft_model(hf_tgpt.load_clip(spoilt), METHODS["task_res"].config())
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"takes pictures of 32 x 32 pixels, but its preprocessor_config.json .* 48 x"):
        load_classifier(tmp_path / "adapter")
    run = ["--dataset", "toyworld:codes", "--model", spoilt, "--method", "gda", "--shots", "1"]
    assert main(["train", *run, "--output_dir", str(tmp_path / "run")]) == 1
    assert "takes pictures of 32 x 32 pixels" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_sigmoid_belongs_to_siglip(adapt, clip_folders, load_clip):
    from PIL import Image

    from hf_tgpt.data import ImageTransform
    from hf_tgpt.encoders.loading import load_image_processor
    from hf_tgpt.inference.classifier import Classifier

    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    for shape in ("siglip", "plain"):
        transform = ImageTransform.from_processor(load_image_processor(clip_folders[shape]), train=False)
        classifier = Classifier(adapt(METHODS["coop"], shape), transform)
        if shape == "plain":
            with pytest.raises(ValueError, match=r"`scores`='sigmoid' needs a base model .* SigLIP; CLIPModel is"):
                classifier(picture, scores="sigmoid")
            continue
        logits = classifier.model(transform(picture)[None]).logits[0]
        alone = {g["label"]: g["score"] for g in classifier(picture, scores="sigmoid")}
        assert alone == pytest.approx(dict(zip(CLASS_NAMES, logits.sigmoid().tolist(), strict=True)), abs=1e-6)
        with pytest.raises(ValueError, match="`scores`='softplus' is unknown; choose one of softmax, sigmoid"):
            classifier(picture, scores="softplus")
        among = classifier(picture, 1, class_names=["forest"], scores="sigmoid")
        assert among[0]["score"] == pytest.approx(alone["forest"], abs=1e-5)  # by itself, whoever else is asked about
