"""Nothing is asked of the network that the user did not ask for: no telemetry, no counting of loads."""

import os
import subprocess
import sys

from conftest import CLASS_NAMES, ROOT
from peft import get_peft_model

from hf_tgpt import MaPLeConfig, load_clip

# Python itself tells of every connection and every name that is looked up, whatever becomes of the error.
SENTINEL = """
import sys, traceback
calls = []
def watch(event, arguments):
    forbidden = event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto")
    if forbidden and not isinstance(arguments[-1], (str, bytes)):  # the address of a Unix socket is a path
        calls.append(event + str(arguments) + "".join(traceback.format_stack(limit=12)))
        raise OSError(f"{event} in a flow that needs no network")
sys.addaudithook(watch)
"""
FLOW = """
import runpy
def run(script, *arguments):
    sys.argv = [script, *arguments]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        assert not end.code, end.code
import hf_tgpt
from hf_tgpt.cli.main import main
from hf_tgpt.data import load_splits
from PIL import Image
few = ["--max_steps", "2", "--shots", "1", "--batch_size", "2"]
own = ["--dataset", pictures, "--model", str(hf_tgpt.TOY_CLIP)]
run("examples/train.py", "--method", "coop", *own, *few, "--output_dir", f"{folder}/run")
assert main(["evaluate", f"{folder}/run", "--output", f"{folder}/evaluation.json"]) == 0
hf_tgpt.load_adapter(hf_tgpt.load_clip(hf_tgpt.TOY_CLIP), f"{folder}/run").save_pretrained(f"{folder}/again")
Image.new("RGB", (40, 40), "red").save(f"{folder}/picture.png")
for command in ("info", "predict", "export"):
    more = {"predict": ["picture.png"], "export": ["exported", "--format", "transformers"]}.get(command, [])
    more = [f"{folder}/{part}" if i == 0 else part for i, part in enumerate(more)]
    assert main([command, f"{folder}/run", *more]) == 0
for kind, mark in {"csv": ",", "tsv": "\\t"}.items():
    rows = [mark.join(["picture.png", name]) for name in "ab" for _ in range(3)]
    with open(f"{folder}/all.{kind}", "w") as file:
        file.write("\\n".join([mark.join(["image", "label"]), *rows]))
    assert len(load_splits(f"{folder}/all.{kind}")) == 3
print(*calls, sep="\\n")
sys.exit(bool(calls))
"""


def test_the_offline_flow_opens_no_connection_and_looks_up_no_name(pictures, tmp_path):
    """Train, evaluate, save, load, predict, export and read tables, without HF_HUB_OFFLINE."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment |= {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    code = f"folder, pictures = {str(tmp_path)!r}, {str(pictures)!r}\n" + SENTINEL + FLOW
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True,
        timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def test_saving_asks_the_hub_nothing_about_a_base_model_from_there(clip_folders, hub, tmp_path):
    hub.add_folder("tiny/clip", clip_folders["plain"])
    model = get_peft_model(load_clip("tiny/clip"), MaPLeConfig(class_names=CLASS_NAMES, prompt_depth=2))
    before = list(hub.requests)
    model.save_pretrained(tmp_path / "adapter")
    assert hub.requests == before
