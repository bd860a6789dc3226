"""Made the folders beside it, once, with the version they are called after. They are read forever and never made again:
a folder that is there already stays, and a version that writes another format gets a folder of its own.

    python tests/frozen/make.py                     # with the newest supported libraries
    python tests/frozen/make.py -oldest-libraries   # with those of .ci/oldest.txt
"""

import json
import sys
from pathlib import Path

import torch
from peft import get_peft_model
from transformers import CLIPModel

import hf_tgpt

CLIP = Path(__file__).parents[1] / "golden" / "clip"
CLASS_NAMES = ["cat", "red circle", "forest"]
FIELDS = {
    "maple": {"prompt_length": 2, "prompt_depth": 2},
    "tgpt": {"num_category_queries": 5, "num_content_queries": 6, "templates": ["a photo of a {}.", "a {}."]},
    "coop": {"prompt_length": 2, "initial_text": "a photo of a", "class_position": "middle"},
    "cocoop": {"prompt_length": 2},
    "mutual_prompt": {"prompt_length": 2, "vision_prompt_length": 2, "top_k": 2},
    "ivlp": {"text_prompt_length": 2, "vision_prompt_length": 3, "text_prompt_depth": 2, "vision_prompt_depth": 2},
    "kgcoop": {"prompt_length": 2},
    "promptsrc": {"text_prompt_depth": 2, "vision_prompt_depth": 2, "teacher_templates": ["a photo of a {}.", "a {}."]},
    "mmrl": {"num_tokens": 2, "token_width": 8, "layers": [2, 3]},
    "linear_probe": {},
    "gda": {},
    "tip_adapter": {"train_keys": True},
    "proker": {},
    "zs_lp": {},
    "clap": {},
    "lp_plus_plus": {},
    "task_res": {},
    "clip_adapter": {"residual_ratio": 0.5},
}
NOT_IN_THE_SLOT = {"zero_shot", "lora", "two_stage"}  # without weights of their own, or with PEFT's


def pictures(count: int = 2) -> torch.Tensor:
    """Pictures that no random generator has a part in, (2, 3, 32, 32)."""
    return (0.37 * torch.arange(count * 3 * 32 * 32)).sin().reshape(count, 3, 32, 32)


def main(libraries=""):
    if missing := {name for name in hf_tgpt.available_methods() if name not in FIELDS} - NOT_IN_THE_SLOT:
        sys.exit(f"FIELDS has no entry for {', '.join(sorted(missing))}.")
    for method, fields in FIELDS.items():
        folder = Path(__file__).parent / f"{hf_tgpt.__version__}{libraries}" / method
        if folder.exists():
            print(f"{folder} is frozen; a new format takes a new version number.")
            continue
        torch.manual_seed(1)
        config = hf_tgpt.config_class(method)(class_names=CLASS_NAMES, **fields)
        model = get_peft_model(CLIPModel.from_pretrained(CLIP), config).eval()
        if not config.trains:
            hf_tgpt.fit(model, pictures(6), torch.arange(6) % 3)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn_like(parameter))
            logits = model(pictures()).logits.tolist()
        model.peft_config["default"].base_model_name_or_path = "golden/clip"
        model.peft_config["default"].trained_on = {"dataset": "me/birds", "shots": 16, "seed": 0}
        model.save_pretrained(folder)
        (folder / "README.md").unlink()
        (folder / "logits.json").write_text(json.dumps(logits) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
