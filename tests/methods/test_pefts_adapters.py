"""`--method lora` takes PEFT's other adapters, CLIP-LoRA has its own scale, and 2SFS is layer norms and then a head."""

import json
import shutil

import pytest
import torch
from conftest import CLASS_NAMES, SHAPES, make_classifier, pixels, shake
from peft import LNTuningConfig, PeftModel, get_peft_model
from torch.nn import functional as F

import hf_tgpt
from hf_tgpt import LoRAConfig, TwoStageConfig, config_class, load_classifier, load_trained
from hf_tgpt.adapters.folder import digest_of_weights
from hf_tgpt.adapters.peft_towers import kinds_of_peft
from hf_tgpt.cli.info import describe_adapter
from hf_tgpt.training.checkpoint import trained_weights

pytestmark = pytest.mark.filterwarnings("ignore:Unsupported layer type .*LayerNorm")

LABELS = torch.tensor([0, 3, 1])
OTHERS = {
    "LN_TUNING": {},
    "IA3": {},
    "VERA": {"r": 4},
    "LOHA": {"r": 2, "target_modules": ["q_proj"]},
    "OFT": {"oft_block_size": 0, "r": 2},
    "LORA": {"use_dora": True, "r": 2, "target_modules": ["v_proj", "fc1"]},
}


@pytest.mark.parametrize("kind", OTHERS)
def test_any_of_pefts_adapters_learns_and_comes_back(kind, load_clip, tmp_path):
    fields = {"peft_type": kind, **OTHERS[kind]}
    model = make_classifier("lora", load_clip(), CLASS_NAMES, peft_config=json.dumps(fields))
    clip = model.get_base_model()
    loss = model.train()(pixels(clip), LABELS).loss
    optimizer = torch.optim.AdamW(trained_weights(model).values(), lr=1e-3)
    for _ in range(4):
        optimizer.zero_grad()
        model(pixels(clip), LABELS).loss.backward()
        optimizer.step()
    assert model.eval()(pixels(clip), LABELS).loss < loss
    model.save_pretrained(tmp_path)
    again = load_trained(load_clip(), tmp_path)
    with torch.no_grad():
        assert torch.equal(again(pixels(clip)).logits, model(pixels(clip)).logits)
        theirs = PeftModel.from_pretrained(load_clip(), tmp_path).eval()
        assert theirs.peft_config["default"].peft_type.value == kind
        plain = make_classifier("zero_shot", load_clip(), CLASS_NAMES).eval()
        untuned = make_classifier("zero_shot", model.untuned_encoder().model, CLASS_NAMES).eval()
        torch.testing.assert_close(untuned(pixels(clip)).logits, plain(pixels(clip)).logits)
        merged = make_classifier("zero_shot", model.merged_encoder().model, CLASS_NAMES).eval()
        torch.testing.assert_close(merged(pixels(clip)).logits, model(pixels(clip)).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ('{"peft_type": "MAPLE"}', "LN_TUNING"),
        ('{"peft_type": "PROMPT_TUNING"}', "types are"),
        ("[]", "give a JSON object"),
        ("{", "`peft_config`"),
        ({"r": 4}, "give a JSON object"),
        ({"peft_type": "IA3", "rank": 2}, "'rank', which is not a field of IA3Config"),
        ({"peft_type": "LORA", "r": 0}, "PEFT refuses this LoraConfig: .*`r`"),
    ],
)
def test_a_peft_config_that_cannot_be_used_is_refused(value, message, load_clip):
    with pytest.raises(ValueError, match=message):
        make_classifier("lora", load_clip(), CLASS_NAMES, peft_config=value)


def test_fields_of_lora_do_not_go_with_another_adapter():
    with pytest.raises(ValueError, match="`r`=4: `peft_config` replaces"):
        LoRAConfig(class_names=CLASS_NAMES, r=4, peft_config={"peft_type": "IA3"})
    assert {"LORA", "IA3", "VERA", "LN_TUNING"} <= kinds_of_peft().keys()


def test_clip_lora_scales_by_the_root_of_the_rank(load_clip):
    scales = {}
    for rslora in (False, True):
        model = make_classifier("lora", load_clip(), CLASS_NAMES, r=4, use_rslora=rslora)
        layers = (module for module in model.modules() if hasattr(module, "lora_A"))
        scales[rslora] = {layer.scaling["default"] for layer in layers}
    assert scales == {False: {0.25}, True: {0.5}}


def trained_two_stage(load_clip):
    model = make_classifier("two_stage", load_clip(), CLASS_NAMES)
    shake(model)
    model.learner.begin_stage(hf_tgpt.encoders.encoder_of(model.get_base_model()), 1)
    with torch.no_grad():
        model.learner.head.add_(torch.randn_like(model.learner.head))
    return model.eval()


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != "plain"])
@pytest.mark.parametrize("name", ["lora", "two_stage"])
def test_both_towers_of_every_family_learn_and_come_back(name, shape, load_clip, tmp_path):
    model = make_classifier(name, load_clip(shape), CLASS_NAMES)
    shake(model)
    clip = model.get_base_model()
    model.train()(pixels(clip), LABELS).loss.backward()
    learned = {key for key, weight in trained_weights(model).items() if weight.grad is not None and weight.grad.any()}
    assert {tower for tower in ("text_model", "vision_model") if any(tower in key for key in learned)} == {
        "text_model", "vision_model"
    }  # fmt: skip
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(load_trained(load_clip(shape), tmp_path)(pixels(clip)).logits, model(pixels(clip)).logits)


def test_the_first_stage_is_pefts_tuning_of_all_layer_norms(load_clip):
    model = make_classifier("two_stage", load_clip(), CLASS_NAMES)
    norms = [name for name, module in load_clip().named_modules() if isinstance(module, torch.nn.LayerNorm)]
    theirs = get_peft_model(load_clip(), LNTuningConfig(target_modules=norms))
    ours = trained_weights(model).keys()
    assert {name.removeprefix("model.") for name in ours - {"learner.head"}} == trained_weights(theirs).keys()
    first, second = model.learner.stages()
    assert first.share + second.share == 1
    assert first.share == 0.6
    assert {name for name in ours if first.trains(name)} == ours - {"learner.head"}
    assert {name for name in ours if second.trains(name)} == {"learner.head"}


def test_the_second_stage_starts_where_the_first_ends(load_clip):
    model = make_classifier("two_stage", load_clip(), CLASS_NAMES)
    shake(model)
    encoder = hf_tgpt.encoders.encoder_of(model.get_base_model())
    model.learner.begin_stage(encoder, 0)
    by_texts = model.eval()(pixels(encoder.model)).logits
    model.learner.begin_stage(encoder, 1)
    torch.testing.assert_close(model(pixels(encoder.model)).logits, by_texts)


def test_trained_classes_are_answered_by_the_head_and_others_by_the_tuned_tower(load_clip, tmp_path):
    model = trained_two_stage(load_clip)
    clip = model.get_base_model()
    tower = make_classifier("zero_shot", model.merged_encoder().model, ["dog", CLASS_NAMES[1], "tree"]).eval()
    with torch.no_grad():
        weights, _ = model.learner.linear_head(hf_tgpt.encoders.encoder_of(clip))
        torch.testing.assert_close(F.normalize(weights, dim=-1), F.normalize(model.learner.head, dim=-1))
        own, mixed = model(pixels(clip)).logits, ["dog", CLASS_NAMES[1], "tree"]
        asked = model(pixels(clip), class_texts=model.texts_for(mixed)).logits
        torch.testing.assert_close(asked[:, [0, 2]], tower(pixels(clip)).logits[:, [0, 2]])
        torch.testing.assert_close(asked[:, 1], own[:, 1])
        assert not torch.allclose(asked[:, 1], tower(pixels(clip)).logits[:, 1])
        model.set_class_names(mixed)
        torch.testing.assert_close(model(pixels(clip)).logits, asked)
        model.save_pretrained(tmp_path)
        assert torch.equal(load_trained(load_clip(), tmp_path)(pixels(clip)).logits, model(pixels(clip)).logits)


def test_two_stage_resumes_within_its_second_stage_and_needs_its_head(run_command, pictures, tmp_path):
    few = ["--method", "two_stage", "--dataset", pictures, "--model", "toy", "--shots", "2", "--batch_size", "4"]
    few += ["--max_steps", "5", "--keep_checkpoints", "9"]
    run, files = tmp_path / "run", ("adapter_model.safetensors", "head.safetensors")
    run_command("train", *few, "--output_dir", run)
    before = {name: (run / name).read_bytes() for name in files}
    shutil.rmtree(run / "checkpoint-5")
    assert (run / "checkpoint-4").is_dir()  # the second stage begins after step 3
    run_command("train", *few, "--output_dir", run, "--resume")
    assert {name: (run / name).read_bytes() for name in files} == before
    assert bool(load_classifier(run).model.learner.head_is_set)
    assert describe_adapter(run)["tensors"]["head"] == [2, 128]
    digest = digest_of_weights(run)
    (run / "head.safetensors").write_bytes(before["head.safetensors"] + b" ")
    assert digest_of_weights(run) != digest  # so that no calibration of another head is used
    (run / "head.safetensors").unlink()
    with pytest.raises(ValueError, match=r"head\.safetensors"):
        load_classifier(run)


def test_the_shares_of_two_stages_are_checked():
    with pytest.raises(ValueError, match="`stage_one_share`=1"):
        TwoStageConfig(class_names=CLASS_NAMES, stage_one_share=1.0)
    assert config_class("two-stage") is TwoStageConfig
