"""Can the tests fail? Changes the code one operator or number at a time, and runs the tests that must notice.

    python benchmarks/mutants.py [--targets losses gating] [--minutes 60] [--sample 100]

The changes are cosmic-ray's (https://cosmic-ray.readthedocs.io), and so are the session files, one for each target,
which its own commands read, too. `mutants.toml` names the modules, the tests, and the survivors that no test could
notice, with reasons. Sources on disk are never touched: each mutant lives in a forked process that has torch and
transformers loaded already and imports the changed module from memory, so that it costs little more than its tests. A
mutant that takes four times as long as the unchanged code, by the CPU's clock, counts as killed.

Everything is kept in `--output_dir`: a run that was stopped goes on where it was, and begins anew where sources have
changed. Changed tests are tried on survivors alone (`--again survivors`), or on everything (`--again all`).
"""

from __future__ import annotations

import ast
import difflib
import hashlib
import importlib
import importlib.abc
import importlib.util
import json
import math
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import tomllib
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NoReturn

import pytest
from cosmic_ray.commands.init import init as fill
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[1]
PACKAGE = "uoe_peft"
# Loaded in every child anew: what is changed, and what tests it.
OWN = (PACKAGE, "tests", "conftest", "__main__")
PASSED = 0
CPU_TIME_OVER = (-signal.SIGXCPU, -signal.SIGKILL)
TIMEOUT = "timeout"


@dataclass
class MutantsArguments:
    """What to try, and for how long."""

    targets: list[str] | None = field(default=None, metadata={"help": "Tables of mutants.toml; None: all."})
    minutes: float = field(default=60.0, metadata={"help": "No mutant begins after this; start again to go on."})
    sample: int | None = field(default=None, metadata={"help": "At most this many of each target; None: all."})
    seed: int = field(default=0, metadata={"help": "Of the order, and so of the sample."})
    again: Literal["none", "survivors", "all"] = field(
        default="none", metadata={"help": "Which results to throw away first."}
    )
    output_dir: Path = field(default=Path("outputs/mutants"), metadata={"help": "Where sessions and survivors go."})


@dataclass(frozen=True)
class Target:
    """Modules and what must notice their changes."""

    name: str
    modules: list[Path]
    tests: list[str]

    @property
    def fingerprint(self) -> str:
        """Of the sources: results of other ones would name other lines."""
        return hashlib.sha256(b"".join(path.read_bytes() for path in self.modules)).hexdigest()


def main() -> None:
    """Try what has not been tried, then print a table and write down the survivors."""
    (args,) = HfArgumentParser(MutantsArguments).parse_args_into_dataclasses()
    os.chdir(ROOT)
    sys.path.insert(0, str(ROOT))
    config = tomllib.loads((ROOT / "benchmarks/mutants.toml").read_text(encoding="utf-8"))
    unknown = set(args.targets or ()) - set(config["targets"])
    if unknown:
        raise ValueError(f"unknown targets {sorted(unknown)}; use {sorted(config['targets'])}")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + 60 * args.minutes
    lines = ["| target | mutants | tried | killed | of them by time | equivalent | survived |", "|---" * 7 + "|"]
    for name, table in config["targets"].items():
        if args.targets and name not in args.targets:
            continue
        modules = sorted(path for pattern in table["modules"] for path in Path().glob(pattern))
        target = Target(name, modules, table["tests"])
        with session(target, args) as database:
            try_mutants(target, database, args, until=until)
            lines.append(report(target, database, config.get("equivalent", []), args.output_dir))
    print("\n".join(lines))


# ---- Sessions ----


def session(target: Target, args: MutantsArguments) -> Any:
    """The target's session file: as it was left, or new where its sources have changed."""
    path = args.output_dir / f"{target.name}.sqlite"
    stamp = path.with_suffix(".sha256")
    if not stamp.exists() or stamp.read_text() != target.fingerprint:
        with use_db(str(path), WorkDB.Mode.create) as database:
            fill(target.modules, database, {})
            keep_only_code(database)
        stamp.write_text(target.fingerprint)
    elif args.again != "none":
        forget_results(path, survivors_only=args.again == "survivors")
    return use_db(str(path), WorkDB.Mode.open)


def keep_only_code(database: Any) -> None:
    """Leave out changes of annotations: nothing evaluates them."""
    items = list(database.work_items)
    annotated = {path: annotation_ranges(path) for path in {Path(mutation_of(item).module_path) for item in items}}
    database.clear()
    database.add_work_items(
        item
        for item in items
        if not any(
            start <= mutation_of(item).start_pos and mutation_of(item).end_pos <= end
            for start, end in annotated[Path(mutation_of(item).module_path)]
        )
    )


def annotation_ranges(path: Path) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """First and last `(line, column)` of every annotation of a module."""
    found: list[ast.expr | None] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        match node:
            case ast.arg(annotation=annotation) | ast.AnnAssign(annotation=annotation):
                found.append(annotation)
            case ast.FunctionDef(returns=annotation):
                found.append(annotation)
    return [
        ((node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0))
        for node in found
        if node is not None
    ]


def forget_results(path: Path, *, survivors_only: bool) -> None:
    """Put mutants back into the queue."""
    with use_db(str(path), WorkDB.Mode.open) as database:
        items = list(database.work_items)
        keep = [(j, r) for j, r in database.results if survivors_only and r.test_outcome != TestOutcome.SURVIVED]
        database.clear()
        database.add_work_items(items)
        for job_id, result in keep:
            database.set_result(job_id, result)


def mutation_of(item: WorkItem) -> MutationSpec:
    """The one change of a work item."""
    return item.mutations[0]


# ---- Running ----


def try_mutants(target: Target, database: Any, args: MutantsArguments, *, until: float) -> None:
    """Run the tests on each mutant that has no result yet, as long as there is time."""
    order = [item.job_id for item in database.work_items]
    random.Random(args.seed).shuffle(order)
    pending = {item.job_id: item for item in database.pending_work_items}
    chosen = [job_id for job_id in order[: args.sample] if job_id in pending]
    if not chosen or time.monotonic() > until:
        return
    limit = 4 * preload(target, args.output_dir)
    for number, job_id in enumerate(chosen):
        if time.monotonic() > until:
            print(f"{target.name}: {args.minutes} minutes are over, {len(chosen) - number} left; start again to go on")
            return
        mutation = mutation_of(pending[job_id])
        path = Path(mutation.module_path)
        source = path.read_text(encoding="utf-8")
        operator = get_operator(mutation.operator_name)(**mutation.operator_args)
        mutant = mutate_code(source, operator, mutation.occurrence)
        outcome, output = in_child(partial(run_tests, target.tests, path, mutant), limit=limit)
        lines = (text.split("\n") for text in (source, mutant))
        change = "\n".join(difflib.unified_diff(*lines, fromfile=str(path), tofile=str(path), n=1, lineterm=""))
        verdict = TestOutcome.SURVIVED if outcome == PASSED else TestOutcome.KILLED
        said = TIMEOUT if outcome in CPU_TIME_OVER else output
        database.set_result(job_id, WorkResult(WorkerOutcome.NORMAL, said, verdict, change))
        print(f"{target.name} {number + 1}/{len(chosen)}: {verdict.value}", flush=True)


def preload(target: Target, output_dir: Path) -> int:
    """Load what the tests need but do not test, for all children to share; CPU seconds that it and the tests take."""
    names = output_dir / "modules.json"

    def baseline() -> int:
        status = run_tests(target.tests, None, "")
        names.write_text(json.dumps([name for name in sys.modules if name.split(".")[0] not in OWN]))
        return status

    before = cpu_seconds_of_children()
    outcome, output = in_child(baseline, limit=3600)
    if outcome != PASSED:
        raise RuntimeError(f"the tests of {target.name} must pass on the unchanged code first:\n{output}")
    for name in json.loads(names.read_text()):
        with suppress(Exception):  # modules that others put there under names of their own
            importlib.import_module(name)
    return math.ceil(cpu_seconds_of_children() - before)


def in_child(call: Callable[[], int], *, limit: int) -> tuple[int, str]:
    """What a call returns in a forked process, and the end of what it prints.

    Args:
        call: What to do there.
        limit: Seconds of the CPU after which it is ended, with `CPU_TIME_OVER` as what it returned.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _run_and_exit(call, output.fileno(), limit)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()[-3000:].decode(errors="replace")


def _run_and_exit(call: Callable[[], int], output: int, limit: int) -> NoReturn:
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    for stream in (1, 2):
        os.dup2(output, stream)
    try:
        status = call()
    except BaseException:  # else the child would go on as its parent
        traceback.print_exc()
        status = 3
    sys.stdout.flush()
    os._exit(status)


def cpu_seconds_of_children() -> float:
    """What all ended children took of the CPU."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run_tests(tests: list[str], path: Path | None, source: str) -> int:
    """Run tests in this process, with one module's source replaced."""
    # The package's front door opens every room; a target's tests need few of them, and each mutant would wait for all.
    closed = ModuleType(PACKAGE)
    closed.__path__ = [str(ROOT / PACKAGE)]
    sys.modules[PACKAGE] = closed
    if path is not None:
        sys.meta_path.insert(0, FromMemory(path, source))
    # Plugins that were loaded with the rest cannot rewrite their own assertions any more, which no test needs.
    already = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    return int(pytest.main(["-x", "-q", "--tb=line", "-p", "no:cacheprovider", "-W", already, *tests]))


class FromMemory(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """Finds one module of the package, with another source than that on disk."""

    def __init__(self, path: Path, source: str) -> None:
        self.path, self.source = path.resolve(), source
        self.is_init = path.name == "__init__.py"
        self.name = ".".join((path.parent if self.is_init else path.with_suffix("")).parts)

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """The module's spec; None for all others."""
        if fullname != self.name:
            return None
        spec = importlib.util.spec_from_file_location(fullname, self.path)
        assert spec is not None
        spec.loader = self
        return spec

    def get_source(self, fullname: str) -> str:
        """The changed source."""
        return self.source

    def is_package(self, fullname: str) -> bool:
        """Whether it is a package's `__init__`."""
        return self.is_init


# ---- Reporting ----


def report(target: Target, database: Any, equivalent: list[dict[str, str]], output_dir: Path) -> str:
    """A row of the table; survivors that are not known to be equivalent go into a file."""
    results = [result for _, result in database.results]
    survived = [result for result in results if result.test_outcome == TestOutcome.SURVIVED]
    unexplained = [result.diff for result in survived if not is_equivalent(result.diff, equivalent)]
    (output_dir / f"{target.name}.survivors.diff").write_text("\n\n".join(unexplained) + "\n", encoding="utf-8")
    numbers = {
        "mutants": database.num_work_items,
        "tried": len(results),
        "killed": len(results) - len(survived),
        "of them by time": sum(result.output == TIMEOUT for result in results),
        "equivalent": len(survived) - len(unexplained),
        "survived": len(unexplained),
    }
    return f"| {target.name} | " + " | ".join(map(str, numbers.values())) + " |"


def is_equivalent(change: str, known: list[dict[str, str]]) -> bool:
    """Whether `mutants.toml` gives a reason why no test can notice a change."""
    path, *lines = [line for line in change.split("\n") if line.startswith("+")]
    return any(entry["module"] in path and re.search(entry["line"], line) for entry in known for line in lines)


if __name__ == "__main__":
    main()
