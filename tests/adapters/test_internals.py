"""What is used of other libraries beyond their documented interface, each in a test that says what to do if it changes.

A new release that breaks one of these is to be read, and the file that is named to be adapted, before pyproject.toml
allows its version.
"""

import argparse
import inspect
import json
from dataclasses import dataclass, field

import pytest
import torch
from accelerate import Accelerator
from conftest import CLASS_NAMES, METHODS, ImageProcessor, pixels
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import get_device_states
from transformers import CLIPModel, HfArgumentParser

from hf_tgpt.adapters.prompted import SLOT
from hf_tgpt.adapters.tuner import PromptTuner
from hf_tgpt.encoders import encoder_of
from hf_tgpt.encoders.loading import REVISION
from hf_tgpt.utils.compat import before


def takes(function, *names):
    """Whether the function has arguments of these names, in this order."""
    found = list(inspect.signature(function).parameters)
    return [name for name in found if name in names] == list(names)


def test_peft_finds_a_method_in_its_mappings_by_what_a_file_calls_it(tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "MAPLE", "class_names": CLASS_NAMES}))
    assert type(PeftConfig.from_pretrained(str(tmp_path))) is METHODS["maple"].config_class, (
        "PEFT looks for its methods elsewhere than in peft.mapping's dictionaries: see hf_tgpt/adapters/registry.py."
    )


# In their place hf_tgpt/adapters/peft_hooks.py has functions for PEFT before 0.21.
STATE_HOOKS = [
    ("_remove_adapter_name_from_key", ["key", "adapter_name"]),
    ("_remap_adapter_state_dict_for_load", ["model", "config", "adapter_name", "state_dict"]),
]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("_prepare_adapter_config", ["peft_config", "model_config"]),
        ("_prepare_model", ["peft_config", "model"]),
        ("_check_target_module_exists", ["peft_config", "key"]),
        ("_create_and_replace", ["peft_config", "adapter_name", "target", "target_name", "parent", "current_key"]),
        ("_check_merge_allowed", []),
        ("_unload_and_optionally_merge", ["merge"]),
        *([] if before("peft", "0.21") else STATE_HOOKS),
    ],
)
def test_peft_calls_a_tuner_by_these_methods(name, arguments):
    theirs, ours = getattr(BaseTuner, name, None), PromptTuner.__dict__[name]
    assert theirs is not None, (
        f"BaseTuner.{name} is gone: find what PEFT calls now and move it in hf_tgpt/adapters/tuner.py."
    )
    assert takes(theirs, *arguments), f"BaseTuner.{name} takes other arguments: follow it in hf_tgpt/adapters/tuner.py."
    assert takes(getattr(ours, "__func__", ours), *arguments)


def test_peft_prepares_a_model_before_it_lists_its_modules(adapt):
    model = adapt(METHODS["coop"])
    assert list(model.base_model.model.get_submodule(SLOT).learners) == ["default"], (
        "PEFT no longer finds a child that _prepare_model has added: attach it earlier, hf_tgpt/adapters/tuner.py."
    )
    assert isinstance(model.base_model.model.get_submodule(SLOT), BaseTunerLayer)


def test_peft_calls_the_base_models_forward(adapt, monkeypatch):
    model, calls = adapt(METHODS["coop"]), []
    monkeypatch.setattr(type(model.get_base_model()), "forward", lambda self, **kwargs: calls.append(kwargs))
    model(pixel_values=None)
    assert calls == [{"pixel_values": None}], (
        "PeftModel.forward no longer hands over: see PromptedModel.forward, hf_tgpt/adapters/prompted.py."
    )


def test_peft_saves_what_hangs_on_a_tuner_layer_without_the_adapters_name(adapt):
    keys = get_peft_model_state_dict(adapt(METHODS["maple"]))
    assert len(keys) == METHODS["maple"].parameters, (
        "PEFT saves other tensors of a tuner layer: see PromptSlot, hf_tgpt/adapters/prompted.py."
    )
    assert not any("default" in key for key in keys)


def test_peft_publishes_by_push_to_hub():
    assert takes(PeftModel.push_to_hub, "repo_id", "token"), (
        "PeftModel.push_to_hub, which is replaced for our adapters, takes other arguments: see "
        "hf_tgpt/adapters/peft_hooks.py."
    )


def test_peft_asks_about_the_vocabulary_by_a_fourth_argument_of_save_pretrained():
    names = list(inspect.signature(PeftModel.save_pretrained).parameters)
    assert names.index("save_embedding_layers") == 4, (
        "PeftModel.save_pretrained, which is replaced for our adapters, takes other arguments: see "
        "hf_tgpt/adapters/peft_hooks.py."
    )


@pytest.mark.parametrize(
    "path",
    [
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
        "text_model.encoder.layers",
        "text_model.final_layer_norm",
        "text_model.config._attn_implementation",
        "text_projection",
        "vision_model.embeddings.class_embedding",
        "vision_model.embeddings.patch_embedding",
        "vision_model.pre_layrnorm",
        "vision_model.encoder.layers",
        "vision_model.post_layernorm",
        "visual_projection",
        "logit_scale",
    ],
)
def test_transformers_clip_has_this_part(path, load_clip):
    part = load_clip()
    for name in path.split("."):
        assert hasattr(part, name), f"CLIPModel has no {path!r} any more: follow the name in hf_tgpt/encoders/base.py."
        part = getattr(part, name)


def test_transformers_clip_layers_turn_hidden_states_into_hidden_states(load_clip):
    clip = load_clip()
    encoder = encoder_of(clip)
    for tower, layers in ((clip.text_model, encoder.text_layers()), (clip.vision_model, encoder.image_layers())):
        hidden = torch.zeros(1, 2, tower.config.hidden_size)
        out = layers[0](hidden, None)
        assert isinstance(out, torch.Tensor), (
            "A CLIP layer returns something else: follow it in hf_tgpt/encoders/base.py."
        )
        assert out.shape == hidden.shape


def test_transformers_says_attention_implementations_by_these_names(load_clip):
    clip = load_clip()
    assert clip.config._attn_implementation == "sdpa", (
        "The default attention has another name: see hf_tgpt/encoders/base.py."
    )
    clip.set_attn_implementation("eager")
    assert clip.text_model.config._attn_implementation == "eager"


def test_transformers_marks_a_model_that_its_own_load_adapter_gave_an_adapter(adapt, load_clip, tmp_path):
    adapt(METHODS["coop"]).save_pretrained(tmp_path)
    clip = load_clip()
    clip.load_adapter(str(tmp_path))
    assert clip.__dict__["_hf_peft_config_loaded"] is True, (
        "load_adapter leaves another mark: see detach, hf_tgpt/adapters/prompted.py."
    )


def test_transformers_clip_outputs_features_under_these_names(load_clip):
    clip = load_clip()
    out = CLIPModel.forward(clip, input_ids=torch.tensor([[0, 2, 1]]), pixel_values=pixels(clip))
    for name in ("logits_per_image", "logits_per_text", "text_embeds", "image_embeds"):
        assert name in out, f"CLIP's answer has no {name!r}: follow it in hf_tgpt/adapters/prompted.py."
    features = clip.get_image_features(pixels(clip))
    answer = features if before("transformers", "5") else features["pooler_output"]
    assert isinstance(answer, torch.Tensor), "get_image_features answers in another form."


def test_transformers_has_an_image_processor_without_torchvision():
    processor = ImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    for name in ("size", "crop_size", "image_mean", "image_std", "resample", "do_center_crop"):
        assert hasattr(processor, name), f"the image processor has no {name!r}: see hf_tgpt/data/images.py."


def test_torch_says_which_ddp_model_is_running():
    assert DistributedDataParallel._get_active_ddp_module() is None, (
        "DistributedDataParallel tells it in another way: see hf_tgpt/encoders/shares.py."
    )


def test_accelerate_skips_batches_by_a_loader_that_takes_an_epoch():
    accelerator = Accelerator(cpu=True)
    loader = accelerator.prepare(torch.utils.data.DataLoader(list(range(4)), batch_size=1))
    rest = accelerator.skip_first_batches(loader, 2)
    assert hasattr(rest, "set_epoch"), (
        "skip_first_batches returns a loader without set_epoch: see hf_tgpt/training/loop.py."
    )
    assert [int(batch) for batch in rest] == [2, 3]


def test_accelerate_lets_a_hook_take_the_models_out_of_a_checkpoint(tmp_path):
    accelerator, seen = Accelerator(cpu=True), []
    accelerator.prepare(torch.nn.Linear(1, 1))

    def hook(models, weights, folder):
        seen.append(len(weights))
        weights.clear()

    accelerator.register_save_state_pre_hook(hook)
    accelerator.save_state(tmp_path / "state")
    assert seen == [1]
    assert not list((tmp_path / "state").glob("*.safetensors")), (
        "a checkpoint holds the whole model again: see adapter_checkpoints, hf_tgpt/training/checkpoint.py."
    )


def test_torch_counts_the_changes_of_a_tensor():
    tensor = torch.zeros(2)
    before = tensor._version
    tensor.add_(1)
    assert tensor._version > before, "Class features that are kept would go stale: see hf_tgpt/texts/kept.py."


def test_torch_tells_the_random_states_of_devices():
    assert get_device_states(torch.zeros(2)) == ([], []), (
        "Dropout would not drop the same again in a chunk's second pass: see hf_tgpt/encoders/chunks.py."
    )


def test_transformers_saves_no_commit_in_a_models_config(load_clip):
    config = load_clip().config
    setattr(config, REVISION, "abc")
    assert REVISION not in config.to_dict(), "A commit noted in a config would be saved: hf_tgpt/encoders/loading.py."


def test_transformers_parser_puts_a_dataclass_into_a_group_of_its_name():
    @dataclass
    class Options:
        """Options."""

        _argument_group_name = "of mine"
        shots: int = field(default=16, metadata={"help": "pictures"})

    assert "of mine:" in HfArgumentParser(Options).format_help(), "help has no groups: see hf_tgpt/cli/arguments.py."


def test_argparse_asks_a_formatter_for_the_help_of_an_option():
    class Formatter(argparse.HelpFormatter):
        def _get_help_string(self, action):
            return "another text"

    parser = argparse.ArgumentParser(formatter_class=Formatter)
    parser.add_argument("--shots", help="pictures")
    assert "another text" in parser.format_help(), "help tells no defaults: see _Help, hf_tgpt/cli/arguments.py."
