"""Bad input is refused before any work, in words that name the field, the value and the remedy."""

import json
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CLASS_NAMES, METHODS, READERS, pixels
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, CLIPTextConfig, CLIPTextModel

from hf_tgpt import MaPLeConfig, TGPTConfig, config_class, load_adapter, load_clip
from hf_tgpt.training import TrainingConfig


@pytest.mark.parametrize(
    ("class_names", "message"),
    [
        (None, "`class_names`=None: pass a list"),
        ([], r"`class_names`=\[\]: pass a list"),
        ("cat", "`class_names`='cat': pass a list"),
        (["cat", " "], r"`class_names\[1\]`=' ' is not a name"),
        (["cat", 3], r"`class_names\[1\]`=3 is not a name"),
        (["cat", "dog", "cat"], "holds 'cat' twice, as labels 0 and 2"),
        (["blue  jay", "dog", "Blue Jay "], "holds 'Blue Jay ' twice, as labels 0 and 2"),
    ],
)
def test_class_names_must_be_distinct_names(method, class_names, message):
    with pytest.raises(ValueError, match=message):
        method.config(class_names=class_names)


@pytest.mark.parametrize("names", [np.array(["cat", "dog"]), {"cat": 1, "dog": 2}.keys(), ("cat", "dog")])
def test_class_names_may_be_any_sequence(names):
    assert MaPLeConfig(class_names=names, tokenizer_name_or_path=Path("here")).to_dict()["class_names"] == [
        "cat",
        "dog",
    ]


def test_numbers_of_numpy_are_numbers():
    config = TrainingConfig(seed=np.int64(3), learning_rate=np.float32(0.5))
    assert (type(config.seed), type(config.learning_rate)) == (int, float)


def test_a_class_name_with_the_token_that_ends_sentences_is_named(reader, load_clip):
    with pytest.raises(ValueError, match=r"class name 'a<\|endoftext\|>b' contains '<\|endoftext\|>'"):
        get_peft_model(load_clip(), reader.config(class_names=["cat", "a<|endoftext|>b"]))


def test_a_class_name_beyond_the_context_is_named(reader, load_clip):
    long = " ".join(["cat"] * 40)
    clip = load_clip()
    with pytest.raises(
        ValueError, match=r"the class name 'cat cat .*' makes a sentence of 47 tokens .* context holds 30"
    ):
        get_peft_model(clip, reader.config(class_names=["forest", long]))
    assert type(clip) is CLIPModel  # a failed adapter leaves the model as it was


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(prompt_length=0), "`prompt_length`=0: learn at least 1 token"),
        (dict(prompt_length=-2), "`prompt_length`=-2"),
        (dict(prompt_depth=0), "`prompt_depth`=0: give prompts to at least 1 layer"),
    ],
)
def test_maple_lengths_and_depths_must_be_positive(fields, message):
    with pytest.raises(ValueError, match=message):
        MaPLeConfig(class_names=CLASS_NAMES, **fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_category_queries=0), "`num_category_queries`=0: learn at least 1 query"),
        (dict(num_content_queries=-1), "`num_content_queries`=-1"),
        (dict(label_smoothing=1.0), "`label_smoothing`=1.0: choose 0 to below 1"),
        (dict(wise_ft=1.5), "`wise_ft`=1.5: choose 0 to 1"),
        (dict(templates=[]), r"`templates`=\[\]: give a list of sentences"),
        (dict(templates=["a photo."]), "where the class name goes"),
        (dict(templates="a photo of a {}."), "`templates`='a photo of a {}.': give a list of sentences"),
    ],
)
def test_tgpt_fields_have_ranges(fields, message):
    with pytest.raises(ValueError, match=message):
        TGPTConfig(class_names=CLASS_NAMES, **fields)


@pytest.mark.parametrize(("shape", "tower", "layers"), [("plain", "text", 2), ("narrow_projection", "vision", 2)])
def test_prompts_deeper_than_a_tower_are_refused(load_clip, shape, tower, layers):
    with pytest.raises(
        ValueError, match=f"`prompt_depth`=3: the {tower} tower has {layers} layers; choose 1 to {layers}"
    ):
        get_peft_model(load_clip(shape), MaPLeConfig(class_names=CLASS_NAMES, prompt_depth=3))


def test_queries_beyond_the_context_are_refused(load_clip):
    with pytest.raises(ValueError, match="`num_content_queries`=64: the context of 30 leaves room for 27"):
        get_peft_model(load_clip(), TGPTConfig(class_names=CLASS_NAMES, num_category_queries=4))


@pytest.mark.parametrize(
    "name", [name for name in READERS if METHODS[name].open and METHODS[name].has("prompt_length")]
)
def test_prompts_that_do_not_fit_the_context_are_refused(load_clip, name):
    config = METHODS[name].config(prompt_length=27, initial_text=None)
    with pytest.raises(ValueError, match="`prompt_length`=27: the text tower's context of 30 leaves room for 26"):
        get_peft_model(load_clip(), config)


def test_initial_text_shorter_than_the_prompt_is_refused(load_clip):
    config = MaPLeConfig(class_names=CLASS_NAMES, prompt_length=6, prompt_depth=1)
    with pytest.raises(ValueError, match="`initial_text`='a photo of a' has 4 tokens but `prompt_length`=6"):
        get_peft_model(load_clip(), config)


def test_an_unknown_field_or_method_is_refused():
    with pytest.raises(TypeError, match="prompt_dept"):
        MaPLeConfig(class_names=CLASS_NAMES, prompt_dept=3)
    with pytest.raises(ValueError, match=r"`method`='coco' is unknown; choose one of .*maple.*tgpt"):
        config_class("coco")


def test_a_label_outside_the_class_list_is_refused(method, adapt):
    model = adapt(method)
    for label in (4, -100):
        with pytest.raises(ValueError, match=f"`labels` holds {label} but there are 4 classes, 0 to 3"):
            model(pixels(model), torch.tensor([0, label, 1]))


def test_pictures_of_another_size_are_refused(method, adapt):
    model = adapt(method)
    with pytest.raises(ValueError, match="pictures of 40x40 pixels but this model takes 32x32"):
        model(torch.zeros(1, 3, 40, 40))


def test_a_base_model_that_is_no_clip_is_refused(method, tmp_path):
    tower = CLIPTextModel(
        CLIPTextConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4)
    )
    towers = "prompt learning needs a transformers model with both towers, one of CLIPModel, MetaClip2Model"
    with pytest.raises(ValueError, match=f"The base model is a CLIPTextModel; {towers}"):
        get_peft_model(tower, method.config())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "vit"}))
    with pytest.raises(ValueError, match="is a 'vit' model, not a CLIP"):
        load_clip(tmp_path)
    with pytest.raises(ValueError, match="`model`='/no/such' is not a folder"):
        load_clip("/no/such")


def test_a_missing_or_unfit_tokenizer_is_named(reader, load_clip, tmp_path):
    clip = load_clip()
    clip.name_or_path = ""
    with pytest.raises(ValueError, match="`tokenizer_name_or_path`=None and the base model was not loaded from a name"):
        get_peft_model(clip, reader.config())
    with pytest.raises(ValueError, match="no tokenizer could be loaded from it"):
        get_peft_model(load_clip(), reader.config(tokenizer_name_or_path=str(tmp_path)))


def test_a_tokenizer_larger_than_the_vocabulary_is_refused(reader, load_clip, clip_folders, tmp_path):
    shutil.copytree(clip_folders["plain"], tmp_path / "clip")
    content = json.loads((tmp_path / "clip" / "tokenizer.json").read_text())
    content["model"]["vocab"]["extra"] = len(content["model"]["vocab"])
    (tmp_path / "clip" / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="has 91 tokens but the text tower has 90"):
        get_peft_model(load_clip(), reader.config(tokenizer_name_or_path=str(tmp_path / "clip")))


@pytest.mark.parametrize(("trained_on", "width"), [("plain", 32), ("legacy_eos", 64)])
def test_an_adapter_for_another_clip_says_which_dimension_differs(
    method, adapt, load_clip, tmp_path, trained_on, width
):
    adapt(method, trained_on).save_pretrained(tmp_path)
    message = f"made for another CLIP: .* has text_width {width}, this one 40"
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(load_clip("narrow_projection"), tmp_path)
    with pytest.raises(ValueError, match=message):
        load_clip("narrow_projection").load_adapter(tmp_path)


class TestAdapterFolder:
    @pytest.fixture
    def folder(self, adapt, tmp_path):
        adapt(METHODS["maple"]).save_pretrained(tmp_path)
        return tmp_path

    def test_missing(self, load_clip, tmp_path):
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config.json' at '.*nowhere'"):
            PeftModel.from_pretrained(load_clip(), tmp_path / "nowhere")

    def test_our_own_loader_names_what_is_wrong(self, folder, load_clip, tmp_path):
        (folder / "nowhere").mkdir()
        assert load_adapter(load_clip(), folder).learner.config.class_names == CLASS_NAMES
        with pytest.raises(ValueError, match=r"There is no adapter in '.*nowhere': adapter_config.json is missing"):
            load_adapter(load_clip(), folder / "nowhere")
        for content, message in (("", "is damaged"), ("{}", "is damaged"), ('{"peft_type": "LORA"}', "method 'LORA'")):
            (folder / "adapter_config.json").write_text(content)
            with pytest.raises(ValueError, match=message):
                load_adapter(load_clip(), folder)

    def test_half_written(self, folder, load_clip):
        (folder / "adapter_model.safetensors").unlink()
        with pytest.raises(ValueError, match=r"has no adapter_model.safetensors: it was not written to the end"):
            PeftModel.from_pretrained(load_clip(), folder)

    @pytest.mark.parametrize("keep", [0, 5, 3000])
    def test_truncated(self, folder, load_clip, keep):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(ValueError, match=r"is damaged .*; save or download the adapter again"):
            PeftModel.from_pretrained(load_clip(), folder)

    def test_a_failed_load_leaves_the_clip_as_it_was(self, folder, load_clip):
        tensors = load_file(folder / "adapter_model.safetensors")
        save_file({name: value[:1] for name, value in tensors.items()}, folder / "adapter_model.safetensors")
        clip = load_clip()
        with pytest.raises(ValueError, match="do not fit"):
            load_adapter(clip, folder)
        assert type(clip) is CLIPModel
        assert not [name for name, _ in clip.named_parameters() if "prompts" in name]
        assert all(parameter.requires_grad for parameter in clip.parameters())

    def test_with_a_tensor_missing(self, folder, load_clip):
        tensors = load_file(folder / "adapter_model.safetensors")
        del tensors["base_model.model.prompts.learners.couplings.1.bias"]
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"'couplings.1.bias' has shape none \(missing\) in the file"):
            PeftModel.from_pretrained(load_clip(), folder)

    @pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
    def test_with_a_pickle_for_weights(self, load, folder, load_clip):
        class Evil:
            def __reduce__(self):
                return Path.touch, (folder / "it-ran",)

        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(pickle.dumps(Evil()))  # under the trusted name
        with pytest.raises(ValueError, match="is damaged"):
            load(load_clip(), folder)
        weights.unlink()
        (folder / "adapter_model.bin").write_bytes(pickle.dumps(Evil()))
        with pytest.raises(ValueError, match=r"adapter_model.bin, a pickle, which may run code"):
            load(load_clip(), folder)
        assert not (folder / "it-ran").exists()

    @pytest.mark.parametrize("length", [100, 10**9, 2**63])
    def test_with_a_header_that_claims_more_than_there_is(self, length, folder, load_clip):
        weights = folder / "adapter_model.safetensors"
        weights.write_bytes(struct.pack("<Q", length) + b'{"a": 1}')
        with pytest.raises(ValueError, match=r"is damaged .*[Hh]eader"):
            load_adapter(load_clip(), folder)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    @pytest.mark.parametrize("load", [load_adapter, PeftModel.from_pretrained])
    def test_with_weights_that_are_no_numbers(self, load, value, folder, load_clip):
        tensors = load_file(folder / "adapter_model.safetensors")
        tensors["base_model.model.prompts.learners.text_prompts.1"][1, 3] = value
        save_file(tensors, folder / "adapter_model.safetensors")
        with pytest.raises(ValueError, match=r"contain NaN or infinity \('text_prompts.1'\): its training diverged"):
            load(load_clip(), folder)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"peft_type": "MAGIC"}, "of the method 'MAGIC', which neither hf_tgpt .*; update hf_tgpt"),
            ({"peft_type": ["MAPLE"]}, r"of the method \['MAPLE'\]"),
            ({"prompt_length": "two"}, "`prompt_length`='two': choose a value of type int"),
            ({"prompt_length": 10**12}, "`prompt_length`=1000000000000: the text tower's context of 30 leaves room"),
            ({"prompt_depth": 10**12}, "`prompt_depth`=1000000000000"),
            ({"class_names": 7}, r"`class_names`=7: pass a list with the name"),
            ({"class_names": None}, "`class_names`=None"),
            ({"base_model_dimensions": [1]}, r"`base_model_dimensions`=\[1\]: choose a value of type dict"),
            ({"base_model_fingerprint": "abc"}, "`base_model_fingerprint`='abc'"),
            ({"trained_on": "data"}, "`trained_on`='data'"),
            ({"revision": {"a": 1}}, "`revision`={'a': 1}: name a branch, tag or commit"),
            ({"base_model_name_or_path": [1]}, r"`base_model_name_or_path`=\[1\]"),
            ({"initial_text": 3}, "`initial_text`=3: choose a value of type str"),
        ],
    )
    def test_with_a_config_of_nonsense(self, fields, message, folder, load_clip):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | fields))
        with pytest.raises(ValueError, match=message):
            load_adapter(load_clip(), folder)

    def test_on_a_clip_of_the_same_shape_with_other_weights(self, folder, load_clip):
        clip = load_clip()
        with torch.no_grad():
            clip.text_projection.weight.add_(torch.randn(32, 32) * 0.01)
        with pytest.warns(UserWarning, match="was trained on a CLIP with other weights"):
            load_adapter(clip, folder)

    def test_on_its_own_clip_in_half_precision(self, folder, load_clip):
        for dtype in (torch.bfloat16, torch.float16):
            load_adapter(load_clip().to(dtype), folder)

    def test_with_another_prompt_length(self, folder, load_clip):
        config = json.loads((folder / "adapter_config.json").read_text())
        (folder / "adapter_config.json").write_text(json.dumps(config | {"prompt_length": 3}))
        with pytest.raises(
            ValueError, match=r"'text_prompts.0' has shape \(2, 32\) in the file and \(3, 32\) in the model"
        ):
            PeftModel.from_pretrained(load_clip(), folder)
