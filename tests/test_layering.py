"""Imports go one way, and the base install needs torch alone."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "dti_fast"
# From the bottom to the top: a layer imports from those before it and from itself.
LAYERS = (
    "errors", "quiet", "limits", "reference", "kernels", "ops", "sphere", "optim", "tokens", "files", "frozen",
    "formats", "pipelines", "blend", "devices", "backbones", "data", "loss", "memory", "progress", "drawing",
    "trainer", "session", "pocket", "evaluate", "commands", "cli",
)  # fmt: skip
HEAVY = {"diffusers", "transformers", "PIL", "numpy", "rich", "cyclopts", "bitsandbytes", "xformers", "peft"}
LIGHT = {"errors", "limits", "reference", "kernels", "ops", "sphere", "optim"}  # never see a heavy package
LAZY = {
    "quiet",
    "tokens",
    "files",
    "frozen",
    "formats",
    "pipelines",
    "blend",
    "devices",
    "backbones",
}  # only inside functions


def read(package: Path) -> dict[str, ast.Module]:
    """The modules of a package by their dotted names."""
    trees = {}
    for path in sorted(package.rglob("*.py")):
        parts = [package.name, *path.relative_to(package).with_suffix("").parts]
        trees[".".join(parts).removesuffix(".__init__")] = ast.parse(path.read_text(), filename=str(path))
    return trees


def imports(module: str, tree: ast.Module, is_package: bool, top_level_only: bool = False) -> set[str]:
    """Absolute dotted names that a module imports; of `from x import y` both x and x.y."""
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                base = ".".join([*parents[: len(parents) - node.level + 1], *([base] if base else [])])
            found |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    return found


def only_for_types(tree: ast.Module) -> ast.Module:
    """The module without what stands under `if TYPE_CHECKING`."""
    body = [n for n in tree.body if not (isinstance(n, ast.If) and "TYPE_CHECKING" in ast.unparse(n.test))]
    return ast.Module(body, [])


def graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """For each module those of the package that it imports, lazily or not."""
    packages = {name.rpartition(".")[0] for name in trees}
    edges = {}
    for name, tree in trees.items():
        wanted = imports(name, only_for_types(tree), name in packages)
        edges[name] = {other for other in wanted if other in trees and other != name}
        # `from package import module` runs the package too, but needs nothing of it.
        edges[name] -= {other for other in edges[name] if any(deeper.startswith(f"{other}.") for deeper in edges[name])}
    return edges


def cycles(edges: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import one another, in a circle."""
    order, seen = [], set()

    def visit(name, edges, out):
        stack = [(name, iter(sorted(edges[name])))]
        seen.add(name)
        while stack:
            node, rest = stack[-1]
            following = next((other for other in rest if other not in seen), None)
            if following is None:
                out.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(sorted(edges[following]))))

    for name in edges:
        if name not in seen:
            visit(name, edges, order)
    backwards = {name: {other for other in edges if name in edges[other]} for name in edges}
    seen.clear()
    groups = []
    for name in reversed(order):
        if name not in seen:
            group = []
            visit(name, backwards, group)
            if len(group) > 1:
                groups.append(sorted(group))
    return groups


def upward(edges: dict[str, set[str]]) -> list[str]:
    """Imports of a layer from one above it."""
    wrong = []
    for name, others in edges.items():
        if "." not in name:
            continue
        rank = LAYERS.index(name.split(".")[1])
        for other in others:
            if "." in other and LAYERS.index(other.split(".")[1]) > rank:
                wrong.append(f"{name} imports {other}")
    return wrong


@pytest.fixture(scope="module")
def trees():
    return read(PACKAGE)


def test_nothing_imports_upwards_or_in_a_circle(trees):
    edges = graph(trees)
    assert not upward(edges)
    assert not cycles(edges)


@pytest.mark.parametrize(
    ("module", "statement", "kind"),
    [
        ("formats", "from dti_fast.backbones import load", "upward"),
        ("sphere", "from dti_fast.optim import SphericalSGD", "upward"),
        ("reference.geglu", "from dti_fast.kernels import geglu", "upward"),
        ("ops.geglu", "def f():\n    from ..frozen import engine", "upward"),
        ("ops.geglu", "from dti_fast import frozen", "upward"),
        ("trainer.config", "from .run import prepare", "cycle"),
        ("frozen.layers", "def f():\n    import dti_fast.frozen.engine", "cycle"),
    ],
)
def test_what_is_forbidden_is_found(trees, module, statement, kind):
    name = f"dti_fast.{module}"
    changed = ast.Module([*ast.parse(statement).body, *trees[name].body], [])
    edges = graph({**trees, name: changed})
    assert upward(edges) if kind == "upward" else cycles(edges)


def test_heavy_packages_stay_in_their_layers(trees):
    wrong = []
    for name, tree in trees.items():
        layer = [*name.split("."), ""][1]
        if layer in LIGHT | LAZY:
            found = imports(name, only_for_types(tree), False, top_level_only=layer in LAZY)
            wrong += [f"{name}: {other}" for other in found if other.split(".")[0] in HEAVY]
    assert not wrong


def test_only_ops_and_kernels_import_triton(trees):
    layers = {
        name.split(".")[1]
        for name, tree in trees.items()
        for other in imports(name, tree, False)
        if other.split(".")[0] == "triton" and "." in name
    }
    assert layers <= {"ops", "kernels"}


def test_import_costs_torch_alone():
    code = "import sys, dti_fast; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "torch" in loaded
    assert not {"diffusers", "transformers", "triton", "PIL", "rich", "cyclopts"} & set(loaded)


if __name__ == "__main__":
    edges = graph(read(PACKAGE))
    print(f"{len(edges)} modules, {sum(map(len, edges.values()))} imports")
    print(*(["no import cycle"] if not cycles(edges) else cycles(edges)), sep="\n")
    print(*(upward(edges) or ["no upward import"]), sep="\n")
