"""What belongs to a method beside its file: whoever adds one is told here what is still missing."""

import pytest
from conftest import HEADS, METHODS, READERS, ROOT

import hf_tgpt
from hf_tgpt.cli import compare_plan

WITHOUT_TRAINING = ("zero_shot",)  # nothing to promise of weights
OUTSIDE_THE_SLOT = ("lora", "two_stage")  # PEFT's own adapters: tests/methods/test_zero_shot_probe_lora.py
PROMPTED = (*READERS, *OUTSIDE_THE_SLOT)
NAMED_BY_METHOD = ("lora", "zero_shot", "linear_probe")  # whose recipes no paper's table needs


@pytest.mark.parametrize("method", hf_tgpt.available_methods())
def test_a_method_has_all_that_belongs_to_it(method):
    recipes, missing = ROOT / "hf_tgpt" / "recipes", []
    config = hf_tgpt.config_class(method)
    if config.__name__ not in hf_tgpt.__all__:
        missing.append(f"`{config.__name__}` in both lists of hf_tgpt/__init__.py")
    if method not in (*METHODS, *WITHOUT_TRAINING, *OUTSIDE_THE_SLOT):
        missing.append("a row of METHODS in tests/conftest.py (parameters: how many tensors it trains), the promises")
    if method in PROMPTED and f'"{method}": ' not in (ROOT / "tests" / "plain_methods.py").read_text():
        missing.append("its plain form in tests/plain_methods.py, which the benchmark and its test set beside it")
    missing += [
        f"the recipe hf_tgpt/recipes/{name}"
        for name in ([f"{method}.json"] if method in HEADS else [f"{method}.json", f"toy_{method}.json"])
        if not (recipes / name).is_file()
    ]
    if method not in NAMED_BY_METHOD and f"{method}.json" not in (recipes / "README.md").read_text(encoding="utf-8"):
        missing.append(f"{method}.json and the command for the paper's table in hf_tgpt/recipes/README.md")
    encoders = (ROOT / "hf_tgpt" / "encoders" / "README.md").read_text(encoding="utf-8")
    if f"| {method} |" not in encoders:
        missing.append("a row in the table of base models and methods in hf_tgpt/encoders/README.md")
    if method in compare_plan.LABELS:
        missing.append("a label in hf_tgpt/cli/compare_plan.py, as the paper writes its name")
    frozen = ROOT / "tests" / "frozen"
    if method not in (*WITHOUT_TRAINING, *OUTSIDE_THE_SLOT) and not list(
        frozen.glob(f"*/{method}/adapter_config.json")
    ):
        missing.append("a frozen adapter: its FIELDS in tests/frozen/make.py, and run that")
    if f"`{config.__name__}`" not in (ROOT / "README.md").read_text(encoding="utf-8"):
        missing.append(f"a row with `{config.__name__}` in the table of methods of README.md")
    if not getattr(config.learner_class, "citation", "").startswith("@"):
        missing.append("the paper as BibTeX, `citation` of its learner")
    assert not missing, f"{method} still lacks " + "; ".join(missing)


@pytest.mark.parametrize("method", hf_tgpt.available_methods())
def test_a_config_shows_what_somebody_would_type_to_have_it(method):
    config = hf_tgpt.config_class(method)(class_names=["cat", "dog"])
    assert repr(config) == f"{type(config).__name__}(class_names=['cat', 'dog'])"
    names = {type(config).__name__: getattr(hf_tgpt, type(config).__name__)}
    assert vars(eval(repr(config), names)) == vars(config)


def test_compare_offers_every_method():
    assert {words.split()[0] for words in compare_plan.LABELS.values()} == set(hf_tgpt.available_methods())


def test_a_config_shows_what_is_not_as_by_default_and_cuts_long_lists():
    config = hf_tgpt.GDAConfig(class_names=[f"class {i}" for i in range(1000)], alpha=2.0)
    assert repr(config) == (
        "GDAConfig(class_names=['class 0', 'class 1', 'class 2', 'class 3', 'class 4', ... 1000 in all], alpha=2.0)"
    )
    assert repr(hf_tgpt.TrainingConfig(epochs=3)) == "TrainingConfig(epochs=3)"
