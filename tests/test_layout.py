"""Who may import whom. The table below is the architecture; these tests read the imports and hold the code to it."""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import uoe_peft

PACKAGE = "uoe_peft"

# The rooms by floor: a room may import rooms of lower floors only, so rooms of one floor do not know each other.
FLOORS: dict[str, int] = {
    "errors": 0,
    "palette": 0,
    "precision": 0,
    "losses": 0,
    "evaluation.metrics": 1,
    "moe": 1,
    "data": 1,
    "testbed": 1,
    "checkpoints": 1,
    "attribution": 2,
    "tuner": 2,
    "moments": 2,
    "streaming": 2,
    "dense": 2,
    "training": 3,
    "evaluation": 3,
    "export": 3,
    "requests": 4,
    "cli": 5,
    "registration": 5,
    "__init__": 5,
}

TOP = max(FLOORS.values())

# Narrower than the floors: which lower rooms a room may know at all.
ROOMS: dict[str, set[str]] = {
    "evaluation.metrics": {"losses"},
    "attribution": {"errors", "palette", "moe", "data"},
    "tuner": {"errors", "moe"},
    "moments": {"errors", "checkpoints", "moe", "data"},
    "checkpoints": set(),
    "streaming": {"errors", "moe", "data", "checkpoints"},
    "dense": {"errors", "checkpoints", "moe", "data"},
    "requests": {
        "errors",
        "checkpoints",
        "losses",
        "evaluation.metrics",
        "moe",
        "data",
        "attribution",
        "tuner",
        "moments",
        "training",
    },
}

# Packages from outside. Rooms of the highest floor may import every dependency.
OUTSIDE: dict[str, set[str]] = {
    "errors": set(),
    "palette": set(),
    "precision": {"torch"},
    "losses": {"torch"},
    "evaluation.metrics": {"torch", "numpy", "rouge_score", "scipy", "sklearn"},
    "checkpoints": {"torch", "safetensors"},
    "moe": {"torch", "transformers", "typing_extensions"},
    "data": {"torch", "transformers", "datasets", "numpy"},
    "testbed": {"datasets"},
    "attribution": {"torch", "transformers", "datasets", "numpy", "tqdm", "matplotlib"},
    "tuner": {"torch", "transformers", "peft"},
    "moments": {"torch", "transformers", "datasets", "numpy", "safetensors", "tqdm"},
    "streaming": {"torch", "transformers", "datasets", "numpy", "safetensors", "huggingface_hub", "accelerate", "tqdm"},
    "dense": {"torch", "transformers", "datasets", "safetensors", "tqdm"},
    "training": {"torch", "transformers", "datasets", "numpy", "peft", "trl", "accelerate", "safetensors"},
    "evaluation": {
        "torch",
        "transformers",
        "datasets",
        "numpy",
        "pandas",
        "peft",
        "tqdm",
        "matplotlib",
        "lm_eval",
        "nanogcg",
    },
    "export": {"torch", "transformers", "peft", "safetensors", "huggingface_hub", "tqdm"},
    "requests": {"torch", "transformers", "datasets", "numpy", "peft", "safetensors", "tqdm"},
}

Sources = Mapping[str, str]


def package_sources() -> dict[str, str]:
    """The package's modules by their path inside it, such as `moe.blocks`; a package is `moe.__init__`."""
    root = Path(uoe_peft.__file__).parent
    return {
        ".".join(path.relative_to(root).with_suffix("").parts): path.read_text(encoding="utf-8")
        for path in sorted(root.rglob("*.py"))
    }


def imports(source: str, *, with_types: bool) -> Iterator[tuple[str, str]]:
    """`(module, name)` of each import, inside functions too; those for type checkers alone only `with_types`."""
    tree = ast.parse(source)
    only_types = {
        id(node)
        for branch in ast.walk(tree)
        if isinstance(branch, ast.If) and "TYPE_CHECKING" in ast.unparse(branch.test)
        for statement in branch.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if not with_types and id(node) in only_types:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, (
                f"relative import in line {node.lineno}; write the full path, so that it can be read"
            )
            yield from ((node.module or "", alias.name) for alias in node.names)


def room_of(module: str) -> str:
    """The room of a module such as `moe.blocks`; the most specific one."""
    fitting = [room for room in FLOORS if module == room or module.startswith(f"{room}.")]
    return max(fitting, key=len, default="")


def inside(sources: Sources, module: str, name: str) -> str | None:
    """The module of this package that an import reaches, or None."""
    if module.split(".")[0] != PACKAGE:
        return None
    path = ".".join(module.split(".")[1:])
    candidates = (f"{path}.{name}", f"{path}.{name}.__init__", path, f"{path}.__init__")
    return next((c for c in (c.strip(".") for c in candidates) if c in sources), f"missing:{module}.{name}")


def forbidden_imports(sources: Sources) -> list[str]:
    """One line for each import that the tables do not allow."""
    found = []
    for importer, source in sources.items():
        room = room_of(importer)
        for module, name in imports(source, with_types=True):
            target = inside(sources, module, name)
            allowed = _outside_allowed(room, module) if target is None else _inside_allowed(room, room_of(target))
            if not allowed:
                found.append(f"{importer} imports {module} {name}".strip())
    return found


def _inside_allowed(room: str, target: str) -> bool:
    if room == target or FLOORS[room] == TOP:
        return True
    return FLOORS[target] < FLOORS[room] and target in ROOMS.get(room, FLOORS)


def _outside_allowed(room: str, module: str) -> bool:
    top = module.split(".")[0]
    if top in sys.stdlib_module_names:
        return True
    if module.startswith("peft.") and room != "tuner":  # PEFT's internals
        return False
    if module.startswith("transformers.models.") and room != "moe":  # an architecture
        return False
    return FLOORS[room] == TOP or top in OUTSIDE[room]


def cycle(sources: Sources, *, with_types: bool = False) -> list[str]:
    """Modules that import each other in a ring; empty where there is none. For types alone only `with_types`."""
    graph = {
        importer: {
            target
            for module, name in imports(source, with_types=with_types)
            if (target := inside(sources, module, name))
        }
        for importer, source in sources.items()
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_every_module_belongs_to_a_room() -> None:
    assert [module for module in package_sources() if not room_of(module)] == []


def test_rooms_import_only_what_their_floor_allows() -> None:
    assert forbidden_imports(package_sources()) == []


def test_no_module_imports_itself_in_a_ring() -> None:
    assert cycle(package_sources()) == []


def test_files_are_short_and_rooms_are_small() -> None:
    lengths = {module: len(source.splitlines()) for module, source in package_sources().items()}
    sizes = Counter(module.rpartition(".")[0] for module in lengths)
    assert {room: size for room, size in sizes.items() if size > 14} == {}
    assert {path: length for path, length in lengths.items() if length > 300} == {}


def test_in_attribution_the_data_do_not_know_what_is_made_of_them() -> None:
    room = {name: source for name, source in package_sources().items() if name.startswith("attribution.")}
    assert cycle(room, with_types=True) == []


@pytest.mark.parametrize(
    ("importer", "line"),
    [
        ("losses.forget", "import transformers"),
        ("evaluation.metrics", "from uoe_peft.errors import UnsupportedModelError"),
        ("moe.blocks", "from uoe_peft.tuner.config import UOEConfig"),
        ("data.collation", "import trl"),
        ("attribution.scores", "from uoe_peft.tuner.config import UOEConfig"),
        ("attribution.scores", "from peft import PeftModel"),
        ("training.trainer", "from uoe_peft.evaluation.metrics import answer_probability\nimport peft.tuners"),
        ("training.trainer", "def f():\n    from uoe_peft.evaluation.evaluate import evaluate_unlearning"),
        ("evaluation.evaluate", "from transformers.models.mixtral import MixtralConfig"),
        ("tuner.model", "from uoe_peft import find_moe_blocks"),
    ],
)
def test_a_forbidden_import_is_found(importer: str, line: str) -> None:
    sources = package_sources()
    planted = {**sources, importer: f"{sources.get(importer, '')}\n{line}\n"}
    assert len(forbidden_imports(planted)) == len(forbidden_imports(sources)) + 1


def test_a_ring_is_found() -> None:
    sources = {"errors": "", "moe.a": "from uoe_peft.moe import b", "moe.b": "import uoe_peft.moe.a"}
    assert set(cycle(sources)) == {"moe.a", "moe.b"}
    assert cycle({**sources, "moe.b": ""}) == []


def test_labels_that_do_not_count_have_one_name() -> None:
    named = [name for name, source in package_sources().items() if "IGNORE_INDEX = " in source]
    assert named == ["losses.answer_tokens"]
    written = {name for name, source in package_sources().items() for node in ast.walk(ast.parse(source))
               if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-100"}  # fmt: skip
    assert written == {"losses.answer_tokens"}
