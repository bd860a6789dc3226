"""What the research releases compute, in golden files, and checkpoint files as they write them.

The golden files hold what each release computes in float32 on the small CLIP in `golden/clip`.
"""

import json

import numpy as np
import torch
from conftest import GOLDEN
from peft import get_peft_model, set_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import CLIPModel

from hf_tgpt import config_class, convert_original_state_dict

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
    "promptsrc_ctx2_depth3",
    "promptsrc_ctx4_depth2",
    "mmrl_rep2_from2",
    "mmrl_rep5_from1",
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
    "promptsrc": lambda case: dict(
        text_prompt_length=int(case["n_ctx"]),
        vision_prompt_length=int(case["n_ctx_vision"]),
        text_prompt_depth=int(case["depth"]),
        vision_prompt_depth=int(case["depth_vision"]),
        teacher_templates=case["templates"],
        **{name: float(case[name]) for name in ("text_loss_weight", "image_loss_weight")},
    ),
    "mmrl": lambda case: dict(
        num_tokens=int(case["n_rep_tokens"]),
        token_width=int(case["rep_dim"]),
        layers=case["rep_layers"],
        alpha=float(case["alpha"]),
        regularization_weight=float(case["reg_weight"]),
        templates=[json.loads(case["template"])],
        logit_scale=100.0,
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


class ConstantWarmupScheduler(torch.optim.lr_scheduler.LRScheduler):
    """As in Dassl, whose state dict therefore holds another scheduler and its optimiser as objects."""

    def __init__(self, optimizer, successor):
        self.successor = successor
        super().__init__(optimizer)

    def get_lr(self):
        return [1e-5]


def write_release(path, tensors, **options):
    """`model.pth.tar-N` as the `save_checkpoint` of Dassl and of TGP-T's release writes it."""
    layer = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1, momentum=0.9)
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    scheduler = ConstantWarmupScheduler(optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5.0))
    content = dict(
        state_dict=tensors,
        epoch=5,
        optimizer=optimizer.state_dict(),
        scheduler=scheduler.state_dict(),
        val_result=np.float64(81.5),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path, **options)
    return path


def release_files(case, folder):
    """The files of a run: CoOp and CoCoOp save their prompt learner alone, TGP-T its two trained parts, others all."""
    tensors, parts = case.group("param."), ["prompt_learner.", "cls_head."]
    if case.method in ("maple", "ivlp", "promptsrc", "mmrl"):
        frozen = {"prompt_learner.token_prefix": torch.zeros(5, 1, 64), "logit_scale": torch.zeros(())}
        return [write_release(folder / "MultiModalPromptLearner" / "model.pth.tar-5", tensors | frozen)]
    files = []
    for part in parts:
        own = {name.removeprefix(part): value for name, value in tensors.items() if name.startswith(part)}
        if own or (case.method == "coop" and part == parts[0]):
            own = own or tensors
            if case.method != "tgpt":
                own |= {"token_prefix": torch.zeros(5, 1, 64), "token_suffix": torch.zeros(5, 60, 64)}
            files.append(write_release(folder / part.rstrip(".") / "model.pth.tar-5", own))
    return files
