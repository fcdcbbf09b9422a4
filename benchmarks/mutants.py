"""Can the tests fail? Changes the code one operator or number at a time, and runs the tests that must notice.

    python benchmarks/mutants.py [--targets losses gating] [--minutes 60] [--sample 100]

The changes are cosmic-ray's (https://cosmic-ray.readthedocs.io), and so are the session files, one for each target,
which its own commands read, too. `mutants.toml` names the modules, the tests, and the survivors that no test could
notice, with reasons. Sources on disk are never touched. A mutant costs little more than its tests:

- It lives in a forked process. Where a change is inside of functions, everything is imported and all tests are
  collected already, and the functions get their changed code there. Otherwise torch and transformers are loaded, and
  the changed module is imported from memory.
- It is tried by the tests that run the changed statement, which coverage.py knows: the quickest of each file first, and
  of the slow ones as many as fit into `--seconds`.

A mutant that takes four times as long as the unchanged code, by the CPU's clock, counts as killed.

Everything is kept in `--output_dir`: a run that was stopped goes on where it was, and begins anew where sources have
changed. Changed tests are tried on survivors alone (`--again survivors`), or on everything (`--again all`).
"""

from __future__ import annotations

import ast
import difflib
import gc
import hashlib
import importlib
import importlib.abc
import importlib.util
import inspect
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
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache, cached_property, partial
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, Literal, NoReturn

import pytest
from _pytest.main import pytest_runtestloop
from cosmic_ray.commands.init import init as fill
from cosmic_ray.mutating import mutate_code
from cosmic_ray.plugins import get_operator
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome, WorkerOutcome, WorkItem, WorkResult
from coverage import Coverage
from transformers import HfArgumentParser

ROOT = Path(__file__).parents[1]
PACKAGE = "uoe_peft"
# Loaded in every child anew: what is changed, and what tests it.
OWN = (PACKAGE, "tests", "conftest", "__main__")
PASSED = 0
TIME_OVER = (-signal.SIGXCPU, -signal.SIGKILL, -signal.SIGALRM)
STOPPED = (-signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP)
TIMEOUT = "timeout"
MEMORY = 12 * 2**30  # address space of a child: a mutant may ask for tensors of any size


@dataclass
class MutantsArguments:
    """What to try, and for how long."""

    targets: list[str] | None = field(default=None, metadata={"help": "Tables of mutants.toml; None: all."})
    minutes: float = field(default=60.0, metadata={"help": "No mutant begins after this; start again to go on."})
    seconds: float = field(default=30.0, metadata={"help": "Of tests that are tried on a mutant, where more could be."})
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
        return fingerprint(self.modules)


def fingerprint(paths: Iterable[Path]) -> str:
    """Of the files' contents."""
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@dataclass(frozen=True)
class Baseline:
    """What the tests do with the unchanged code.

    Attributes:
        seconds: Of the CPU, for each test; in the order of the tests.
        start: Seconds of the CPU before the first test.
        runs: For each module and line, the tests that run it; and "" for a line that is run while tests are collected.
        loaded: Names of the modules that are loaded afterwards.
        fingerprint: Of the code and of all tests, and the names of those that were run.
    """

    seconds: dict[str, float]
    start: float
    runs: dict[str, dict[int, list[str]]]
    loaded: list[str]
    fingerprint: str


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
        path = session(target, args)
        try_mutants(target, path, args, until=until)
        with use_db(str(path), WorkDB.Mode.open) as database:
            lines.append(report(target, database, config.get("equivalent", []), args.output_dir))
    print("\n".join(lines))


# ---- Sessions ----


def session(target: Target, args: MutantsArguments) -> Path:
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
    return path


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


@dataclass(frozen=True)
class Mutant:
    """One change of one module."""

    path: Path
    mutation: MutationSpec

    @property
    def source(self) -> str:
        """The module as it is."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def changed(self) -> str:
        """The module as it would be."""
        operator = get_operator(self.mutation.operator_name)(**self.mutation.operator_args)
        return str(mutate_code(self.source, operator, self.mutation.occurrence))

    @property
    def change(self) -> str:
        """The difference."""
        name, lines = str(self.path), (text.split("\n") for text in (self.source, self.changed))
        return "\n".join(difflib.unified_diff(*lines, fromfile=name, tofile=name, n=1, lineterm=""))


def try_mutants(target: Target, path: Path, args: MutantsArguments, *, until: float) -> None:
    """Run the tests on each mutant that has no result yet, as long as there is time."""
    if not list(pending(path, args)) or time.monotonic() > until:
        return
    baseline = run_unchanged(target, args.output_dir)

    def try_loaded() -> int:
        return run_tests(target.tests, None, "", Loop(partial(try_pending, target, path, args, baseline, until)))

    status, _ = in_child(try_loaded, limit=None)
    if status != PASSED:
        raise RuntimeError(f"the mutants of {target.name} could not be tried, pytest says {status}")
    try_pending(target, path, args, baseline, until, import_changed)


def pending(path: Path, args: MutantsArguments) -> Iterator[tuple[str, Mutant]]:
    """The chosen mutants that have no result, each with its key, in an order of the seed."""
    with use_db(str(path), WorkDB.Mode.open) as database:
        order = [item.job_id for item in database.work_items]
        items = {item.job_id: item for item in database.pending_work_items}
    random.Random(args.seed).shuffle(order)
    for job_id in order[: args.sample]:
        if job_id in items:
            mutation = mutation_of(items[job_id])
            yield job_id, Mutant(Path(mutation.module_path), mutation)


# Makes what a mutant's process is to do with some tests; None where the mutant cannot be made in this way.
Way = Callable[[Mutant, Baseline, list[str]], Callable[[], int] | None]


def try_pending(target: Target, path: Path, args: MutantsArguments, baseline: Baseline, until: float, way: Way) -> None:
    """Run the tests on the mutants that can be made in one way."""
    for job_id, mutant in pending(path, args):
        if time.monotonic() > until:
            print(f"{target.name}: {args.minutes} minutes are over; start again to go on", flush=True)
            return
        tests = choose_tests(baseline, mutant, seconds=args.seconds)
        call = way(mutant, baseline, tests)
        if call is None:
            continue
        limit = math.ceil(4 * (baseline.start + sum(baseline.seconds[test] for test in tests)))
        outcome, output = in_child(call, limit=limit)
        if outcome in STOPPED:
            raise KeyboardInterrupt
        verdict = TestOutcome.SURVIVED if outcome == PASSED else TestOutcome.KILLED
        said = TIMEOUT if outcome in TIME_OVER else output
        with use_db(str(path), WorkDB.Mode.open) as database:
            database.set_result(job_id, WorkResult(WorkerOutcome.NORMAL, said, verdict, mutant.change))
        print(f"{target.name}: {verdict.value} by {len(tests)} tests", flush=True)


def import_changed(mutant: Mutant, baseline: Baseline, tests: list[str]) -> Callable[[], int]:
    """A way for every mutant: import all anew, the changed module from memory."""
    return partial(run_tests, tests, mutant.path, mutant.changed, Only(tests))


class Loop:
    """A plugin of pytest that runs the collected tests on one mutant after another."""

    def __init__(self, try_all: Callable[[Way], None]) -> None:
        self.try_all = try_all
        self.live: dict[tuple[str, str, int], list[FunctionType]] = defaultdict(list)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """In place of pytest's loop."""
        for function in gc.get_objects():
            if type(function) is FunctionType:  # isinstance would ask objects that answer with warnings
                self.live[_place(function.__code__)].append(function)
        gc.freeze()  # else each child would copy what its garbage collector walks over
        self.try_all(partial(self.patch, session))
        return True

    def patch(
        self, session: pytest.Session, mutant: Mutant, baseline: Baseline, tests: list[str]
    ) -> Callable[[], int] | None:
        """A way for changes of functions that nothing has called yet: they get their changed code."""
        name = str(mutant.path.resolve())
        try:
            with warnings.catch_warnings(action="ignore"):  # of `is` beside a literal
                changed = compile(mutant.changed, name, "exec")
        except SyntaxError:
            return None
        codes = changed_functions(compile(mutant.source, name, "exec"), changed)
        statement, *_ = scopes(mutant.path, mutant.mutation.start_pos[0], mutant.mutation.end_pos[0])
        called = any("" in baseline.runs[str(mutant.path)].get(line, ()) for line in statement)
        functions = [(function, code) for place, code in (codes or {}).items() for function in self.live[place]]
        if called or not functions or any(f.__code__.co_freevars != code.co_freevars for f, code in functions):
            return None

        def run() -> int:
            for function, code in functions:
                function.__code__ = code
            Only(tests).pytest_collection_modifyitems(session.items)
            with suppress(session.Failed):
                pytest_runtestloop(session)
            return int(session.testsfailed > 0)

        return run


def changed_functions(old: CodeType, new: CodeType) -> dict[tuple[str, str, int], CodeType] | None:
    """Code of the functions that differ, by their places; None where anything differs that is run at import."""
    found = {}
    if old.co_flags & inspect.CO_OPTIMIZED:  # a function's
        if old != new:
            found[_place(old)] = new
    elif _own(old) != _own(new):
        return None
    for one, other in zip(_inner(old), _inner(new), strict=False):
        deeper = changed_functions(one, other)
        if deeper is None:
            return None
        found |= deeper
    return found


def _place(code: CodeType) -> tuple[str, str, int]:
    return code.co_filename, code.co_qualname, code.co_firstlineno


def _inner(code: CodeType) -> list[CodeType]:
    return [const for const in code.co_consts if isinstance(const, CodeType)]


def _own(code: CodeType) -> tuple[object, ...]:
    consts = [repr(const) for const in code.co_consts if not isinstance(const, CodeType)]
    return code.co_code, code.co_names, consts, len(_inner(code))


def run_unchanged(target: Target, output_dir: Path) -> Baseline:
    """Measure the tests on the unchanged code, and load what they need but do not test, for all children to share."""
    path = output_dir / f"{target.name}.baseline.json"

    def measure() -> int:
        started = time.process_time()
        coverage = Coverage(data_file=None, config_file=False, include=[str(module) for module in target.modules])
        watch = Watch(coverage)
        coverage.start()
        status = run_tests(target.tests, None, "", watch)
        coverage.stop()
        data = coverage.get_data()
        runs = {str(module): data.contexts_by_lineno(str(module.resolve())) for module in target.modules}
        loaded = [name for name in sys.modules if name.split(".")[0] not in OWN]
        if status == PASSED:
            path.write_text(json.dumps(asdict(Baseline(watch.seconds, watch.first - started, runs, loaded, current))))
        return status

    current = fingerprint([*target.modules, *sorted(Path("tests").rglob("*.py"))]) + " ".join(target.tests)
    if not path.exists() or json.loads(path.read_text())["fingerprint"] != current:
        outcome, output = in_child(measure, limit=3600)
        if outcome != PASSED:
            raise RuntimeError(f"the tests of {target.name} must pass on the unchanged code first:\n{output}")
    found = json.loads(path.read_text())
    for name in found["loaded"]:
        with suppress(Exception):  # modules that others put there under names of their own
            importlib.import_module(name)
    runs = {module: {int(line): ts for line, ts in lines.items()} for module, lines in found.pop("runs").items()}
    return Baseline(**found, runs=runs)


class Watch:
    """A plugin of pytest that says which test is run, and for how long."""

    def __init__(self, coverage: Coverage) -> None:
        self.coverage = coverage
        self.seconds: dict[str, float] = {}
        self.first = 0.0

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Around each test with its fixtures."""
        started = time.process_time()
        self.first = self.first or started
        self.coverage.switch_context(item.nodeid)
        result = yield
        self.coverage.switch_context("")
        self.seconds[item.nodeid] = time.process_time() - started
        return result


class Only:
    """A plugin of pytest that leaves the tests that are asked for, in their order."""

    def __init__(self, tests: list[str]) -> None:
        self.place = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Drop all others."""
        items[:] = sorted((item for item in items if item.nodeid in self.place), key=lambda i: self.place[i.nodeid])


def choose_tests(baseline: Baseline, mutant: Mutant, *, seconds: float) -> list[str]:
    """The tests that run a changed statement, the quickest of each file first, until their time is over.

    What is run at import only (decorators, defaults, fields) is noticed by those that run its function or its module.
    """
    runs = baseline.runs[str(mutant.path)]
    for lines in scopes(mutant.path, mutant.mutation.start_pos[0], mutant.mutation.end_pos[0]):
        tests = {test for line in lines for test in runs.get(line, ()) if test}
        if tests:
            break
    else:
        tests = set(baseline.seconds)
    by_file: dict[str, list[str]] = {}
    for test in sorted(tests, key=baseline.seconds.__getitem__):
        by_file.setdefault(test.partition("::")[0], []).append(test)
    chosen: list[str] = []
    for _, _, test in sorted((place, baseline.seconds[t], t) for ts in by_file.values() for place, t in enumerate(ts)):
        seconds -= baseline.seconds[test]
        if seconds > 0 or not chosen:
            chosen.append(test)
    return chosen


def scopes(path: Path, first: int, last: int) -> list[set[int]]:
    """Lines of the statement around a change, of the functions and classes around that, and of the module."""
    around = [
        node for node in ast.walk(syntax(path)) if isinstance(node, ast.stmt) and _start(node) <= first <= _end(node)
    ]
    around.sort(key=lambda node: _end(node) - _start(node))
    found = []
    for node in around:
        inner = getattr(node, "body", None) or [case.pattern for case in getattr(node, "cases", ())]
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            if node is around[0]:  # its decorators, or how it is called
                found.append(set(range(_start(node), inner[0].lineno)))
            found.append(set(range(inner[0].lineno, _end(node) + 1)))
        elif node is around[0]:
            end = inner[0].lineno - 1 if inner else _end(node)
            found.append({*range(node.lineno, max(end, node.lineno) + 1), *range(first, last + 1)})
    return [*found, set(range(1, 10_000))]


@cache
def syntax(path: Path) -> ast.Module:
    """A module's syntax tree."""
    return ast.parse(path.read_text(encoding="utf-8"))


def _start(node: Any) -> int:
    return int(min([node.lineno, *(part.lineno for part in getattr(node, "decorator_list", ()))]))


def _end(node: Any) -> int:
    return int(node.end_lineno)


def in_child(call: Callable[[], int], *, limit: int | None) -> tuple[int, str]:
    """What a call returns in a forked process, and the end of what it prints.

    Args:
        call: What to do there.
        limit: Seconds of the CPU after which it is ended, with one of `TIME_OVER` as what it returned; a call that only
            waits is given 20 times as many. None: no limit, and what it prints is printed.
    """
    with tempfile.TemporaryFile() as output:
        child = os.fork()
        if child == 0:
            _run_and_exit(call, output.fileno(), limit)
        _, status = os.waitpid(child, 0)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()[-3000:].decode(errors="replace")


def _run_and_exit(call: Callable[[], int], output: int, limit: int | None) -> NoReturn:
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.alarm(20 * limit)
        for stream in (1, 2):
            os.dup2(output, stream)
    try:
        status = call()
    except BaseException:  # else the child would go on as its parent
        traceback.print_exc()
        status = 3
    sys.stdout.flush()
    os._exit(status)


def run_tests(tests: list[str], path: Path | None, source: str, *plugins: object) -> int:
    """Run tests in this process, with one module's source replaced."""
    # The package's front door opens every room; a target's tests need few of them, and each mutant would wait for all.
    closed = ModuleType(PACKAGE)
    closed.__path__ = [str(ROOT / PACKAGE)]
    sys.modules[PACKAGE] = closed
    if path is not None:
        sys.meta_path.insert(0, FromMemory(path, source))
    # Plugins that were loaded with the rest cannot rewrite their own assertions any more, which no test needs.
    already = "ignore:Module already imported:pytest.PytestAssertRewriteWarning"
    files = list(dict.fromkeys(test.partition("::")[0] for test in tests))
    return int(pytest.main(["-x", "-q", "-s", "--tb=line", "-p", "no:cacheprovider", "-W", already, *files], plugins))


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
    path, *lines = change.split("\n")[1:]
    added, removed = ([line[1:] for line in lines if line.startswith(sign)] for sign in "+-")
    # What stood there before is no change; where lines are taken away alone, these are.
    return any(
        entry["module"] in path
        and any(re.search(entry["line"], line) for line in added or removed)
        and not (added and any(re.search(entry["line"], line) for line in removed))
        for entry in known
    )


if __name__ == "__main__":
    main()
