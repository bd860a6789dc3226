"""The house: folders whose imports run down, modules that all can be imported, each fact in one place."""

import ast
import importlib
import importlib.util
import pkgutil
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib import metadata

import pytest
from conftest import ROOT
from packaging.requirements import Requirement

import hf_tgpt

PACKAGE = ROOT / "hf_tgpt"
# From the top floor down. `data` stands on the ground and is used from `evaluation` up.
FLOORS = [
    "cli", "inference", "training", "hub", "evaluation", "methods", "adapters", "texts", "encoders", "data", "utils"
]  # fmt: skip
FILES = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in PACKAGE.rglob("*.py")}


def imports_of(name):
    """The modules of the package that a module imports, wherever the import stands and whatever it is for."""
    package = name.removesuffix(".__init__") if name.endswith(".__init__") else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(FILES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join(
                [*package.split(".")[: len(package.split(".")) - node.level + 1], *(node.module or "").split(".")]
            )
            found |= {base.rstrip("."), *(f"{base.rstrip('.')}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.ImportFrom | ast.Import):
            found |= {getattr(node, "module", None) or alias.name for alias in node.names}
    known = {module.removesuffix(".__init__"): module for module in FILES}
    return {known[module] for module in found if module in known} - {name}


def floor(name):
    return FLOORS.index(name.split(".")[1])


@pytest.mark.parametrize("name", [name for name in FILES if name.count(".") > 1])
def test_imports_run_down(name):
    for other in imports_of(name):
        assert other.count(".") > 1, f"{name} imports {other}, which stands above all folders"
        assert floor(other) >= floor(name), f"{name} imports {other}, which stands above it"
        if name.split(".")[1] == "data":
            assert other.split(".")[1] in ("data", "utils"), f"{name} imports {other}, but data stands on the ground"
        if other.split(".")[1] == "data":
            assert floor(name) <= FLOORS.index("evaluation") or name.split(".")[1] == "data"


def test_no_imports_run_in_a_circle():
    TopologicalSorter({name: imports_of(name) for name in FILES}).prepare()  # raises CycleError


def test_the_top_of_the_package_is_seen_at_a_glance():
    entries = [path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"]
    assert len(entries) <= 16, sorted(entries)
    assert not list(ROOT.glob("*.py"))


@pytest.mark.parametrize("name", sorted(module.name for module in pkgutil.walk_packages(hf_tgpt.__path__, "hf_tgpt.")))
def test_every_module_can_be_imported_under_another_name(name):
    if name == "hf_tgpt.__main__":
        return
    scope = {}
    exec(f"import {name} as module", scope)  # binds what the attribute of the folder is, function or module
    assert scope["module"] is importlib.import_module(name)


def in_a_fresh_process(code):
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True
    ).stdout


def test_the_first_line_of_a_program_may_import_a_method():
    assert in_a_fresh_process("from hf_tgpt import CoOpConfig; print(CoOpConfig.method)").strip() == "COOP"


def test_importing_the_package_waits_for_no_library():
    code = "import sys, hf_tgpt; print(*{'torch', 'transformers', 'peft', 'datasets', 'numpy'} & set(sys.modules))"
    assert in_a_fresh_process(code).strip() == ""


def test_importing_the_package_beside_peft_imports_nothing_else_of_weight():
    """At most a hundred modules, beside this package's own, come on top of those of `import peft`; none is for data and
    metrics, which who serves an adapter does not need, and a script of one's own may well be called evaluate.py.
    """
    code = "import sys, peft; before = set(sys.modules)\nimport hf_tgpt; print(*set(sys.modules) - before)"
    more = {name for name in in_a_fresh_process(code).split() if name.partition(".")[0] != "hf_tgpt"}
    assert len(more) <= 100, sorted(more)
    assert not {"datasets", "evaluate", "pandas", "pyarrow", "matplotlib", "gradio", "onnx"} & more


def test_the_oldest_set_is_the_lower_bounds_and_there_are_no_upper_ones():
    lines = (ROOT / ".ci" / "oldest.txt").read_text().splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    for requirement in map(Requirement, metadata.requires("hf-tgpt")):
        operators = {bound.operator for bound in requirement.specifier}
        assert operators <= {">=", "!="}, requirement
        if requirement.marker is None:  # not of an extra
            (lowest,) = (bound.version for bound in requirement.specifier if bound.operator == ">=")
            assert (oldest[requirement.name] + ".").startswith(lowest + "."), requirement


def test_one_file_alone_asks_for_versions():
    asking = {name for name, code in code_of(None) if re.search(r"packaging|\w+\.__version__|metadata\.version", code)}
    assert asking == {"hf_tgpt.utils.compat"}
    assert len((PACKAGE / "utils/compat.py").read_text().splitlines()) < 120


@pytest.mark.parametrize(
    "first",
    ["import peft, hf_tgpt", "import hf_tgpt\nfrom importlib.util import find_spec\nfind_spec('peft')\nimport peft"],
)
def test_peft_knows_the_methods_in_whichever_order_it_is_imported(first):
    code = f"{first}\nfrom peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as known\nprint('MAPLE' in known)"
    assert in_a_fresh_process(code).strip() == "True"


def test_public_names_are_those_that_type_checkers_see():
    block = next(node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If))
    seen = {alias.asname: f"{node.module}" for node in block.body for alias in node.names}
    assert seen == hf_tgpt._MODULES
    assert all(getattr(hf_tgpt, name) is not None for name in hf_tgpt.__all__)
    assert set(hf_tgpt.__all__) <= set(dir(hf_tgpt))


def code_of(folder_or_none):
    """The code of all files outside a folder, without strings and comments."""
    for name, file in FILES.items():
        if name.split(".")[1:2] != [folder_or_none]:
            yield name, ast.unparse(ast.parse(re.sub(r'""".*?"""', '""', file.read_text(), flags=re.S)))


def test_a_models_insides_are_read_in_encoders_alone():
    insides = (
        r"\.(text_model|vision_model|text_projection|visual_projection|text_config|vision_config|projection_dim)|"
        r"(?<!self\.config)\.logit_scale\b(?!\()"  # a head's own field is not the model's
    )
    for name, code in code_of("encoders"):
        assert not re.search(insides, code), f"{name} reads {re.search(insides, code)[0]}"


def test_pefts_insides_are_named_in_adapters_alone():
    for name, code in code_of("adapters"):
        found = re.search(r"peft\.(tuners|mapping|peft_model)|BaseTuner", code)
        assert not found, f"{name} names {found[0]}"


def test_no_method_is_named_outside_methods():
    """No ladder over names or kinds: what differs between methods is a method's own answer."""
    names = {name.upper() for name in hf_tgpt.available_methods()}
    kinds = {"MaPLe", "CoOp", "CoCoOp", "IVLP", "TGPT", "MutualPrompt", "LinearProbe"}
    for name, file in FILES.items():
        if name.split(".")[1] in ("methods", "__init__"):
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            assert getattr(node, "id", getattr(node, "attr", None)) not in kinds, f"{name}, line {node.lineno}"
            if isinstance(node, ast.Compare):
                texts = [part.value for part in (node.left, *node.comparators) if isinstance(part, ast.Constant)]
                assert not {str(text).upper() for text in texts} & names, f"{name}, line {node.lineno}"


def test_an_example_is_named_like_no_library():
    """`python examples/train.py` has its folder first on the path, so that a file there would hide a library."""
    libraries = metadata.packages_distributions().keys() | sys.stdlib_module_names
    for path in (ROOT / "examples").iterdir():
        assert path.stem not in libraries, f"{path} hides a library"
        assert path.suffix != ".py" or "sys.path" not in path.read_text()
