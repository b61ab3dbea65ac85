"""The house keeps its shape: who may import whom, how long a thing may be, who may look at the environment.

The tables below are the rules of architecture.md. A new room gets a line here, on purpose, in the same commit.
"""

import ast
import graphlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

BELOW_TRAINER = """parts architecture config config_file files kernels masks ops rope layers grouped moe mla model
                   tokenizer pretrained corpus shards data optim parallel checkpoint planner runs sampling evaluation
                   hub observer simulator machine guard preparation report state"""
PUBLIC = BELOW_TRAINER + " show trainer post"

# A room is a file or a folder of nanomai/. Inside a folder all is allowed; `folder.file` gives one file its own line.
MAY_IMPORT = {
    "files": "",
    "parts": "",
    "architecture": "parts",
    "config": "architecture",
    "config_file": "config",
    "triton_kernels": "",
    "kernels": "",
    "masks": "kernels triton_kernels",
    "ops": "kernels masks triton_kernels",
    "rope": "architecture",
    "float8": "",
    "layers": "architecture float8 ops",
    "grouped": "kernels ops triton_kernels",
    "moe": "architecture grouped layers ops",
    "mla": "architecture layers ops rope",
    "model": "architecture float8 kernels layers masks mla moe ops rope",
    "tokenizer": "files",
    "pretrained": "files tokenizer",
    "corpus": "config",
    "shards": "config files tokenizer",
    "data": "config tokenizer shards",
    "optim": "config parallel",  # matrices that ranks share are exchanged before they are orthogonalised
    "parallel": "config",
    "parallel.context": "config masks ops",
    "parallel.expert": "config grouped moe",
    "parallel.launch": "config files",
    "parallel.tensor": "config ops",
    "checkpoint": "config files parallel",  # saving is collective: it needs to know who the main rank is
    "planner": "config machine parallel",  # machine to measure this one, where a plan is for it
    "machine": "config kernels optim",  # the batch of a step, which may be piecewise, sets the micro-batch
    "guard": "",
    "show": "",
    "report": "config show",
    "preparation": "config corpus pretrained tokenizer shards data machine",  # how many cores may tokenize
    "state": "checkpoint config guard machine model optim parallel pretrained report runs tokenizer",
    "runs": "config config_file files model checkpoint parallel pretrained tokenizer",
    "sampling": "layers ops model rope tokenizer",  # the cache makes the masks of its rows
    "evaluation": "data layers ops model parallel tokenizer sampling",  # a sum over all ranks
    "hub": "architecture checkpoint config config_file files model pretrained rope runs tokenizer",
    "observer": "grouped parallel",
    "simulator": "config model moe observer optim parallel stand_ins",
    "stand_ins": "ops parallel",
    "trainer": BELOW_TRAINER + " show",  # the loss curve of every run folder
    "post": BELOW_TRAINER + " trainer",
    "exercises": BELOW_TRAINER + " show triton_kernels",  # the checks of the notebooks: answers against the package
    "__init__": PUBLIC,
    "options": "config",
    "cli": PUBLIC + " __init__ options",
    "__main__": "cli",
}

# Packages of other people. A room without a line may need CORE: what is installed wherever something trains.
CORE = "torch numpy einops tiktoken safetensors yaml rich matplotlib"
MAY_NEED = {
    "parts": "",
    "architecture": "",
    "config": "",
    "config_file": "yaml",
    "options": "",
    "planner": "",
    "planner.devices": "torch",
    "parallel.limits": "",  # so that a plan takes no longer than its arithmetic
    "kernels": "",
    "triton_kernels": "torch triton",
    "triton_kernels.interpreter": "torch triton numpy",  # the interpreter computes in numpy
    "triton_kernels.lens": "torch triton numpy matplotlib",
    "show": "matplotlib torch",
    "machine": CORE + " triton",
    "tokenizer": CORE + " regex",
    "pretrained": "tokenizers",
    "corpus": CORE + " pyarrow datasets",
    "cli": CORE + " tyro",
}

MAY_READ_ENVIRONMENT = ["cli", "machine", "parallel.launch"]
ENVIRONMENT = {"environ", "environb", "getenv", "getenvb"}

# 4,000 lines for what trains, 700 for the ways in and out of Hugging Face, and 2,100 for many ranks and their planning
MAX_FUNCTION, MAX_FILE, MAX_PACKAGE = 40, 300, 6_800
MAX_FILE_OF = {"model": 400}


class Module(NamedTuple):
    """A source file; `name` is dotted and begins with its top folder."""

    name: str
    path: Path
    text: str
    tree: ast.Module

    @property
    def inner(self) -> str:
        """The name inside nanomai, as the tables use it: `model`, `parallel.tensor`, `__init__`."""
        return inner(self.name)

    def at(self, node: ast.AST | None = None) -> str:
        return f"{self.path}:{node.lineno}" if node else str(self.path)


def inner(name: str) -> str:
    return "__init__" if name == "nanomai" else name.removeprefix("nanomai.")


def room(name: str) -> str:
    return inner(name).split(".")[0]


def read(root: Path) -> list[Module]:
    modules = []
    for path in sorted([*root.glob("nanomai/**/*.py"), *root.glob("triton_kernels/**/*.py")]):
        short = path.relative_to(root)
        parts = short.parent.parts if path.name == "__init__.py" else short.with_suffix("").parts
        text = path.read_text(encoding="utf-8")
        modules.append(Module(".".join(parts), short, text, ast.parse(text)))
    return modules


def of_nanomai(modules: list[Module]) -> list[Module]:
    return [m for m in modules if m.name.split(".")[0] == "nanomai"]


def imports(module: Module, known: set[str]) -> Iterator[tuple[ast.AST, str]]:
    """Every (node, dotted name) that a file imports, lazily or not; a name that is no module counts as its package."""
    package = module.name.split(".") if module.path.name == "__init__.py" else module.name.split(".")[:-1]
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            yield from ((node, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) + 1 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                whole = f"{base}.{alias.name}"
                yield node, whole if whole in known else base


def is_ours(name: str) -> bool:
    return name.split(".")[0] in ("nanomai", "triton_kernels")


# The rules: each yields one line for each fault.


def wrong_imports(modules: list[Module]) -> Iterator[str]:
    known = {m.name for m in modules}
    for module in modules:
        mine = room(module.name)
        if mine not in MAY_IMPORT:
            yield f"{module.at()}: a new room, {mine!r}: add it to MAY_IMPORT in tests/test_house.py"
            continue
        allowed = {mine, *MAY_IMPORT.get(module.inner, MAY_IMPORT[mine]).split()}
        needed = MAY_NEED.get(module.inner, MAY_NEED.get(mine, CORE)).split()
        for node, name in dict.fromkeys(imports(module, known)):
            if is_ours(name) and room(name) not in allowed:
                yield f"{module.at(node)}: {module.inner} may not import {name}"
            top = name.split(".")[0]
            if not is_ours(name) and top not in sys.stdlib_module_names and top not in needed:
                yield f"{module.at(node)}: {module.inner} may not need {top}"


def circles(modules: list[Module]) -> Iterator[str]:
    known = {m.name for m in modules} - {"nanomai"}  # it hands everything on, and no room may import it
    graph = {m.name: {name for _, name in imports(m, known)} & known - {m.name} for m in modules if m.name in known}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        yield "a circle of imports: " + " <- ".join(error.args[1])


def too_long(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        lines, most = len(module.text.splitlines()), MAX_FILE_OF.get(module.inner, MAX_FILE)
        if lines > most:
            yield f"{module.at()}: {lines} lines; {most} are allowed: which room is missing?"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and (lines := length(node)) > MAX_FUNCTION:
                yield f"{module.at(node)}: {node.name} has {lines} lines; {MAX_FUNCTION} are allowed"
    # the checks of the exercises belong to the course, and grow with it
    total = sum(code_lines(m) for m in of_nanomai(modules) if room(m.name) != "exercises")
    if total >= MAX_PACKAGE:
        yield f"nanomai has {total} lines of code; fewer than {MAX_PACKAGE} are allowed"


def code_lines(module: Module) -> int:
    """Lines that are neither blank nor comment nor docstring: explaining more must not cost a room its place."""
    strings = (node.value for node in ast.walk(module.tree) if isinstance(node, ast.Expr))
    explained = {line for node in strings if isinstance(node, ast.Constant) and isinstance(node.value, str)
                 for line in range(node.lineno, node.end_lineno + 1)}
    return sum(bool(text.strip()) and not text.strip().startswith("#") and number not in explained
               for number, text in enumerate(module.text.splitlines(), 1))


def length(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines from `def` to the end, less the docstring."""
    first = function.body[0]
    docstring = first.end_lineno - first.lineno + 1 if ast.get_docstring(function) is not None else 0
    return function.end_lineno - function.lineno + 1 - docstring


def undocumented(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        for node in module.tree.body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{module.at(node)}: {node.name} has no docstring"


def environment_readers(modules: list[Module]) -> Iterator[str]:
    for module in modules:
        if module.inner in MAY_READ_ENVIRONMENT:
            continue
        for node in ast.walk(module.tree):
            names = {node.attr} if isinstance(node, ast.Attribute) else set()
            if isinstance(node, ast.ImportFrom) and node.module == "os":
                names = {alias.name for alias in node.names}
            if names & ENVIRONMENT:
                yield f"{module.at(node)}: {module.inner} may not read the environment"


RULES = [wrong_imports, circles, too_long, undocumented, environment_readers]


@pytest.mark.parametrize("rule", RULES)
def test_the_house(rule):
    modules = read(ROOT)
    assert modules, "nothing was read: the rule would pass on an empty house"
    found = list(rule(modules))
    assert not found, "\n".join(found)


def test_the_table_itself():
    graph = {name: set(allowed.split()) for name, allowed in MAY_IMPORT.items()}
    assert set().union(*graph.values()) <= graph.keys(), "a room is allowed that has no line of its own"
    assert graph.keys() >= {name.split(".")[0] for name in [*MAY_NEED, *MAY_READ_ENVIRONMENT]}
    graphlib.TopologicalSorter(graph).prepare()


LONG_FUNCTION = "def _f():\n" + "    pass\n" * 40

FAULTS = [
    (wrong_imports, {"config.py": "from nanomai import model", "model.py": ""}, "config may not import nanomai.model"),
    (wrong_imports, {"config.py": "import nanomai.model"}, "config may not import nanomai.model"),
    (wrong_imports, {"config.py": "from .model import GPT", "model.py": ""}, "config may not import nanomai.model"),
    (wrong_imports, {"data.py": "def f():\n    import nanomai.trainer"}, "nanomai/data.py:2: data may not import"),
    (wrong_imports, {"trainer.py": "from nanomai import train"}, "trainer may not import nanomai"),
    (wrong_imports, {"parallel/mesh.py": "from ..ops import f", "ops.py": ""}, "mesh may not import nanomai.ops"),
    (wrong_imports, {"../triton_kernels/a.py": "import nanomai.ops"}, "triton_kernels.a may not import nanomai.ops"),
    (wrong_imports, {"../triton_kernels/a.py": "import numpy"}, "triton_kernels.a may not need numpy"),
    (wrong_imports, {"../triton_kernels/lens.py": "import einops"}, "triton_kernels.lens may not need einops"),
    (wrong_imports, {"model.py": "import triton_kernels.norm"}, "model may not import triton_kernels.norm"),
    (wrong_imports, {"utils.py": ""}, "a new room, 'utils': add it to MAY_IMPORT"),
    (wrong_imports, {"trainer.py": "import tyro"}, "trainer may not need tyro"),
    (wrong_imports, {"config.py": "import torch.nn"}, "config may not need torch"),
    (circles, {"moe.py": "def f():\n    from nanomai import mla", "mla.py": "import nanomai.moe"}, "a circle of"),
    (circles, {"parallel/a.py": "from .b import f", "parallel/b.py": "from . import a"}, "a circle of"),
    (too_long, {"ops.py": "x = 1\n" * 301}, "nanomai/ops.py: 301 lines; 300 are allowed"),
    (too_long, {"../triton_kernels/a.py": "x = 1\n" * 301}, "triton_kernels/a.py: 301 lines; 300 are allowed"),
    (too_long, {"model.py": "x = 1\n" * 401}, "nanomai/model.py: 401 lines; 400 are allowed"),
    (too_long, {"ops.py": LONG_FUNCTION}, "nanomai/ops.py:1: _f has 41 lines; 40 are allowed"),
    (too_long, {f"post/{i}.py": "x = 1\n" * 250 for i in range(28)}, "nanomai has 7000 lines of code"),
    (undocumented, {"ops.py": "def f():\n    pass"}, "nanomai/ops.py:1: f has no docstring"),
    (undocumented, {"../triton_kernels/a.py": "def f():\n    pass"}, "triton_kernels/a.py:1: f has no docstring"),
    (undocumented, {"ops.py": "class C:\n    x = 1"}, "nanomai/ops.py:1: C has no docstring"),
    (environment_readers, {"model.py": "import os\nx = os.environ"}, "model.py:2: model may not read the environment"),
    (environment_readers, {"model.py": "from os import getenv"}, "model may not read the environment"),
    (environment_readers, {"parallel/mesh.py": "import os as o\no.getenv('A')"}, "parallel.mesh may not read"),
]

FAULTLESS = {
    "__init__.py": "def __getattr__(name):\n    from nanomai import trainer",
    "config.py": "",
    "architecture.py": "",
    "ops.py": 'def f():\n    """A docstring\n    is not\n    counted."""\n' + "    pass\n" * 39,
    "model.py": "from nanomai import ops\nfrom nanomai.architecture import C\nimport torch\n" + "x = 1\n" * 397,
    "parallel/tensor.py": "from nanomai import ops\nfrom . import mesh",
    "parallel/mesh.py": "",
    "parallel/launch.py": "import os\nx = os.environ",
    "../triton_kernels/lens.py": "import numpy, torch\nimport matplotlib.pyplot",
    "../triton_kernels/a.py": "from triton_kernels import lens\nimport triton",
    "trainer.py": "from nanomai.parallel.mesh import f\nfrom nanomai import model",
}


def build(folder: Path, files: dict[str, str]) -> list[Module]:
    for name, text in files.items():
        path = (folder / "nanomai" / name).resolve()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return read(folder)


@pytest.mark.parametrize("rule, files, message", FAULTS)
def test_each_rule_sees_its_fault(rule, files, message, tmp_path):
    found = list(rule(build(tmp_path, files)))
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize("rule", RULES)
def test_no_rule_sees_a_fault_where_there_is_none(rule, tmp_path):
    assert list(rule(build(tmp_path, FAULTLESS))) == []


def test_importing_nanomai_is_light():
    code = "import sys, nanomai, nanomai.config; print(*{'torch', 'numpy', 'yaml'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_ruff_is_clean():
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
