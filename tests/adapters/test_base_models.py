"""Base models that are not a plain CLIPModel in floating point."""

import pytest
import torch
from conftest import CLASS_NAMES, METHODS, pixels
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPModel


class OurCLIP(CLIPModel):
    """What somebody has built on CLIP."""


@pytest.fixture
def our_clip(load_clip):
    """our_clip() -> a model of a class derived from CLIPModel."""

    def make():
        plain = load_clip()
        model = OurCLIP(plain.config).eval()
        model.load_state_dict(plain.state_dict())
        return model

    return make


def test_a_class_derived_from_clip_takes_every_method(method, our_clip, adapt, tmp_path):
    expected = adapt(method)
    expected.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(our_clip(), tmp_path).eval()
    assert isinstance(model.get_base_model(), OurCLIP)
    with torch.no_grad():
        assert torch.equal(model(pixels(expected)).logits, expected(pixels(expected)).logits)
    assert type(model.unload()) is OurCLIP


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_base_model_quantised_by_torch_ao_is_refused_by_name(method, adapt, load_clip, tmp_path):
    adapt(method).save_pretrained(tmp_path)
    clip = torch.ao.quantization.quantize_dynamic(load_clip().eval(), {nn.Linear}, dtype=torch.qint8)
    for put in (
        lambda: get_peft_model(clip, method.config(class_names=CLASS_NAMES)),
        lambda: PeftModel.from_pretrained(clip, tmp_path),
    ):
        with pytest.raises(ValueError, match=r"`model`: its layer '.*' is quantised by torch.ao \(Linear\)"):
            put()
        assert type(clip) is CLIPModel


class Packed(torch.Tensor):
    """A weight of a type of its own, as torchao and FSDP have it: it multiplies, and cannot be looked at."""

    @classmethod
    def __torch_function__(cls, function, types, arguments=(), options=None):
        if function in (torch.Tensor.flatten, torch.Tensor.tolist):
            raise NotImplementedError(function)
        return super().__torch_function__(function, types, arguments, options or {})


def test_a_base_model_whose_weights_cannot_be_looked_at_is_no_other_model(adapt, load_clip, tmp_path):
    expected = adapt(METHODS["coop"])
    expected.save_pretrained(tmp_path)
    clip = load_clip()
    for layer in (clip.visual_projection, clip.text_projection):
        layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    model = PeftModel.from_pretrained(clip, tmp_path).eval()
    with torch.no_grad():
        assert torch.equal(model(pixels(expected)).logits, expected(pixels(expected)).logits)
