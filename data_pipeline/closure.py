"""Which code decides a number: everything that its definitions reach, found in the source, never listed by hand.

The names of what is made once (units, rows, references, evaluators, sets of samples) follow a hash of this. The walk begins at a
class or function and goes on to every definition of ours that its source mentions, through the imports of its module, and so on.
Comments, layout, docstrings, the sentences of errors and what is only printed or logged count for nothing; all else does.
"""

import ast
import hashlib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # the folder of the rooms
ROOMS = ("configs", "data_pipeline", "trainer", "cluster")
NAME = "freeguide"  # the package that they are parts of

# Where the walk ends, and why: modules, and rooms with all that is in them. What is not named here counts.
HARMLESS = {
    "freeguide.configs.errors": "the kinds of errors decide no number",
    "freeguide.configs.schema": "options are conditions by their values, see freeguide.cluster.evaluation.conditions",
    "freeguide.configs.locations": "says where things are",
    **{
        f"freeguide.configs.{module}": "makes a config out of text; its values are conditions"
        for module in ("load", "merge", "references", "places", "stored", "sweep", "checks")
    },
    **dict.fromkeys(
        ("freeguide.data_pipeline.checks", "freeguide.trainer.checks", "freeguide.cluster.evaluation.checks"), "refuses options"
    ),
    "freeguide.data_pipeline.artifact": "what it reads is what was written, or an error",
    "freeguide.data_pipeline.closure": "names the code, and decides nothing that it names",
    "freeguide.data_pipeline.store": "the room moves bytes, whole or not at all",
}


@cache
def code_version(*entries: str, root: Path = ROOT) -> str:
    """A hash of all that `entries`, as "package.module:name", reach in the sources below `root`: equal for equal meaning.

    Once for each process. Raises LookupError for an entry that does not exist.
    """
    digest = hashlib.sha256()
    for place, text in sorted(reached(*entries, root=root).items()):
        digest.update(f"{place}\n{text}\n".encode())
    return digest.hexdigest()[:12]


def reached(*entries: str, root: Path = ROOT) -> dict[str, str]:
    """Every definition that `entries` reach, as "package.module:name", with its meaning as text."""
    modules: dict[str, _Module | None] = {}

    def module(name: str) -> "_Module | None":
        if name not in modules:
            modules[name] = _parsed(root, name)
        return modules[name]

    def definitions(name: str, chain: list[str]) -> Iterator[tuple[str, str]]:
        """The definitions that `chain` (a name, and attributes of it) means, read in the module `name`."""
        here = module(name)
        if here is None or any(f"{name}.".startswith(f"{end}.") for end in HARMLESS):
            return
        if not chain:  # the module itself: whatever it defines may be used
            yield from ((name, own) for own in here.definitions)
        elif chain[0] in here.definitions:
            yield name, chain[0]
        elif chain[0] in here.imports:
            yield from definitions(*_target(here.imports[chain[0]], chain[1:], module))
        elif module(f"{name}.{chain[0]}"):
            yield from definitions(f"{name}.{chain[0]}", chain[1:])

    found: dict[str, str] = {}
    todo: list[tuple[str, str]] = []
    for entry in entries:
        place, _, name = entry.partition(":")
        if not (known := list(definitions(place, [name]))):
            raise LookupError(f"there is no {entry}")
        todo += known
    while todo:
        place, name = todo.pop()
        if f"{place}:{name}" in found:
            continue
        here = module(place)
        assert here is not None
        found[f"{place}:{name}"], chains = here.definition(name)
        if name != _LOOSE:
            todo.append((place, _LOOSE))
        todo += [other for chain in chains for other in definitions(place, chain)]
    return found


_LOOSE = "(what runs when the module is imported)"


class _Module:
    """The top-level definitions of a module by name, its imports (local name -> what it stands for), and its other statements."""

    def __init__(self, text: str) -> None:
        self.imports: dict[str, str] = {}
        self.definitions: dict[str, list[ast.stmt]] = {_LOOSE: []}
        tree = ast.parse(text)
        for node in ast.walk(tree):  # imports inside functions too
            if isinstance(node, ast.Import):
                for alias in node.names:  # without another name, only its first part becomes known
                    whole = alias.name if alias.asname else alias.name.split(".")[0]
                    self.imports[alias.asname or whole] = whole
            elif isinstance(node, ast.ImportFrom):
                self.imports |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        for node in _Untold().visit(tree).body:
            if isinstance(node, ast.Import | ast.ImportFrom):
                continue
            for name in _bound(node) or [_LOOSE]:
                self.definitions.setdefault(name, []).append(node)
        self._known: dict[str, tuple[str, list[list[str]]]] = {}

    def definition(self, name: str) -> tuple[str, list[list[str]]]:
        """Its meaning as text, and what it mentions."""
        if name not in self._known:
            nodes = self.definitions[name]
            self._known[name] = " ".join(map(_meaning, nodes)), [chain for node in nodes for chain in _mentioned(node)]
        return self._known[name]


@cache
def _module_of(text: str) -> _Module:
    return _Module(text)


def _parsed(root: Path, name: str) -> _Module | None:
    package, *inside = name.split(".")
    if package != NAME or not set(inside[:1]) <= set(ROOMS):
        return None
    if not inside:  # its own file finds the rooms and decides nothing
        return _module_of("")
    place = root.joinpath(*inside)
    for path in (place.with_suffix(".py"), place / "__init__.py"):
        if path.is_file():
            return _module_of(path.read_text("utf-8"))
    return None


def _target(imported: str, rest: list[str], module: "Callable[[str], _Module | None]") -> tuple[str, list[str]]:
    """The module that `imported` names, or the one that it is a definition of, and the chain that is left to be read there."""
    parts = imported.split(".")
    while parts and not module(".".join(parts)):
        parts.pop()
    return ".".join(parts), imported.split(".")[len(parts) :] + rest


def _bound(node: ast.stmt) -> list[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return [node.name]
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return [found.id for target in targets for found in ast.walk(target) if isinstance(found, ast.Name)]


def _mentioned(node: ast.AST) -> Iterator[list[str]]:
    """Names that are used, each with the attributes that are taken of it."""
    if isinstance(node, ast.Attribute | ast.Name):
        chain: list[str] = []
        inner: ast.expr = node
        while isinstance(inner, ast.Attribute):
            chain.append(inner.attr)
            inner = inner.value
        if isinstance(inner, ast.Name):
            yield [inner.id, *reversed(chain)]
            return
    for child in ast.iter_child_nodes(node):
        yield from _mentioned(child)


class _Untold(ast.NodeTransformer):
    """Leaves out what only tells: docstrings and bare constants, the words of errors, what is printed, logged or warned of."""

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        if isinstance(node.value, ast.Constant):
            return None
        if isinstance(node.value, ast.Call):
            name = ast.unparse(node.value.func)
            if name == "print" or name.split(".")[0] in ("_log", "logging", "warnings"):
                return None
        return node

    def visit_Raise(self, node: ast.Raise) -> ast.AST:
        return ast.Raise()


_SILENT = ("ctx", "type_comment", "type_params", "kind", "type_ignores")


def _meaning(node: object) -> str:
    """A syntax tree as text, the same in every version of Python: `ast.dump` is not."""
    if isinstance(node, ast.AST):
        fields = [
            (name, value) for name, value in ast.iter_fields(node) if name not in _SILENT and value is not None and value != []
        ]
        return f"{type(node).__name__}({','.join(f'{name}={_meaning(value)}' for name, value in fields)})"
    if isinstance(node, list):
        return f"[{','.join(map(_meaning, node))}]"
    return repr(node)
