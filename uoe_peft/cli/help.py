"""What `uoe-peft STAGE --help` prints, read from the sources: nothing is imported, so nobody waits for torch.

Options are fields of dataclasses, each with a help text. Those of TRL and transformers are left to `--help_all`.
"""

from __future__ import annotations

import ast
import textwrap
from dataclasses import dataclass
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_STAGES = "cli/stages"
_TRAINING = "training/config.py"
# Of TRL and transformers, what a first run needs; `--help_all` explains them.
_USUAL = (
    "--output_dir (needed) --num_train_epochs --max_steps --per_device_train_batch_size "
    "--gradient_accumulation_steps --max_length --logging_steps --save_strategy --seed --report_to "
    "--resume_from_checkpoint"
)


@dataclass(frozen=True)
class Option:
    """One option as `--help` shows it.

    Attributes:
        name: Without dashes.
        choices: Values that it takes; empty where any will do.
        default: As written in the source; None where the option must be given.
        text: What it means.
    """

    name: str
    choices: tuple[str, ...]
    default: str | None
    text: str


def help_of(stage: str) -> str:
    """The help text of a stage, its own options first."""
    path = path_of(stage)
    tree = _tree(path)
    lines = [f"usage: uoe-peft {stage} [--config FILE.yaml] [options]", "", ast.get_docstring(tree) or "", ""]
    lines += ["options:", *_table(options_of(path, _name_of_options(tree)))]
    if stage == "unlearn":
        lines += ["", "training:", *_table(options_of(_TRAINING, "UnlearningConfig"))]
        lines += ["", "of TRL and transformers, the usual ones:"]
        lines += [textwrap.fill(_USUAL, 100, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False)]
    lines += ["", "--config FILE.yaml   options in a file; those on the command line come first"]
    lines += [
        "--help_all           all options" + (", those of TRL and transformers too" if stage == "unlearn" else "")
    ]
    return "\n".join([*lines, "--traceback          show where an error was raised"])


def path_of(stage: str) -> str:
    """The module of a stage, seen from the package's folder: it has the stage's name, in whichever folder it is."""
    (path,) = (_PACKAGE / _STAGES).rglob(f"{stage}.py")
    return path.relative_to(_PACKAGE).as_posix()


def options_of(path: str, class_name: str) -> list[Option]:
    """The fields of a dataclass that the package defines, those of its bases in the package with them.

    Args:
        path: The module, seen from the package's folder.
        class_name: The dataclass.
    """
    tree = _tree(path)
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == class_name)
    own = [_option(node, tree) for node in body.body if isinstance(node, ast.AnnAssign)]
    named = [base.id for base in body.bases if isinstance(base, ast.Name)]
    places = {base: _module_of(base, tree) for base in named}
    inherited = [option for base, place in places.items() if place for option in options_of(place, base)]
    everything = [option for option in (*inherited, *own) if option is not None]
    return sorted(everything, key=lambda option: option.default is not None)  # what must be given comes first


def _module_of(name: str, tree: ast.Module) -> str | None:
    """The module of the package that a name is imported from; None for names from outside."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and name in [alias.name for alias in node.names]:
            path = Path(*(node.module or "").split(".")[1:]).with_suffix(".py")
            return str(path) if (node.module or "").startswith("uoe_peft.") and (_PACKAGE / path).is_file() else None
    return None


def _tree(path: str) -> ast.Module:
    return ast.parse((_PACKAGE / path).read_text(encoding="utf-8"))


def _name_of_options(tree: ast.Module) -> str:
    return next(node.name for node in tree.body if isinstance(node, ast.ClassDef) and node.name.endswith("Arguments"))


def _option(node: ast.AnnAssign, tree: ast.Module) -> Option | None:
    if not (isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call)):
        return None
    given = {keyword.arg: keyword.value for keyword in node.value.keywords}
    factory = given.get("default_factory")
    default = given.get("default", factory.body if isinstance(factory, ast.Lambda) else factory)
    shown = None if default is None else "[]" if default is factory else _default(default)
    text = next(
        (str(ast.literal_eval(value)) for value in ast.walk(given["metadata"]) if _is_text(value, given["metadata"])),
        "",
    )
    return Option(node.target.id, _choices(node.annotation, tree), shown, text)


def _is_text(value: ast.AST, metadata: ast.expr) -> bool:
    return isinstance(metadata, ast.Dict) and value in metadata.values


def _default(value: ast.expr) -> str:
    if not _is_literal(value):
        return ""
    literal = ast.literal_eval(value)
    return " ".join(map(str, literal if isinstance(literal, list) else [literal]))


def _is_literal(value: ast.expr) -> bool:
    try:
        ast.literal_eval(value)
    except ValueError:
        return False
    return True


def _choices(annotation: ast.expr, tree: ast.Module) -> tuple[str, ...]:
    """What a `Literal` allows, also one that another module names."""
    if isinstance(annotation, ast.Subscript) and ast.unparse(annotation.value) == "Literal":
        values = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
        return tuple(str(ast.literal_eval(value)) for value in values)
    if not isinstance(annotation, ast.Name):
        return ()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == annotation.id:
            return _choices(node.value, tree)
    place = _module_of(annotation.id, tree)
    return _choices(annotation, _tree(place)) if place else ()


def _table(options: list[Option]) -> list[str]:
    lines = []
    for option in options:
        among = f" One of {', '.join(option.choices)}." if option.choices else ""
        value = " (needed)" if option.default is None else f" [{option.default}]" if option.default else ""
        head = f"  --{option.name}"
        start = f"{head:30}" if len(head) < 29 else f"{head}\n{'':30}"
        wrapped = textwrap.wrap(option.text + among + value, 84, break_on_hyphens=False)
        lines.append(start + f"\n{'':30}".join(wrapped))
    return lines
