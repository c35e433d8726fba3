"""The architecture as rules that hold for every file: import direction, names, the tree in the README."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "src" / "maisi"

LEVELS = (
    ("errors", "config", "volume", "anatomy", "conditions", "tumors", "request"),
    ("io", "layers", "device", "cuda_graph"),
    ("networks", "diffusion"),
    ("data", "weights", "splitting"),
    ("training", "generation"),
    ("evaluation", "presets", "baselines", "service"),
    ("cli",),
    ("__main__",),
)
"""Parts of the package: a module imports from its own part and from lower levels. This is the table's one home."""

LEVEL = {part: level for level, parts in enumerate(LEVELS) for part in parts}
FORBIDDEN_NAMES = {"utils", "util", "common", "helpers", "helper", "misc", "tools", "stuff"}
FORBIDDEN_IMPORTS = {"monai"}
"""The reference implementation is for tests of parity only: the networks of the product are our own."""

JUDGE = PACKAGE / "evaluation" / "trained_segmenter.py"
"""The one module that may import MONAI, inside its functions: what judges the product is to be independent of it."""

WITHOUT_TORCH = {"errors", "config", "volume", "anatomy", "conditions", "tumors", "request"}


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def part_of(path: Path) -> str:
    """'io' for io/nifti.py, 'volume' for volume.py, '' for the package's own __init__.py."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imported(path: Path) -> list[str]:
    """Dotted names that a module imports anywhere in it; `from maisi import volume` counts as maisi.volume."""
    names = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import; name the module in full"
            deeper = node.module in ("maisi",) or (PACKAGE.parent / (node.module or "").replace(".", "/")).is_dir()
            names += [f"{node.module}.{alias.name}" for alias in node.names] if deeper else [node.module or ""]
    return names


def parts_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("maisi.")} & LEVEL.keys()


def test_every_module_has_a_level() -> None:
    assert {part_of(path) for path in modules()} - {""} == LEVEL.keys()


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_down(path: Path) -> None:
    part = part_of(path)
    if not part:  # the front door: it names public things and imports them when they are asked for
        return
    level = LEVEL[part]
    allowed = {p for p in LEVEL if LEVEL[p] < level} | {part} | (set(LEVELS[0]) if level == 0 else set())
    upward = parts_imported(path) - allowed
    assert not upward, f"{path.relative_to(PACKAGE)} (level {level}) imports {sorted(upward)}"


def test_no_import_cycles() -> None:
    edges = {}
    for path in modules():
        dotted = "maisi." + ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        edges[dotted.removesuffix(".__init__")] = imported(path)
    graph = {module: {name for name in names if name in edges} for module, names in edges.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module in done:
            return
        for target in graph[module] - {"maisi"}:
            visit(target, (*trail, module))
        done.add(module)

    for module in graph:
        visit(module, ())


def test_no_names_that_say_nothing() -> None:
    names = {part.removesuffix(".py") for path in modules() for part in path.relative_to(PACKAGE).parts}
    assert not names & FORBIDDEN_NAMES


def test_the_reference_is_never_imported() -> None:
    for path in modules():
        if path != JUDGE:
            assert not {name.split(".")[0] for name in imported(path)} & FORBIDDEN_IMPORTS, path


def test_the_judge_imports_the_reference_when_it_is_called() -> None:
    top = [
        node
        for node in ast.parse(JUDGE.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert not [node for node in top if "monai" in ast.unparse(node)]


def test_the_words_know_no_torch() -> None:
    for path in modules():
        if part_of(path) in WITHOUT_TORCH:
            assert "torch" not in {name.split(".")[0] for name in imported(path)}, path


@pytest.mark.parametrize(
    "module",
    [
        *("maisi", "maisi.cli", "maisi.request", "maisi.io.nifti", "maisi.io.preview", "maisi.weights.registry"),
        *("maisi.generation.job", "maisi.generation.output", "maisi.weights.convert", "maisi.device"),
        *("maisi.data.quality_learning", "maisi.generation.retry", "maisi.baselines.methods"),
        *("maisi.evaluation.response", "maisi.evaluation.memorisation", "maisi.evaluation.fidelity"),
        "maisi.evaluation.medians",
        *("maisi.evaluation.volumes", "maisi.evaluation.cache", "maisi.evaluation.report"),
        *("maisi.evaluation.segmentation_cases", "maisi.evaluation.sources", "maisi.evaluation.paired_tests"),
        "maisi.evaluation.trainers",
    ],
)
def test_loads_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_says_what_it_is() -> None:
    for path in modules():
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), f"{path} has no docstring"


def tree_of(text: str) -> set[str] | None:
    """Paths of the modules in the first fenced block that starts with 'src/maisi/', or None without such a block.

    A line names one or more files (name.py) or folders (name/), then explains; deeper lines lie in the folder above.
    """
    block = re.search(r"^```\w*\nsrc/maisi/[^\n]*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    if block is None:
        return None
    found: set[str] = set()
    folders: list[tuple[int, str]] = []
    for line in block[1].splitlines():
        bare = re.sub(r"[│├└─]", " ", line)
        depth = len(bare) - len(bare.lstrip())
        folders = [(d, name) for d, name in folders if d < depth]
        inside = "".join(name for _, name in folders)
        for word in bare.split():
            if re.fullmatch(r"\w+\.py", word):
                found.add(inside + word)
            elif re.fullmatch(r"\w+/", word):
                folders.append((depth, word))
                inside += word
            else:
                break
    return found


def test_tree_parser() -> None:
    text = "```text\nsrc/maisi/\n  a.py b.py   two, see c.py\n  ├── io/     files\n  │   └── nifti.py  x\n  d.py\n```\n"
    assert tree_of(text) == {"a.py", "b.py", "io/nifti.py", "d.py"}
    assert tree_of("no tree") is None


def test_the_readme_shows_the_real_tree() -> None:
    shown = tree_of((ROOT / "README.md").read_text(encoding="utf-8"))
    assert shown is not None, "README.md has no fenced block that starts with src/maisi/"
    real = {str(path.relative_to(PACKAGE)) for path in modules() if path.name != "__init__.py"}
    assert shown == real, f"missing: {sorted(real - shown)}; not there: {sorted(shown - real)}"
