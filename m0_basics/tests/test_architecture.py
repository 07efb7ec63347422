"""The rules that keep the milestones apart, checked in the source: they hold for every package there is."""
from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from m0_basics.tools.analysis.code_size import entries

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = sorted(p.name for p in ROOT.glob("m[0-7]_*") if (p / "__init__.py").is_file())
MAX_LINES = 400
MAX_ENTRIES = {"m0_basics": 26}
HAS = ("README.md", "README.zh-CN.md", "INTERVIEW.md", "INTERVIEW.zh-CN.md", "llm.py", "config.py", "benchmark.py",
       "idea.py", "py.typed", "tests/test_documents.py", "tests/test_exercises.py")
HEAVY = ("transformers", "matplotlib", "gguf", "pytest", "accelerate", "scipy")
# Bases that make a class a seam, a message or an error, and not behaviour to be inherited.
_OPEN_BASES = {"ABC", "Protocol", "Enum", "IntEnum", "StrEnum", "NamedTuple", "TypedDict"}


@dataclass(frozen=True)
class ClassInfo:
    module: str
    node: ast.ClassDef

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


class SourceTree:
    """Classes and imports of the packages under a folder, read without importing anything."""

    def __init__(self, root: Path) -> None:
        self.modules: dict[str, ast.Module] = {}
        self.packages: set[str] = set()
        for file in sorted(root.glob("m[0-7]_*/**/*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            if "tests" not in parts and "testing" not in parts:
                name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
                self.modules[name] = ast.parse(file.read_text(encoding="utf-8"))
                if parts[-1] == "__init__":
                    self.packages.add(name)

    def classes(self) -> Iterator[ClassInfo]:
        for module, tree in self.modules.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.ClassDef):
                    yield ClassInfo(module, node)

    def resolve(self, module: str, name: str) -> ClassInfo | None:
        """The class that `name` (perhaps dotted) means in `module`, through imports; None for one from outside."""
        head, _, rest = name.partition(".")
        tree = self.modules.get(module)
        if tree is None:
            return None
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name == head and not rest:
                return ClassInfo(module, node)
            if isinstance(node, ast.ImportFrom):
                source = self._absolute(module, node)
                for alias in node.names:
                    if (alias.asname or alias.name) == head:
                        submodule = f"{source}.{alias.name}"
                        return self.resolve(submodule, rest) if submodule in self.modules and rest else (
                            self.resolve(source, alias.name))
            if isinstance(node, ast.Import):
                for alias in node.names:
                    if alias.asname == head and rest:
                        return self.resolve(alias.name, rest)
                    if alias.asname is None and name.startswith(alias.name + "."):
                        return self.resolve(alias.name, name.removeprefix(alias.name + "."))
        return None

    def _absolute(self, module: str, node: ast.ImportFrom) -> str:
        if not node.level:
            return node.module or ""
        parts = module.split(".")
        drop = node.level - (module in self.packages)
        return ".".join([*parts[:len(parts) - drop], *([node.module] if node.module else [])])

    def is_open(self, info: ClassInfo, seen: frozenset[str] = frozenset()) -> bool:
        """Whether a later milestone may inherit from this class: abstract, frozen data, an error, or an enumeration."""
        names = [ast.unparse(base).split("[")[0] for base in info.node.bases]
        if {n.split(".")[-1] for n in names} & _OPEN_BASES or any(map(_is_error, names)):
            return True
        if any(isinstance(d, ast.Call) and ast.unparse(d.func).endswith("dataclass") and any(
                k.arg == "frozen" and isinstance(k.value, ast.Constant) and k.value.value is True for k in d.keywords)
               for d in info.node.decorator_list):
            return True
        bases = [self.resolve(info.module, n) for n in names]
        return any(_is_error(b.node.name) and self.is_open(b) for b in bases if b and b.node.name not in seen)

    def violations(self) -> list[str]:
        """Classes that inherit a concrete class of an earlier milestone."""
        found = []
        for info in self.classes():
            for base in info.node.bases:
                parent = self.resolve(info.module, ast.unparse(base).split("[")[0])
                if parent and parent.package != info.package and not self.is_open(parent):
                    found.append(f"{info.module}.{info.node.name} inherits {parent.module}.{parent.node.name}")
        return found


def _is_error(name: str) -> bool:
    return name.split(".")[-1].endswith(("Error", "Exception"))


@pytest.fixture(scope="module")
def tree() -> SourceTree:
    return SourceTree(ROOT)


def test_no_class_inherits_a_concrete_class_of_an_earlier_milestone(tree):
    """Data may extend, behaviour may not."""
    assert "m0_basics.attention" in tree.modules
    assert tree.violations() == []


def test_the_tree_is_understood(tree):
    """The check above would pass in silence if names were not resolved."""
    llm = next(c for c in tree.classes() if (c.module, c.node.name) == ("m1_offline.llm", "LLM"))
    base = tree.resolve(llm.module, ast.unparse(llm.node.bases[0]))
    assert (base.module, base.node.name) == ("m0_basics.base_llm", "BaseLLM")
    config = next(c for c in tree.classes() if (c.module, c.node.name) == ("m1_offline.config", "EngineConfig"))
    assert tree.resolve(config.module, ast.unparse(config.node.bases[0])).module == "m0_basics.config"
    concrete = next(c for c in tree.classes() if (c.module, c.node.name) == ("m0_basics.engine", "NaiveEngine"))
    assert not tree.is_open(concrete)


@pytest.mark.parametrize(("base", "imports", "allowed"), [
    ("Concrete", "from m0_a.parts import Concrete", False),
    ("Concrete", "from m0_a import Concrete", False),                       # re-exported by the package
    ("Other", "from m0_a.parts import Concrete as Other", False),
    ("parts.Concrete", "from m0_a import parts", False),
    ("m0_a.parts.Concrete", "import m0_a.parts", False),
    ("p.Concrete", "import m0_a.parts as p", False),
    ("Implementation", "from m0_a.parts import Implementation", False),     # of an abstract base, and concrete
    ("Mutable", "from m0_a.parts import Mutable", False),
    ("Seam", "from m0_a.parts import Seam", True),
    ("Data", "from m0_a import Data", True),
    ("BadError", "from m0_a.parts import BadError", True),
    ("Kind", "from m0_a.parts import Kind", True),
    ("Module", "from torch.nn import Module", True),
])
def test_the_check_can_fail(base, imports, allowed, tmp_path):
    (tmp_path / "m0_a").mkdir()
    (tmp_path / "m1_b").mkdir()
    (tmp_path / "m0_a" / "__init__.py").write_text("from .parts import Concrete, Data\n")
    (tmp_path / "m0_a" / "parts.py").write_text(
        "from abc import ABC\nfrom dataclasses import dataclass\nfrom enum import Enum\n"
        "class Seam(ABC): ...\nclass Implementation(Seam): ...\nclass Concrete: ...\n"
        "@dataclass(frozen=True)\nclass Data: ...\n@dataclass\nclass Mutable: ...\n"
        "class BadError(ValueError): ...\nclass Kind(Enum): ...\n")
    (tmp_path / "m1_b" / "__init__.py").touch()
    (tmp_path / "m1_b" / "mine.py").write_text(f"{imports}\nclass Mine({base}): ...\n")
    assert (SourceTree(tmp_path).violations() == []) == allowed


@pytest.mark.parametrize("package", PACKAGES)
def test_files_are_short(package):
    """A file that does not fit into a head does not fit into a lesson."""
    lengths = {str(f.relative_to(ROOT)): len(f.read_text(encoding="utf-8").splitlines())
               for f in (ROOT / package).rglob("*.py")}
    assert lengths
    assert {file: n for file, n in lengths.items() if n > MAX_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_idea_stands_alone(package):
    """Each milestone's idea: at most 80 lines, torch and the standard library, and nothing of the lab."""
    source = (ROOT / package / "idea.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 80
    imports = [node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.Import, ast.ImportFrom))]
    assert not any(isinstance(node, ast.ImportFrom) and node.level for node in imports)
    names = {name for node in imports for name in (
        [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])}
    assert {name.split(".")[0] for name in names} <= {"torch", *sys.stdlib_module_names}


@pytest.mark.parametrize("package", PACKAGES)
def test_a_folder_shows_its_engine(package):
    """What a learner sees first is the engine, and not what measures and documents it: that is in `tools/`."""
    assert len(entries(ROOT / package)) <= MAX_ENTRIES.get(package, 24), entries(ROOT / package)


@pytest.mark.parametrize("package", PACKAGES)
def test_a_milestone_is_complete(package):
    """The same files in every milestone. The tests named here check its documents and its exercises."""
    assert [name for name in HAS if not (ROOT / package / name).is_file()] == []


def test_import_contracts_know_every_milestone():
    """All other lists are patterns over the folders."""
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    (layers,) = (contract["layers"] for contract in lint["contracts"] if contract["type"] == "layers")
    assert lint["root_packages"] == PACKAGES
    assert layers == PACKAGES[::-1]


def test_importing_a_package_is_light():
    """Optional and slow packages are imported where they are used: the engine runs without them."""
    code = f"import sys\nfor p in {PACKAGES}: __import__(p); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split("\n") == ["[]"] * len(PACKAGES) + [""]
