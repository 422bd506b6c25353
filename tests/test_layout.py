"""The layout of the project: imports run one way, and the script is short."""

import ast
import re
import sys
from pathlib import PurePath

import pytest
from conftest import PROJECT, SCRIPT, execute

# The folders from which the files of each folder may import. "": the script. Tests may also import
# conftest. Files in a folder that is not a package import each other as top-level modules.
MAY_IMPORT = {
    "models": {"models"},
    "utils": {"models", "utils"},
    "training": {"models", "utils", "training"},
    "experiments": {"models", "utils", "training", "experiments"},
    "tools": {"models", "utils", "training", "tools"},
    "benchmarks": {"models", "utils", "training", "benchmarks"},
    "tests": {"models", "utils", "training", "experiments", "tools", "benchmarks", "conftest"},
    "": {"models", "utils", "training"},
}
TOP_LEVEL = (".", "experiments", "tools", "benchmarks", "tests")    # folders that are no packages
PATH_TRICKS = {"spec_from_file_location", "SourceFileLoader", "run_path"}
RUNS_THE_SCRIPT = PurePath("benchmarks", "throughput.py")   # whose training step it times
MAX_SCRIPT_LINES = 220
# Relative to the project.
FILES = sorted(PurePath(path.relative_to(PROJECT)) for folder in MAY_IMPORT
               for path in (PROJECT / folder).glob("**/*.py" if folder else "*.py"))

DOCUMENTS = sorted(path.relative_to(PROJECT)
                   for folder in (".", "docs", "pretrained", "results", "tests/parity")
                   for path in (PROJECT / folder).glob("*.md"))
NAME = re.compile(r"\bNAME\b|seedS")      # stands for others


def folder_of(path):
    """The top-level folder of `path`, a PurePath relative to the project; "" for the script."""
    return path.parts[0] if len(path.parts) > 1 else ""


def owner(module, files):
    """Where a module with an absolute name is from: a folder, conftest, or None for packages."""
    top = module.split(".")[0]
    if top in MAY_IMPORT or top == "conftest":
        return top
    folders = [folder_of(path) for path in files
               if path.stem == top and str(path.parent) in TOP_LEVEL]
    return folders[0] if folders else None


def imported_modules(path, tree):
    """The absolute names of all modules that the file at `path` with this syntax tree imports.

    This includes imports inside functions, and import_module and __import__ of a literal.
    """
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = path.parts[:-1][:len(path.parts) - node.level] if node.level else ()
            beyond = ("..",) if node.level >= len(path.parts) else ()
            yield ".".join((*beyond, *package, *filter(None, [node.module])))
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = getattr(node.func, "attr", getattr(node.func, "id", None))
            if function in ("import_module", "__import__"):
                yield str(node.args[0].value)


def names_in(tree):
    """All names, attributes and imported names in `tree`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.alias):
            yield node.name
        elif isinstance(node, ast.Name | ast.Attribute):
            yield getattr(node, "id", getattr(node, "attr", None))


def violations(path, source, files=FILES):
    """What in `source`, the content of the file at `path`, breaks the rules for imports."""
    path, tree = PurePath(path), ast.parse(source)
    allowed = MAY_IMPORT[folder_of(path)]
    for module in imported_modules(path, tree):
        where = owner(module, files)
        if module.startswith("..") or (where is not None and where not in allowed):
            yield f"{path} imports {module}"
    if folder_of(path) != "tests" and path != RUNS_THE_SCRIPT:
        for name in PATH_TRICKS.intersection(names_in(tree)):
            yield f"{path} uses {name}"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_run_one_way(path):
    assert not list(violations(path, (PROJECT / path).read_text()))


@pytest.mark.parametrize("path, source", [
    ("models/flow.py", "import utils.data"),
    ("models/flow.py", "import torch, training"),
    ("models/flow.py", "def f():\n    from training.optim import Optimizer"),
    ("models/flow.py", "from .. import utils"),
    ("models/flow.py", "from ..utils import data"),
    ("models/flow.py", "import importlib\nimportlib.import_module('utils.data')"),
    ("utils/data.py", "from training import loop"),
    ("utils/data.py", "if True:\n    import training.loop as loop"),
    ("training/step.py", "from tools import ship"),
    ("training/step.py", "import ship"),
    ("training/step.py", "from conftest import TINY"),
    ("tools/ship.py", "from experiments import baselines"),
    ("tools/ship.py", "from measure import random_data"),
    ("experiments/baselines.py", "import tests.conftest"),
    ("experiments/baselines.py", "from test_data import generator"),
    ("experiments/baselines.py", "__import__('train-flow-ssl')"),
    ("benchmarks/measure.py", "from tools.ship import main"),
    ("tests/test_data.py", "from test_training import runs"),
    ("tests/test_data.py", "from importlib import import_module\nimport_module('train-flow-ssl')"),
    ("train-flow-ssl.py", "from tools import ship"),
    ("train-flow-ssl.py", "import baselines"),
    ("utils/data.py", "import importlib.util\nimportlib.util.spec_from_file_location('a', 'b')"),
    ("tools/ship.py", "from importlib.util import spec_from_file_location as load"),
    ("tools/ship.py", "import runpy\nrunpy.run_path('train-flow-ssl.py')"),
])
def test_the_check_finds_forbidden_imports(path, source):
    assert len(list(violations(path, source))) >= 1


@pytest.mark.parametrize("path, source", [
    ("models/flow.py", "import math\nimport torch\nfrom . import bases\nfrom .bases import Base"),
    ("utils/figures.py", "from models import SemiConditionalFlow\nfrom .data import load_data"),
    ("training/optim.py", "import models\nfrom utils import data\nfrom .speed import Captured"),
    ("benchmarks/throughput.py", "from measure import random_data\nfrom utils.runs import Run"),
    ("tests/test_data.py", "import runpy\nfrom conftest import TINY\nfrom tools import ship"),
    ("tests/test_data.py", "from importlib.util import spec_from_file_location"),
    ("train-flow-ssl.py", "import os\nfrom models import build_model\nfrom training import loop"),
])
def test_the_check_accepts_other_imports(path, source):
    assert not list(violations(path, source))


def test_the_script_is_short():
    assert len(SCRIPT.read_text().splitlines()) < MAX_SCRIPT_LINES


def test_documents_are_short():
    texts = {str(path): (PROJECT / path).read_text() for path in DOCUMENTS}
    assert len(texts["README.md"].splitlines()) <= 200 and len(texts["README.md"].split()) <= 1700
    assert sum(len(text.split()) for text in texts.values()) <= 7000


@pytest.mark.parametrize("document", DOCUMENTS, ids=str)
def test_documents_name_files_that_exist(document):
    """Links, and paths in backticks that begin with a folder of the project."""
    text, folder = (PROJECT / document).read_text(), (PROJECT / document).parent
    links = re.findall(r"\]\(([^):#]+)\)|src=\"(.+?)\"", text)
    links = ["".join(link) for link in links]
    assert all((folder / link).exists() for link in links), links
    for path in re.findall(r"`((?:\w+/)+[\w.*-]+)`", text):
        if path.split("/")[0] in MAY_IMPORT.keys() | {"configs", "pretrained", "results", "docs"}:
            assert NAME.search(path) or list(PROJECT.glob(path)), path


def test_ci_runs_the_readme_s_commands():
    """Both of them, and ruff and mypy before the tests."""
    readme = (PROJECT / "README.md").read_text().split("## Run it\n")[1].split("\n\n")[1]
    commands = [command.strip() for line in readme.splitlines() for command in line.split("&&")]
    ci = re.findall(r"^run (.+)$", (PROJECT / ".ci" / "run").read_text(), re.MULTILINE)
    assert len(commands) == 4 and ci == [*commands[:3], "ruff check", "mypy", commands[3]]


def test_every_tracked_file_is_checked():
    if not (PROJECT / ".git").exists():
        pytest.skip("not a git checkout")
    done = execute(PROJECT, ["git", "ls-files", "-z", "*.py"])
    assert done.returncode == 0, done.stderr
    paths = map(PurePath, filter(None, done.stdout.split("\0")))
    tracked = {path for path in paths if (PROJECT / path).is_file()}
    assert tracked <= set(FILES) and {folder_of(path) for path in tracked} == set(MAY_IMPORT)


# Names of packages that differ from those of their modules.
PACKAGES = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow"}


def test_every_imported_package_is_declared():
    """In requirements.txt, or in requirements-dev.txt if only tests or benchmarks import it."""
    declared = {}
    for name in ("requirements.txt", "requirements-dev.txt"):
        lines = (PROJECT / name).read_text().splitlines()
        declared[name] = {re.split(r"[<>=~! ]", line)[0].lower() for line in lines
                          if line and not line.startswith(("#", "-"))}
    for path in FILES:
        allowed = declared["requirements.txt"]
        if folder_of(path) in ("tests", "benchmarks"):
            allowed = allowed | declared["requirements-dev.txt"]
        modules = imported_modules(path, ast.parse((PROJECT / path).read_text()))
        names = {module.split(".")[0] for module in modules if owner(module, FILES) is None}
        names -= {*sys.stdlib_module_names, ""}
        if path.name == "noxfile.py":       # nox itself reads it
            names.discard("nox")
        assert {PACKAGES.get(name, name) for name in names} <= allowed, path
