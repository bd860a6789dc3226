"""Adapters in transformers' own tools: pipelines and Trainer."""

import inspect
import re
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CLASS_NAMES, GOLDEN, METHODS
from datasets import ClassLabel, Dataset, Features
from datasets import Image as ImageFeature
from PIL import Image
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    Trainer,
    TrainingArguments,
    ZeroShotImageClassificationPipeline,
    pipeline,
)

import hf_tgpt
from hf_tgpt import TOY_CLIP
from hf_tgpt.data import Collator, FewShotImages, ImageTransform
from hf_tgpt.evaluation.accuracy import evaluation_loader
from hf_tgpt.texts.sentences import PIPELINE_SENTENCE

PICTURE = Image.new("RGB", (40, 50), (200, 30, 30))


@pytest.fixture
def processor():
    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


def test_image_classification_pipeline_gives_the_adapters_class_names(method, adapt, processor):
    classify = pipeline("image-classification", model=adapt(method), image_processor=processor)
    answers = classify(PICTURE, top_k=4)
    assert sorted(answer["label"] for answer in answers) == sorted(CLASS_NAMES)
    assert sum(answer["score"] for answer in answers) == pytest.approx(1)


def test_zero_shot_pipeline_takes_any_names_where_the_method_is_open(method, adapt, processor):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
    classify = pipeline(
        "zero-shot-image-classification", model=adapt(method), image_processor=processor, tokenizer=tokenizer
    )
    ask = dict(candidate_labels=["forest", "zigzag texture"], hypothesis_template="a photo of a {}.")
    if method.open:
        assert {answer["label"] for answer in classify(PICTURE, **ask)} == {"forest", "zigzag texture"}
    else:
        with pytest.raises(ValueError, match="baked into"):
            classify(PICTURE, **ask)


@pytest.mark.parametrize("name", ["coop", "maple", "cocoop", "clip_adapter"])
def test_the_pipelines_own_sentence_is_warned_of_and_the_trained_one_is_not(name, adapt, processor):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
    model = adapt(METHODS[name])
    classify = pipeline("zero-shot-image-classification", model=model, image_processor=processor, tokenizer=tokenizer)
    trained = model.learner.trained_sentence()
    labels = ["forest", "red circle"]
    with pytest.warns(UserWarning, match=re.escape(f"pass hypothesis_template={trained!r}")) as caught:
        answers = classify(PICTURE, candidate_labels=labels)
    assert {answer["label"] for answer in answers} == set(labels)
    assert PIPELINE_SENTENCE in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert classify(PICTURE, candidate_labels=labels, hypothesis_template=trained)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            classify(PICTURE, candidate_labels=labels)
    assert len([each for each in caught if "hypothesis_template" in str(each.message)]) == 1


def test_an_adapter_that_was_trained_with_the_pipelines_sentence_or_not_at_all_is_not_warned_of(adapt, processor):
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
    alike = METHODS["coop"].config_class(class_names=CLASS_NAMES, prompt_length=1, initial_text="This is a photo of")
    for config in (alike, hf_tgpt.ZeroShotConfig(class_names=CLASS_NAMES)):
        model = config.build(adapt(METHODS["coop"]).unload()).eval()
        classify = pipeline(
            "zero-shot-image-classification", model=model, image_processor=processor, tokenizer=tokenizer
        )
        assert classify(PICTURE, candidate_labels=["forest", "red circle"])


def test_the_pipelines_sentence_is_still_what_we_take_it_for():
    """If transformers changes it, change PIPELINE_SENTENCE in hf_tgpt/texts/sentences.py too."""
    preprocess = inspect.signature(ZeroShotImageClassificationPipeline.preprocess)
    assert preprocess.parameters["hypothesis_template"].default == PIPELINE_SENTENCE


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
def test_the_trainers_predictions_are_the_logits_whatever_the_method(method, adapt, tmp_path):
    model, shapes = adapt(method), []
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 4} for i in range(6)]

    def compute_metrics(prediction):
        shapes.append(prediction.predictions.shape)
        return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids).mean())}

    options = dict(per_device_eval_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), compute_metrics=compute_metrics)
    metrics = trainer.evaluate(rows)
    assert shapes == [(6, len(CLASS_NAMES))]
    with torch.no_grad():
        logits = model(torch.stack([row["pixel_values"] for row in rows])).logits
    expected = (logits.argmax(-1) == torch.tensor([row["labels"] for row in rows])).float().mean()
    assert metrics["eval_accuracy"] == pytest.approx(float(expected))
    model.unload()
    assert "keys_to_ignore_at_inference" not in vars(model.config)


@pytest.mark.parametrize("name", ["maple", "linear_probe"])
def test_trainer_trains_and_measures_with_our_collator_and_metrics_as_evaluation_does(name, adapt, processor, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (12, 40, 40, 3), dtype=np.uint8)
    features = Features({"image": ImageFeature(), "label": ClassLabel(names=CLASS_NAMES)})
    rows = {"image": [Image.fromarray(pixels) for pixels in noise], "label": [i % 4 for i in range(12)]}
    transform = ImageTransform.from_processor(processor, train=False)
    images = FewShotImages(Dataset.from_dict(rows, features), transform)
    model = adapt(METHODS[name]).train()
    options = dict(max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    data = dict(train_dataset=images, eval_dataset=images, data_collator=Collator())
    trainer = Trainer(model, TrainingArguments(tmp_path, **options), **data, compute_metrics=hf_tgpt.compute_metrics)
    assert trainer.train().global_step == 2
    metrics = trainer.evaluate()
    accelerator = Accelerator(cpu=True)
    expected = hf_tgpt.evaluate(model.eval(), evaluation_loader(images, accelerator), accelerator)
    for name in ("accuracy", "mean_per_class_accuracy", "expected_calibration_error"):
        assert metrics[f"eval_{name}"] == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("name", ["maple", "cocoop"])
def test_trainer_trains_an_adapter(name, adapt, tmp_path):
    model = adapt(METHODS[name]).train()
    rows = [{"pixel_values": torch.randn(3, 32, 32), "labels": i % 4} for i in range(8)]
    options = dict(max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, disable_tqdm=True)
    outcome = Trainer(model, TrainingArguments(tmp_path, **options), train_dataset=rows).train()
    assert outcome.global_step == 2


def test_the_toy_clip_works_in_the_zero_shot_pipeline():
    classify = pipeline("zero-shot-image-classification", model=str(TOY_CLIP))
    answers = classify(PICTURE, candidate_labels=["red shape", "blue shape"], hypothesis_template="a photo of a {}.")
    assert answers[0]["label"] == "red shape"
