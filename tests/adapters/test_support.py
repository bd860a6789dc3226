"""Which base models and methods go together: the tables of hf_tgpt/encoders/README.md, cell by cell as it is here."""

import json
from pathlib import Path

import pytest
import torch
from conftest import CLASS_NAMES, GOLDEN, METHODS, ROOT, SHAPES, ImageProcessor, make_classifier, pixels, shake
from other_encoders import write
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPConfig, CLIPModel

import hf_tgpt
from hf_tgpt.adapters.feature_head import FeatureHead
from hf_tgpt.encoders import FAMILIES

AS_RELEASED = "tgpt with its released 32 and 64 queries"
ROWS = [*sorted(hf_tgpt.available_methods()), AS_RELEASED]
# The column of models that are known by their features, here of ALIGN.
OTHERS, PROMPTS_REFUSED = "AlignModel and others", "refused: prompts"
# The longest text that released models of a family are trained with, where a tiny one's is shorter.
CONTEXTS = {"clip": 77, "metaclip_2": 77, "siglip": 64, "chinese_clip": 512}


def table(first):
    """{row: {column: cell}} of the README's table whose first column is called so."""
    lines = iter((ROOT / "hf_tgpt/encoders/README.md").read_text().splitlines())
    header = next(line for line in lines if line.startswith(f"| {first} |"))
    next(lines)
    found, columns = {}, cells(header)[1:]
    for line in lines:
        if not line.startswith("|"):
            break
        name, *row = cells(line)
        found[name] = dict(zip(columns, row, strict=True))
    return found


def cells(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


def outcome(method, load, folder, **fields):
    """What a cell says: a method on a model learns in a step, is saved, and answers the same once it is loaded."""
    torch.manual_seed(0)
    try:
        model = make_classifier(method, load(), CLASS_NAMES, **fields)
    except ValueError as error:
        return PROMPTS_REFUSED if "puts prompts into the layers of the towers" in str(error) else f"refused: {error}"
    base = model.get_base_model()
    before = model.eval()(pixels(base)).logits.detach() if not isinstance(model.learner, FeatureHead) else None
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if isinstance(model.learner, FeatureHead):
        shake(model)  # fits it
    elif weights:
        model.train()(pixels(base), torch.tensor([0, 3, 1])).loss.backward()
        torch.optim.SGD(weights, lr=1.0).step()
        assert not torch.equal(model.eval()(pixels(base)).logits, before)
    model.eval().save_pretrained(folder)
    again = hf_tgpt.load_trained(load(), folder)
    assert torch.equal(again(pixels(base)).logits, model(pixels(base)).logits)
    return "works"


def test_the_tables_have_every_method_family_and_variety():
    methods = table("method")
    assert list(methods) == ROWS
    columns = [*(family.model_class for family in FAMILIES.values()), OTHERS]
    assert all(list(row) == columns for row in methods.values())
    assert list(table("CLIP")) == list(VARIETIES)


@pytest.mark.filterwarnings("ignore:TGP-T is trained without descriptions")
@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_goes_with_a_family_as_the_table_says(family, row, load_clip, clip_folders, tmp_path):
    shape = family if family in SHAPES else "plain"
    fields = METHODS[row].fields if row in METHODS else {}
    if row == AS_RELEASED:  # whose text may be as long as in the models that people have
        config = AutoConfig.from_pretrained(clip_folders[shape])
        config.text_config.max_position_embeddings = CONTEXTS[family]
        torch.manual_seed(0)
        weights = AutoModel.from_config(config).state_dict()

        def load():
            model = AutoModel.from_config(config).eval()
            model.load_state_dict(weights)
            model.name_or_path = clip_folders[shape]
            return model
    else:

        def load():
            return load_clip(shape)

    found = outcome(row.partition(" ")[0], load, tmp_path, **fields)
    assert table("method")[row][FAMILIES[family].model_class] == found


@pytest.fixture(scope="session")
def align(tmp_path_factory):
    return write("align", tmp_path_factory.mktemp("align"))


@pytest.mark.parametrize("row", ROWS)
def test_a_method_goes_with_other_models_as_the_table_says(row, align, tmp_path):
    fields = METHODS[row].fields if row in METHODS else {}
    found = outcome(row.partition(" ")[0], lambda: hf_tgpt.load_clip(align).eval(), tmp_path, **fields)
    assert table("method")[row][OTHERS] == found


# What CLIPs on the Hub differ in: fields of both towers, of each, of the whole, and how the file is written.
SMALL = dict(image_size=64, patch_size=16)
VARIETIES = {
    "activation quick_gelu (OpenAI), gelu in the text tower alone": {"vision": SMALL, "text": {"hidden_act": "gelu"}},
    "activation gelu (LAION, DataComp)": {"vision": SMALL | {"hidden_act": "gelu"}, "text": {"hidden_act": "gelu"}},
    "EOS number 2 in the config, read at the highest id (OpenAI's first configs)": {"vision": SMALL, "eos": 2},
    "EOS of the config, where padding has a higher id": {"vision": SMALL, "pad": True},
    "text of 248 tokens (Long-CLIP)": {"vision": SMALL, "text": {"max_position_embeddings": 248}},
    "patches of 32, 224 pixels (B/32)": {"vision": dict(image_size=224, patch_size=32)},
    "patches of 16, 224 pixels (B/16)": {"vision": dict(image_size=224, patch_size=16)},
    "patches of 14, 224 pixels (L/14)": {"vision": dict(image_size=224, patch_size=14)},
    "patches of 14, 336 pixels (L/14-336)": {"vision": dict(image_size=336, patch_size=14)},
    "patches of 16, 448 pixels": {"vision": dict(image_size=448, patch_size=16)},
    "projection as wide as both towers": {"vision": SMALL, "projection": 32},
    "projection narrower than both towers": {"vision": SMALL, "projection": 16},
    "projection wider than both towers": {"vision": SMALL, "projection": 48},
    "weights in float16": {"vision": SMALL, "dtype": torch.float16},
    "weights in bfloat16": {"vision": SMALL, "dtype": torch.bfloat16},
    "weights in several files": {"vision": SMALL, "shards": "20KB"},
    "loaded in bfloat16": {"vision": SMALL, "load": {"dtype": torch.bfloat16}},
}


def write_variety(folder, vision, text=None, projection=24, eos=None, pad=None, dtype=torch.float32, shards="1GB", **_):
    """A random CLIP with these particulars, in a folder as on the Hub."""
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "clip")
    if pad:  # a token behind EOS, with the highest id
        tokenizer.add_special_tokens({"pad_token": "<pad>"})
    tower = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos or tokenizer.eos_token_id)
    ids |= dict(pad_token_id=tokenizer.pad_token_id, vocab_size=len(tokenizer))
    config = CLIPConfig(projection_dim=projection, text_config=tower | ids | (text or {}), vision_config=tower | vision)
    torch.manual_seed(0)
    CLIPModel(config).to(dtype).save_pretrained(folder, max_shard_size=shards)
    tokenizer.save_pretrained(folder)
    square = {"height": vision["image_size"], "width": vision["image_size"]}
    ImageProcessor(size={"shortest_edge": vision["image_size"]}, crop_size=square).save_pretrained(folder)


def stored_dtype(file):
    """By either of the names that it has had."""
    config = json.loads(file.read_text())
    return config.get("dtype") or config["torch_dtype"]


@pytest.mark.parametrize("variety", VARIETIES)
def test_a_clip_of_a_variety_serves_as_the_table_says(variety, tmp_path):
    facts = VARIETIES[variety]
    write_variety(tmp_path / "clip", **facts)
    assert ("shards" in facts) == (len(list(Path(tmp_path / "clip").glob("*.safetensors"))) > 1)
    if "dtype" in facts:
        assert stored_dtype(tmp_path / "clip" / "config.json") in str(facts["dtype"])

    def load():
        return hf_tgpt.load_clip(tmp_path / "clip", **facts.get("load", {})).eval()

    for method, cell in table("CLIP")[variety].items():
        fields = METHODS[method].fields | ({"num_content_queries": 8} if method == "tgpt" else {})
        assert outcome(method, load, tmp_path / method, **fields) == cell
