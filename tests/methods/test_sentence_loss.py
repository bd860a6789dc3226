"""The loss of a sentence is the cross entropy over the vocabulary, without its memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from hf_tgpt.methods import sentence_loss
from hf_tgpt.methods.sentence_loss import word_loss


@pytest.fixture
def spelt():
    """Prompts, targets and a vocabulary in double precision, with scores that exp cannot take as they are."""
    generator = torch.Generator().manual_seed(0)
    prompts, vocabulary = (torch.randn(*size, generator=generator).double() for size in ((10, 8), (30, 8)))
    prompts[0] *= 1000
    return prompts, torch.randint(30, (10,), generator=generator), vocabulary


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize(("rows", "words"), [(4, 7), (10, 30), (100, 100), (100, 1)])
@pytest.mark.parametrize("trained_vocabulary", [False, True])
def test_loss_and_gradients_are_those_of_cross_entropy(rows, words, smoothing, trained_vocabulary, spelt, monkeypatch):
    monkeypatch.setattr(sentence_loss, "ROWS", rows)
    monkeypatch.setattr(sentence_loss, "WORDS", words)
    prompts, targets, vocabulary = spelt
    weights = [prompts.requires_grad_(), *([vocabulary.requires_grad_()] if trained_vocabulary else [])]
    found = word_loss(prompts, targets, vocabulary, smoothing)
    expected = F.cross_entropy(prompts @ vocabulary.T, targets, label_smoothing=smoothing)
    pairs = zip(torch.autograd.grad(3 * found, weights), torch.autograd.grad(3 * expected, weights), strict=True)
    for a, b in [(found, expected), *pairs]:
        torch.testing.assert_close(a, b, atol=1e-10, rtol=1e-10)


def test_no_scores_are_kept_for_the_backward_pass(spelt):
    prompts, targets, vocabulary = spelt
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda t: t):
        word_loss(prompts.requires_grad_(), targets, vocabulary, 0.1)
    assert kept
    assert (10, 30) not in kept


class Largest(TorchDispatchMode):
    """Notes the most elements of a tensor that an operation gives, other than views."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        answer = function(*args, **(kwargs or {}))
        if isinstance(answer, torch.Tensor) and not answer._is_view():
            self.most = max(self.most, answer.numel())
        return answer


def test_memory_does_not_grow_with_the_prompts_or_the_vocabulary(monkeypatch):
    """As MetaCLIP 2's 901,629 words would make it."""
    monkeypatch.setattr(sentence_loss, "ROWS", 4)
    monkeypatch.setattr(sentence_loss, "WORDS", 50)
    prompts, vocabulary = torch.randn(40, 2, requires_grad=True), torch.randn(1000, 2)
    with Largest() as found:
        word_loss(prompts, torch.arange(40), vocabulary, 0.1).backward()
    assert found.most == 4 * 50


def test_bfloat16_is_near(spelt):
    prompts, targets, vocabulary = (t.float() if t.is_floating_point() else t for t in spelt)
    expected = F.cross_entropy(prompts[1:] @ vocabulary.T, targets[1:], label_smoothing=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        found = word_loss(prompts[1:], targets[1:], vocabulary, 0.1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.01)
    half = word_loss(prompts[1:], targets[1:], vocabulary.bfloat16(), 0.1)
    torch.testing.assert_close(half, expected, atol=0.05, rtol=0.01)
