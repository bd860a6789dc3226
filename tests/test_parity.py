"""Parity with the released research code: its parameters give its logits, losses and gradients.

The golden files hold what each release computes in float32 on the small CLIP in `golden/clip`.
"""

import json

import pytest
import torch
from conftest import GOLDEN
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_tgpt import config_class, convert_original_state_dict, convert_to_original_state_dict
from hf_tgpt.references import zero_shot_head
from hf_tgpt.towers import encode_image, logit_scale, unit

TOLERANCE = dict(atol=5e-5, rtol=0)
CASES = [
    "maple_ctx2_depth1",
    "maple_ctx2_depth3",
    "maple_ctx4_depth2",
    "tgpt_cat8_con12",
    "tgpt_cat32_con64",
    "coop_ctx4",
    "coop_ctx8",
    "coop_ctx4_csc",
    "coop_ctx4_front",
    "coop_ctx4_middle",
    "cocoop_ctx4",
    "ivlp_ctx2_depth3",
]
# From a case's metadata, which is the release's config, to our fields.
FIELDS = {
    "maple": lambda case: dict(prompt_length=int(case["n_ctx"]), prompt_depth=int(case["depth"])),
    "tgpt": lambda case: dict(
        templates=case["templates"],
        num_category_queries=int(case["n_category"]),
        num_content_queries=int(case["n_content"]),
    ),
    "coop": lambda case: dict(
        prompt_length=int(case["n_ctx"]),
        initial_text=case.get("ctx_init"),
        class_specific=case.get("csc", False),
        class_position=case.get("pos", "end"),
    ),
    "cocoop": lambda case: dict(prompt_length=int(case["n_ctx"])),
    "ivlp": lambda case: dict(
        text_prompt_length=int(case["n_ctx"]),
        vision_prompt_length=int(case["n_ctx_vision"]),
        text_prompt_depth=int(case["depth"]),
        vision_prompt_depth=int(case["depth"]),
    ),
}


class Case:
    def __init__(self, name):
        path = GOLDEN / f"{name}.safetensors"
        self.method = name.split("_")[0]
        self.tensors = load_file(path)
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
        self.metadata = {key: value if key == "template" else json.loads(value) for key, value in metadata.items()}

    def __getitem__(self, name):
        return self.tensors[name]

    def group(self, prefix):
        return {n.removeprefix(prefix): t for n, t in self.tensors.items() if n.startswith(prefix)}

    def config(self):
        fields = FIELDS[self.method](self.metadata)
        return config_class(self.method)(class_names=self.metadata["class_names"], **fields)

    def model(self):
        """The golden CLIP with this case's adapter and the release's weights in it."""
        model = get_peft_model(CLIPModel.from_pretrained(GOLDEN / "clip"), self.config())
        load = set_peft_model_state_dict(model, convert_original_state_dict(self.group("param."), self.method))
        assert not load.unexpected_keys
        return model

    def inputs(self):
        captions = {"caption_ids": self["caption_ids"]} if self.method == "tgpt" else {}
        return dict(pixel_values=self["pixel_values"], labels=self["labels"], **captions)


@pytest.fixture(params=CASES)
def case(request):
    return Case(request.param)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_loss_are_the_releases(case, mode):
    output = case.model().train(mode == "train")(**case.inputs())
    torch.testing.assert_close(output.logits, case["logits"], **TOLERANCE)
    torch.testing.assert_close(output.loss, case["loss"], **TOLERANCE)


def test_every_gradient_is_the_releases(case):
    model = case.model()
    model(**case.inputs()).loss.backward()
    ours = {n.replace(".default.", "."): p.grad for n, p in model.named_parameters() if p.requires_grad}
    theirs = convert_original_state_dict(case.group("grad."), case.method)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        torch.testing.assert_close(ours[name], gradient, **TOLERANCE, msg=lambda text, name=name: f"{name}: {text}")


def test_released_tensors_survive_the_way_to_our_names_and_back(case):
    ours = get_peft_model_state_dict(case.model())
    back = convert_to_original_state_dict(ours, case.method)
    unused = set(case.metadata.get("no_grad_params", []))
    assert back.keys() == case.group("param.").keys() - unused
    assert all(torch.equal(value, case[f"param.{name}"]) for name, value in back.items())


@pytest.mark.parametrize("name", [name for name in CASES if name.startswith("tgpt")])
def test_tgpt_losses_heads_and_features_are_the_releases(name):
    case = Case(name)
    model = case.model()
    torch.testing.assert_close(model.learner.zero_shot_head, case["zero_shot_head"], **TOLERANCE)
    output = model(**case.inputs())
    for part in ("loss_classification", "loss_category", "loss_content"):
        torch.testing.assert_close(output[part], case[part], **TOLERANCE)
    features = encode_image(model.get_base_model(), case["pixel_values"])
    # The golden image features carry no scale; compare directions.
    torch.testing.assert_close(unit(features), unit(case["image_features"]), **TOLERANCE)
    model.eval()
    model.learner.config.wise_ft = 0.5
    torch.testing.assert_close(model(case["pixel_values"]).logits, case["logits_wiseft"], **TOLERANCE)


def test_zero_shot_logits_are_clips():
    case = Case("zeroshot")
    clip = CLIPModel.from_pretrained(GOLDEN / "clip").eval()
    plain = clip(input_ids=case["input_ids"], pixel_values=case["pixel_values"]).logits_per_image
    torch.testing.assert_close(plain, case["logits"], **TOLERANCE)
    head = zero_shot_head(clip, case.metadata["class_names"], [case.metadata["template"]])
    ours = logit_scale(clip) * unit(encode_image(clip, case["pixel_values"])) @ head.T
    torch.testing.assert_close(ours, case["logits"], **TOLERANCE)


def test_class_dependent_buffers_of_a_release_are_left_out():
    case = Case("maple_ctx2_depth1")
    checkpoint = case.group("param.") | {"prompt_learner.token_prefix": torch.zeros(5, 1, 64)}
    assert len(convert_original_state_dict(checkpoint, "maple")) == 3


def test_a_checkpoint_of_another_method_is_refused():
    with pytest.raises(ValueError, match="has no tensor of a released tgpt checkpoint"):
        convert_original_state_dict({"something.weight": torch.zeros(1)}, "tgpt")
    with pytest.raises(ValueError, match=r"`method`='mapel' is unknown; choose one of .*maple.*tgpt"):
        convert_original_state_dict({}, "mapel")
