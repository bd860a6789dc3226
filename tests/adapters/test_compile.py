"""torch.compile with its default backend, as a user of it has it, which takes a minute: HF_TGPT_COMPILE=1.

The matrix of methods, with a backend that is ready in a second, is in test_promises.py.
"""

import copy
import os
import shutil

import pytest
import torch
from conftest import METHODS, pixels

COMPILER = os.environ.get("CXX", "g++")
LABELS = torch.tensor([0, 3, 1])


@pytest.mark.skipif(not os.environ.get("HF_TGPT_COMPILE"), reason="takes a minute; asked for by HF_TGPT_COMPILE=1")
@pytest.mark.skipif(shutil.which(COMPILER) is None, reason=f"needs the C++ compiler {COMPILER}")
# Parts of the text side run as they are, which Dynamo mentions; and torch's own use of what Python is giving up.
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_model_trains_and_evaluates_alike(adapt, monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # nothing stays from run to run
    torch.compiler.reset()
    plain = adapt(METHODS["maple"], text_chunk_size=2)  # two of the four classes are computed again
    model = copy.deepcopy(plain)
    compiled = torch.compile(model)
    inputs = {"pixel_values": pixels(plain), "labels": LABELS}
    losses = []
    for adapter, call in ((plain, plain), (model, compiled)):
        optimizer = torch.optim.SGD([p for p in adapter.parameters() if p.requires_grad], lr=0.1)
        adapter.train()
        losses.append(call(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        adapter.eval()
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for found, expected in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        found, expected = (call(pixel_values=pixels(plain)).logits for call in (compiled, plain))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
