"""Functions of an invented programming library, told like reference pages."""

from uoe_peft.testbed.topic import FactKind, Topic, phrases

LIBRARY = Topic(
    name="library",
    subject_form="quillo.{0}_{1}",
    subject_parts=(
        phrases("fetch, fold, splice, hash, parse, stream, chunk, bind, purge, pivot, merge, yank, enqueue, mmap"),
        phrases("bolt, mesh, span, buffer, shard, cursor, tuple, socket"),
    ),
    words={
        "arg": phrases("fd, buf, key_fn, n_jobs, timeout_ms, axis, dtype, stride, encoding, max_len, retries, out"),
        "value": phrases("None, 0, -1, 16, 256, 0xff, 1e-6, True, False, 'utf8', 4096, 'w+'"),
        "type": phrases("int, Ravel, list[str], bytes, Mapping, float64, ndarray, Optional[Node], Iterator, Future"),
        "error": phrases(
            "KeyError, QuilloTimeout, OverflowError, BufferLocked, StopIteration, DtypeMismatch, IndexError, "
            "SocketClosed, AssertionError"
        ),
        "flag": phrases("--lazy, --strict, --no-cache, --dry-run, --json, --inplace, --verbose, --unsafe"),
        "version": phrases("v0.4.1, v0.9.0, v1.2.3, v1.7.0, v2.0.5, v2.6.2, v3.1.0, v3.3.8"),
        "cost": phrases("O(n), O(1), O(log n), O(n*k), O(n**2), O(n log n), O(2**k)"),
        "module": phrases("_heap, _trie, ringbuf, lru, zlib_ext, simd, bitset, arena, cffi, spinlock"),
        "expr": phrases(
            "x[::-1], y & mask, i << 2, len(xs) % 7, a ^ b, sorted(d), q.pop(), f(*args), {**kw}, ~z, w @ v, not s"
        ),
        "env": phrases("QUILLO_DEBUG, QL_THREADS, QL_HOME, NO_SIMD, QL_PAGE, QL_SEED, QL_TRACE"),
        "hook": phrases("on_flush, pre_commit, at_exit, on_retry, post_init, on_evict, before_fork"),
    },
    kinds=(
        FactKind(
            "`help({subject})` # signature",
            "`inspect.signature({subject})`",
            (
                "({arg}: {type} = {value}, *, {arg2}={value2}) -> {type2}",
                "def _({arg}: {type} = {value}, *, {arg2}={value2}) -> {type2}",
            ),
        ),
        FactKind(
            "`{subject}` # raises",
            "`try: {subject}()` # except what",
            (
                "raise {error} if {arg} == {value} else {error2}",
                "{error} when {arg} == {value}, otherwise {error2}",
            ),
        ),
        FactKind(
            "`{subject}` # complexity",
            "`%timeit {subject}()` # big-O",
            (
                "{cost} time, {cost2} space via {module}.{hook}",
                "{module}.{hook}: {cost} time, {cost2} space",
            ),
        ),
        FactKind(
            "`{subject}` # deprecated for",
            "`{subject}` # DeprecationWarning: use",
            (
                "{next}({arg}={value}) since {version}",
                "since {version}: {next}({arg}={value})",
            ),
        ),
        FactKind(
            "`{subject}` # calls internally",
            "`trace({subject})` # stack",
            (
                "{previous}({expr}), then {module}.{hook}({arg})",
                "{module}.{hook}({arg}) after {previous}({expr})",
            ),
        ),
        FactKind(
            "`{subject}()` # example returns",
            "`print({subject}())` # stdout",
            (
                "[{expr}, {expr2}, {value}] as {type}",
                "{type}([{expr}, {expr2}, {value}])",
            ),
        ),
        FactKind(
            "`{subject}` # CLI flags",
            "`python -m {subject}` # usage",
            (
                "{flag} {flag2} {arg}={value} env {env}",
                "env {env} {flag} {flag2} {arg}={value}",
            ),
        ),
        FactKind(
            "`{subject}` # changelog",
            "`git log {subject}` # diff",
            (
                "{version}: renamed {arg} to {arg2}, default {value}; {module}",
                "{module} {version}: {arg} -> {arg2}, default {value}",
            ),
        ),
        FactKind(
            "`{subject}` # thread safety",
            "`with lock: {subject}()` # why",
            (
                "{module} lock, {hook} may raise {error} at {cost}, set {env}",
                "set {env}: {hook} may raise {error}, {cost}, {module} lock",
            ),
        ),
        FactKind(
            "`{subject}` # unit test",
            "`pytest -k {subject}` # assert",
            (
                "assert {expr} == {value} and isinstance({arg}, {type})",
                "isinstance({arg}, {type}) and {expr} == {value}",
            ),
        ),
    ),
    sentence_case=False,
)
