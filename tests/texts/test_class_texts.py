"""Class features are computed once in evaluation and never served stale."""

import pytest
import torch
from conftest import METHODS, pixels, shake
from peft import get_peft_model_state_dict, set_peft_model_state_dict

OPEN = {name: method for name, method in METHODS.items() if method.open and not method.conditioned}


@pytest.fixture(params=OPEN)
def model(request, adapt):
    model = adapt(OPEN[request.param])
    with torch.no_grad():
        model(pixels(model))  # fills the cache
    return model


def fresh_logits(model):
    """The logits without any help of what is kept."""
    model.learner.forget()
    return logits(model)


@torch.no_grad()
def logits(model):
    return model(pixels(model)).logits


@pytest.fixture
def count(monkeypatch, model):
    """How often the text tower is asked."""
    calls = []
    original = type(model.learner).text_features
    monkeypatch.setattr(type(model.learner), "text_features", lambda *args: calls.append(1) or original(*args))
    return calls


def test_class_texts_are_encoded_once_for_many_batches(model, count):
    for _ in range(3):
        logits(model)
    assert len(count) == 0


def test_training_of_vision_prompts_encodes_the_class_texts_once(adapt, monkeypatch):
    model, calls = adapt(OPEN["ivlp"], text_prompt_length=0).train(), []
    original = type(model.learner).text_features
    monkeypatch.setattr(type(model.learner), "text_features", lambda *args: calls.append(1) or original(*args))
    for _ in range(3):
        change_by_an_optimizer_step_in_evaluation_mode(model)
    assert len(calls) == 1


def test_gradients_reach_a_text_tower_that_is_trained(adapt):
    model = adapt(OPEN["maple"]).requires_grad_(False)
    weight = model.get_base_model().text_model.final_layer_norm.weight.requires_grad_()
    model(pixels(model)).logits.sum().backward()
    assert weight.grad is not None


def test_gradients_flow_in_evaluation_mode_too(model, count):
    model.learner.forget()
    model(pixels(model)).logits.sum().backward()
    assert len(count) == METHODS[model.learner.config.method.lower()].prompts  # else no weight is in the texts
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_features_made_in_inference_mode_serve_outside_of_it(model):
    model.learner.forget()
    with torch.inference_mode():
        model(pixels(model))
    model.requires_grad_(False)
    pictures = pixels(model).requires_grad_()
    model(pictures).logits.sum().backward()
    assert pictures.grad is not None


def change_by_training(model):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(pixels(model), torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()
    model.eval()


def change_by_an_optimizer_step_in_evaluation_mode(model):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
    model(pixels(model), torch.tensor([0, 1, 2])).loss.backward()
    optimizer.step()


def change_by_loading(model):
    set_peft_model_state_dict(model, {n: v + 0.1 for n, v in get_peft_model_state_dict(model).items()})


def change_by_class_names(model):
    model.set_class_names(["forest", "zigzag texture", "cat", "red circle"])


def change_by_another_adapter(model):
    model.add_adapter("other", model.peft_config["default"])
    model.set_adapter("other")
    shake(model)


def change_by_dtype(model):
    model.double()


def change_of_the_base_models_text_tower(model):
    with torch.no_grad():
        model.get_base_model().text_model.final_layer_norm.weight.mul_(torch.rand(32))


@pytest.mark.parametrize("change", [value for name, value in list(globals().items()) if name.startswith("change_")])
def test_no_stale_features_after(model, change):
    before = logits(model)
    change(model)
    after = logits(model)
    assert not torch.equal(after, before)
    assert torch.equal(after, fresh_logits(model))


def test_switching_back_gives_the_first_adapters_logits(model):
    before = logits(model)
    change_by_another_adapter(model)
    logits(model)
    model.set_adapter("default")
    assert torch.equal(logits(model), before)
