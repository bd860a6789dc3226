"""What a method may do that is in no method yet: each hook carries a throw-away one, from PEFT to the training loop."""

import os
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import CLASS_NAMES, ImageProcessor, pixels, pooled
from datasets import ClassLabel, Dataset, Features, Image
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from PIL import Image as PILImage
from transformers.modeling_outputs import ImageClassifierOutput

from hf_tgpt import CoOpConfig, IVLPConfig
from hf_tgpt.adapters.config import PromptConfig
from hf_tgpt.adapters.learner import PromptLearner, Stage
from hf_tgpt.adapters.open_learner import OpenPromptLearner
from hf_tgpt.adapters.registry import register
from hf_tgpt.data import FewShotImages, ImageTransform
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.walk import encode_image, encode_words, unit
from hf_tgpt.evaluation.accuracy import evaluation_loader, for_classes
from hf_tgpt.methods.coop import CoOp
from hf_tgpt.methods.linear_probe import LinearProbe, LinearProbeConfig
from hf_tgpt.training.config import TrainingConfig
from hf_tgpt.training.loop import train
from hf_tgpt.training.stages import plan
from hf_tgpt.utils.fields import checked, documented

LABELS = torch.tensor([0, 3, 1])


@pytest.fixture(autouse=True)
def registry():
    """What a test registers goes with it."""
    mappings = (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING)
    before = [dict(mapping) for mapping in mappings]
    yield
    for mapping, content in zip(mappings, before, strict=True):
        mapping.clear()
        mapping.update(content)


def define(name, config_base, learner_base, fields=(), **parts):
    """A registered method: its config has one field more for each of `fields`, its learner the `parts`."""
    annotations = {field: kind for field, kind, _ in fields}
    defaults = {field: documented(default, "of a test") for field, _, default in fields}
    config = checked(
        type(f"{name}Config", (config_base,), {"__annotations__": annotations, "__module__": __name__, **defaults})
    )
    learner = type(name, (learner_base,), {"citation": "", "__module__": __name__, **parts})
    register(name.upper(), config, learner)
    return config


def images_of(clip, count=8):
    size = clip.config.vision_config.image_size
    features = Features({"image": Image(), "label": ClassLabel(names=CLASS_NAMES)})
    rng = np.random.default_rng(0)
    rows = {
        "image": [rng.integers(0, 255, (size, size, 3), dtype=np.uint8) for _ in range(count)],
        "label": [i % len(CLASS_NAMES) for i in range(count)],
    }
    processor = ImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    return FewShotImages(Dataset.from_dict(rows, features), ImageTransform.from_processor(processor, train=True))


def run(model, folder, **config):
    images = images_of(model.get_base_model())
    return train(
        model, images, TrainingConfig(**{"batch_size": 4, "epochs": 2, **config}), Accelerator(cpu=True), folder
    )


# The loss -------------------------------------------------------------------------------------------------------------


def anchored(**parts):
    """KgCoOp: CoOp with an anchor at the base model's own class features, from what the forward has computed."""

    def extra_losses(self, encoder, computed):
        anchors = self.frozen_class_features(encoder, ["a photo of a {}."], computed.class_texts)
        return {"anchor": self.config.anchor_weight * (1 - (computed.class_features * anchors).sum(-1).mean())}

    fields = [("anchor_weight", float, 8.0)]
    return define("Anchored", CoOpConfig, CoOp, fields, extra_losses=extra_losses, **parts)


def test_an_extra_loss_is_handed_what_the_forward_has_computed(load_clip, monkeypatch):
    calls = []
    original = CoOp.text_features
    monkeypatch.setattr(CoOp, "text_features", lambda self, *args: calls.append("own") or original(self, *args))
    monkeypatch.setattr(
        "hf_tgpt.texts.zero_shot_head.encode_words",
        lambda *args, **kwargs: calls.append("frozen") or encode_words(*args, **kwargs),
    )
    config = anchored()(class_names=CLASS_NAMES, prompt_length=2, initial_text=None)
    model = get_peft_model(load_clip(), config).train()
    for _ in range(3):
        output = model(pixels(model), LABELS)
        output.loss.backward()
    assert calls == ["own", "frozen", "own", "own"]  # the text tower runs once a step, the frozen one once for all
    plain = torch.nn.functional.cross_entropy(output.logits, LABELS)
    assert output.loss > plain
    assert model.learner.text_prompts.grad is not None


def test_frozen_class_features_follow_the_class_list(load_clip):
    model = get_peft_model(load_clip(), anchored()(class_names=CLASS_NAMES, prompt_length=2)).eval()
    learner, encoder = model.learner, model.untuned_encoder()
    own = learner.frozen_class_features(encoder, ["a photo of a {}."])
    other = learner.frozen_class_features(encoder, ["a photo of a {}."], model.texts_for(["forest", "cat"]))
    torch.testing.assert_close(other, own[[3, 0]], atol=1e-5, rtol=1e-5)
    model.set_class_names(["forest", "cat"])
    torch.testing.assert_close(learner.frozen_class_features(encoder, ["a photo of a {}."]), other)
    averaged = learner.frozen_class_features(encoder, ["a photo of a {}.", "the {}"], normalize_each=False)
    assert averaged.shape == other.shape
    assert not torch.allclose(averaged, other)
    pictures = pixels(model)
    torch.testing.assert_close(
        learner.frozen_image_features(encoder, pictures), unit(pooled(load_clip().get_image_features(pictures)))
    )


# Two ways to classify -------------------------------------------------------------------------------------------------


def two_ways():
    """Trained classes by a trained row each, other classes by their texts."""

    def init(self, config, encoder):
        OpenPromptLearner.__init__(self, config, encoder)
        rows = torch.randn(len(config.class_names), encoder.shape()["projection_width"])
        self.rows = torch.nn.Parameter(rows)

    def classify(self, encoder, computed):
        rows = self.rows[computed.class_texts.trained_labels.clamp(min=0)]
        return encoder.scale(computed.image_features @ unit(rows).T)

    def classify_new(self, encoder, computed):
        return encoder.scale(computed.image_features @ computed.class_features.T)

    def text_features(self, encoder, input_ids, ends, packing=None):
        return encode_words(encoder, input_ids, ends)

    return define(
        "TwoWays", PromptConfig, OpenPromptLearner,
        __init__=init, classify=classify, classify_new=classify_new, text_features=text_features, vision_is_frozen=True,
    )  # fmt: skip


def test_trained_and_other_classes_are_each_classified_in_their_own_way(load_clip, tmp_path):
    model = get_peft_model(load_clip(), two_ways()(class_names=CLASS_NAMES)).eval()
    pictures = pixels(model)
    own = model(pictures).logits
    mixed = for_classes(model, ["zigzag texture", "forest", "cat"])(pictures).logits
    torch.testing.assert_close(mixed[:, 1:], own[:, [3, 0]])  # by the names, not by a flag
    plain = load_clip()
    ids = torch.nn.functional.normalize(
        pooled(plain.get_text_features(**_sentence(plain, "a photo of a zigzag texture.")))
    )
    image = torch.nn.functional.normalize(pooled(plain.get_image_features(pictures)))
    torch.testing.assert_close(mixed[:, :1], plain.logit_scale.exp() * image @ ids.T, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="in a special way"):
        model.set_class_names(["zigzag texture"])
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_clip(), tmp_path).eval()
    torch.testing.assert_close(for_classes(again, ["zigzag texture", "forest", "cat"])(pictures).logits, mixed)
    encoder, texts = encoder_of(again.get_base_model()), again.texts_for(["zigzag texture", "forest", "cat"])
    with torch.no_grad():  # what exporters take
        torch.testing.assert_close(again.learner.standalone(encoder)(pictures), own)
        torch.testing.assert_close(again.learner.standalone(encoder, texts)(pictures), mixed)


def _sentence(model, text):
    from transformers import AutoTokenizer

    return {"input_ids": AutoTokenizer.from_pretrained(model.name_or_path)(text, return_tensors="pt").input_ids}


# Fields ---------------------------------------------------------------------------------------------------------------


def test_an_image_side_method_has_no_field_of_the_text_side(load_clip, tmp_path):
    """VPT as a method of its own: the class sentences are plain, and nothing speaks of prompts in them."""

    def init(self, config, encoder):
        OpenPromptLearner.__init__(self, config, encoder)
        self.prompts = torch.nn.Parameter(0.02 * torch.randn(config.tokens, encoder.shape()["vision_width"]))

    def image_features(self, encoder, pixel_values, **kwargs):
        return encode_image(encoder, pixel_values, {1: self.prompts}, behind_class_token=True, **kwargs)

    def text_features(self, encoder, input_ids, ends, packing=None):
        return encode_words(encoder, input_ids, ends)

    config = define(
        "Visual", PromptConfig, OpenPromptLearner, [("tokens", int, 3)],
        __init__=init, image_features=image_features, text_features=text_features, text_weights=lambda self: (),
    )  # fmt: skip
    model = get_peft_model(load_clip("metaclip_2"), config(class_names=CLASS_NAMES)).train()
    assert not {"prompt_length", "initial_text", "tokenizer_name_or_path"} & set(vars(model.peft_config["default"]))
    model(pixels(model), LABELS).loss.backward()
    assert model.learner.prompts.grad.abs().sum() > 0
    model.eval().save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(load_clip("metaclip_2"), tmp_path).eval()
    assert torch.equal(again(pixels(model)).logits, model(pixels(model)).logits)


# Training -------------------------------------------------------------------------------------------------------------


def test_fit_comes_before_the_first_step_with_all_training_images(load_clip, tmp_path):
    fitted = []

    def fit(self, encoder, data, validation, steps):
        fitted.append((data, validation, steps))
        with torch.no_grad():
            self.head.weight.zero_()

    def losing(self, *args, **kwargs):
        assert fitted
        return LinearProbe.forward(self, *args, **kwargs)

    config = define("Fitted", LinearProbeConfig, LinearProbe, fit=fit, forward=losing)
    model = get_peft_model(load_clip(), config(class_names=CLASS_NAMES))
    run(model, tmp_path)
    ((data, validation, steps),) = fitted
    assert data.states.shape == (1, 8, load_clip().config.projection_dim)
    assert data.labels.tolist() == [0, 1, 2, 3] * 2
    assert validation is None
    assert steps.epochs == 2


def averaging(epochs_seen=None):
    """The average of the epochs' weights, kept beside them: what PromptSRC needs."""

    def init(self, config, encoder):
        LinearProbe.__init__(self, config, encoder)
        self.total = torch.nn.Buffer(torch.zeros_like(self.head.weight), persistent=False)

    def end_of_epoch(self, epoch, epochs):
        with torch.no_grad():
            self.total += self.head.weight
            if epoch == epochs - 1:
                self.head.weight.copy_(self.total / epochs)
        if epochs_seen is not None:
            epochs_seen.append((epoch, epochs))

    def training_state(self):
        return {"total": self.total}

    return define(
        "Averaging", LinearProbeConfig, LinearProbe,
        __init__=init, end_of_epoch=end_of_epoch, training_state=training_state,
    )  # fmt: skip


def test_the_end_of_each_epoch_is_told_and_its_state_survives_a_stop_bit_for_bit(load_clip, tmp_path):
    epochs_seen = []
    config = averaging(epochs_seen)(class_names=CLASS_NAMES)

    def model():
        torch.manual_seed(0)
        return get_peft_model(load_clip(), config)

    whole, images = model(), images_of(load_clip())
    options = TrainingConfig(batch_size=4, epochs=4, keep_checkpoints=9)
    train(whole, images, options, Accelerator(cpu=True), tmp_path / "whole")
    assert epochs_seen == [(0, 4), (1, 4), (2, 4), (3, 4)]
    for checkpoint in (tmp_path / "whole").glob("checkpoint-[68]"):  # as if it had been killed after two epochs
        checkpoint.rename(tmp_path / checkpoint.name)
    resumed = model()
    train(resumed, images, options, Accelerator(cpu=True), tmp_path / "whole", resume=True)
    assert epochs_seen[4:] == [(2, 4), (3, 4)]
    assert torch.equal(resumed.learner.head.weight, whole.learner.head.weight)


def staged(begun):
    """Two stages with weights, learning rate and optimizer of their own: what 2SFS needs."""

    def stages(self):
        return [
            Stage(0.5, lambda name: name.startswith("head.bias")),
            Stage(0.5, lambda name: name.startswith("head.weight"), {"optimizer": "sgd", "learning_rate": 1.0}),
        ]

    def begin_stage(self, encoder, stage):
        begun.append((stage, self.head.weight.clone(), self.head.bias.clone()))

    return define("Staged", LinearProbeConfig, LinearProbe, stages=stages, begin_stage=begin_stage)


def test_stages_train_their_own_weights_one_after_the_other(load_clip, tmp_path):
    begun = []
    config = staged(begun)(class_names=CLASS_NAMES)
    torch.manual_seed(0)
    model = get_peft_model(load_clip(), config)
    images, options = images_of(load_clip()), TrainingConfig(batch_size=4, epochs=4, keep_checkpoints=9)
    history = train(model, images, options, Accelerator(cpu=True), tmp_path / "whole")
    assert [stage for stage, *_ in begun] == [0, 1]
    (_, weight_0, bias_0), (_, weight_1, bias_1) = begun
    assert torch.equal(weight_0, weight_1)
    assert not torch.equal(bias_0, bias_1)
    assert torch.equal(model.learner.head.bias, bias_1)
    assert not torch.equal(model.learner.head.weight, weight_1)
    assert [row["step"] for row in history] == [2, 4, 6, 8]
    assert all(parameter.requires_grad for parameter in model.learner.parameters())
    # Killed in either stage and at its very end, it goes on as if nothing had been.
    for step in (2, 4, 6):
        folder = tmp_path / f"from {step}"
        folder.mkdir()
        (folder / f"checkpoint-{step}").symlink_to(tmp_path / "whole" / f"checkpoint-{step}")
        torch.manual_seed(0)
        resumed = get_peft_model(load_clip(), config)
        train(resumed, images, options, Accelerator(cpu=True), folder, resume=True)
        assert torch.equal(resumed.learner.head.weight, model.learner.head.weight), step


@pytest.mark.parametrize(
    ("stages", "steps", "message"),
    [
        ([Stage(0.5), Stage(0.4)], 10, "the shares must add up to 1"),
        ([Stage(0.9), Stage(0.1)], 1, "give each stage a step"),
        ([Stage(0.5), Stage(0.5, lambda name: name == "haed")], 4, r"`stages\[1\].trains` accepts none of \['head'\]"),
        ([Stage(changes={"batch_size": 2})], 4, r"`stages\[0\].changes` has 'batch_size'; what a stage may change is"),
        ([Stage(changes={"learning_rate": -1.0})], 4, "`learning_rate`=-1.0: choose a number above 0"),
    ],
)
def test_stages_that_cannot_be_trained_are_refused_before_the_first_step(stages, steps, message):
    with pytest.raises(ValueError, match=message):
        plan(stages, steps, ["base_model.model.prompts.learners.default.head"], TrainingConfig())


def test_a_training_that_fails_leaves_all_weights_trainable(load_clip, tmp_path, monkeypatch):
    model = get_peft_model(load_clip(), staged([])(class_names=CLASS_NAMES))
    monkeypatch.setattr("hf_tgpt.training.loop.train_epoch", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(model, tmp_path)
    assert all(parameter.requires_grad for parameter in model.learner.parameters())


def validated(model, folder, **options):
    """Trains with a validation that cannot tell one epoch from another: the first would be the best."""
    accelerator = Accelerator(cpu=True)
    with torch.no_grad():
        model.learner.head.weight.zero_()
        model.learner.head.bias[0] = 1.0  # always the answer, at so small a rate
    loader = evaluation_loader(images_of(model.get_base_model()), accelerator)
    options = {"batch_size": 4, "epochs": 2, "optimizer": "sgd", "learning_rate": 1e-6} | options
    train(model, images_of(model.get_base_model()), TrainingConfig(**options), accelerator, folder, validation=loader)


def test_the_best_epoch_is_one_of_the_last_stage(load_clip, tmp_path):
    begun = []

    def stages(self):
        return [Stage(0.5, lambda name: name == "head.bias"), Stage(0.5, lambda name: name == "head.weight")]

    def begin_stage(self, encoder, stage):
        begun.append(self.head.weight.clone())

    config = define("LastStage", LinearProbeConfig, LinearProbe, stages=stages, begin_stage=begin_stage)
    model = get_peft_model(load_clip(), config(class_names=CLASS_NAMES))
    validated(model, tmp_path)
    assert not torch.equal(model.learner.head.weight, begun[1])


def test_the_best_epoch_has_the_state_that_it_had(load_clip, tmp_path):
    config = averaging()
    model = get_peft_model(load_clip(), config(class_names=CLASS_NAMES))
    seen = []

    def note(module, args):
        if not module.training:
            seen.append(module.total.clone())

    model.learner.register_forward_pre_hook(note)
    validated(model, tmp_path)
    assert torch.equal(model.learner.total, seen[0])  # of the first epoch, as its weights are


def test_a_method_may_end_with_what_its_last_epoch_leaves(load_clip, tmp_path):
    left = []

    def end_of_epoch(self, epoch, epochs):
        if epoch == epochs - 1:
            with torch.no_grad():
                self.head.bias.fill_(7)
        left.append(self.head.weight.clone())

    config = define("Last", LinearProbeConfig, LinearProbe, end_of_epoch=end_of_epoch, last_epoch_is_result=True)
    model = get_peft_model(load_clip(), config(class_names=CLASS_NAMES))
    validated(model, tmp_path)
    assert model.learner.head.bias.eq(7).all()
    assert torch.equal(model.learner.head.weight, left[-1])


def test_a_method_that_is_fitted_and_not_trained_keeps_what_it_was_fitted_to(load_clip, tmp_path):
    def init(self, config, encoder):
        PromptLearner.__init__(self, config, encoder)
        self.means = torch.nn.Buffer(torch.zeros(len(config.class_names), encoder.shape()["projection_width"]))

    def fit(self, encoder, data, validation, steps):
        for label in range(len(self.means)):
            self.means[label] = unit(data.states[0, data.labels == label]).mean(0)
        return []

    def forward(self, encoder, pixel_values, labels=None, class_texts=None, image_states=None, **kwargs):
        states = encode_image(encoder, pixel_values) if image_states is None else image_states
        return ImageClassifierOutput(logits=100 * unit(states) @ self.means.T)

    config = define(
        "Means", LinearProbeConfig, LinearProbe, __init__=init, fit=fit, forward=forward, linear_head=lambda *_: None
    )
    config.trains = False
    model = get_peft_model(load_clip(), config(class_names=CLASS_NAMES))
    assert train(model, images_of(load_clip()), TrainingConfig(), Accelerator(cpu=True), tmp_path / "run") == []
    assert model.learner.means.any(dim=1).all()
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(load_clip(), tmp_path / "adapter")
    assert torch.equal(again.learner.means, model.learner.means)


def test_hooks_are_empty_by_default(load_clip):
    model = get_peft_model(load_clip(), IVLPConfig(class_names=CLASS_NAMES, text_prompt_depth=1, vision_prompt_depth=1))
    learner = model.learner
    assert learner.stages() == [Stage()]
    assert learner.training_state() == {}
    assert learner.end_of_epoch(0, 1) is learner.begin_stage(None, 0) is None
    assert type(learner).fit is PromptLearner.fit


# Methods of other packages --------------------------------------------------------------------------------------------

PACKAGE = """
from hf_tgpt.adapters.registry import register
from hf_tgpt.methods.coop import CoOp, CoOpConfig
from hf_tgpt.utils.fields import checked, documented

@checked
class BorrowedConfig(CoOpConfig):
    strength: float = documented(1.0, "Of a borrowed idea.")

class Borrowed(CoOp):
    pass

register("BORROWED", BorrowedConfig, Borrowed)
"""


def test_a_method_of_another_package_is_found_by_its_entry_point(tmp_path):
    (tmp_path / "borrowed.py").write_text(PACKAGE)
    for name, value in (("borrowed", "borrowed"), ("broken", "no_such_module")):
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[hf_tgpt.methods]\n{name} = {value}\n")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    command = [
        sys.executable, "-m", "hf_tgpt", "train", "--method", "borrowed", "--strength", "2", "--max_steps", "1",
        "--batch_size", "2", "--shots", "1", "--output_dir", str(tmp_path / "run"), "--dataset", str(tmp_path / "few"),
        "--model", "toy",
    ]  # fmt: skip
    for place in ("train/ant", "train/bee", "test/ant", "test/bee"):
        (tmp_path / "few" / place).mkdir(parents=True)
        PILImage.new("RGB", (8, 8), (len(place), place.count("e"), 0)).save(tmp_path / "few" / place / "0.png")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert "The method 'broken' of the package 'broken' cannot be used (ModuleNotFoundError" in done.stderr
    assert '"strength": 2.0' in (tmp_path / "run" / "adapter_config.json").read_text()


def test_a_method_may_be_registered_twice_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        averaging()
        averaging()
