"""Arguments of :class:`UOEConfig` made plain: numbers of any library become Python's, and nothing else passes.

JSON must be able to hold what comes out, so NumPy's numbers are converted; a bool is no number, nor is a string.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any

Pairs = list[tuple[int, int]]


def as_int(name: str, value: object, *, minimum: int) -> int:
    """An integer of any library as Python's.

    Raises:
        ValueError: It is no integer, or below the minimum.
    """
    number = _index(value)
    if number is None or number < minimum:
        raise ValueError(f"{name} must be an integer >= {minimum}, got {value!r}")
    return number


def as_number(name: str, value: object, *, zero: bool) -> float:
    """A finite number, positive or (where `zero` is allowed) zero.

    Raises:
        ValueError: It is something else.
    """
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    ordinary = isinstance(number, Real) and not _is_bool(number) and math.isfinite(number)
    if not ordinary or number < 0 or (number == 0 and not zero):  # type: ignore[operator]
        raise ValueError(f"{name} must be a finite number {'>= 0' if zero else '> 0'}, got {value!r}")
    return number  # type: ignore[return-value]


def as_bool(name: str, value: object) -> bool:
    """A truth value, NumPy's included.

    Raises:
        ValueError: It is something else: the string "false" would count as true.
    """
    if _is_bool(value):
        return bool(value)
    raise ValueError(f"{name} must be True or False, got {value!r}")


def as_names(name: str, value: object) -> list[str] | None:
    """A non-empty list of distinct names, or None.

    Raises:
        ValueError: It is something else, such as one string.
    """
    if value is None:
        return None
    names = list(value) if isinstance(value, Iterable) and not isinstance(value, (str, Mapping)) else []
    if not names or not all(isinstance(item, str) for item in names) or len(set(names)) < len(names):
        raise ValueError(f"{name} must be a non-empty list of distinct names, or None for all, got {value!r}")
    return [str(item) for item in names]


def as_pairs(target_experts: object) -> Pairs:
    """Sorted `(layer_idx, expert_idx)` pairs from any accepted form, including what JSON makes of it.

    Raises:
        ValueError: It is no accepted form, empty, or names an expert twice.
    """
    try:
        pairs = [(_target(layer), _target(expert)) for layer, expert in _given_pairs(target_experts)]
    except (TypeError, ValueError) as error:
        raise ValueError(
            "target_experts must be non-empty (layer_idx, expert_idx) pairs of integers >= 0, "
            f'{{layer_idx: [expert_idx]}} or "auto", got {target_experts!r}; for example '
            "target_experts=attribution.top(1)"
        ) from error
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"target_experts names an expert twice: {sorted(pairs)}")
    return sorted(pairs)


def _given_pairs(target_experts: Any) -> list[tuple[Any, Any]]:
    if isinstance(target_experts, Mapping):
        # JSON has no keys but strings.
        layers = {int(key) if str(key).isdecimal() else key: value for key, value in target_experts.items()}
        given = [(layer, expert) for layer, experts in layers.items() for expert in experts]
    else:
        # A string of two digits would pass for a pair.
        given = [() if isinstance(pair, str) else tuple(pair) for pair in target_experts]
    if not given:
        raise ValueError("no pairs")
    return given


def _target(value: object) -> int:
    number = _index(value)
    if number is None or number < 0:
        raise ValueError("no index")
    return number


def _index(value: object) -> int | None:
    """An integer of any library as Python's; None for anything else, bools included."""
    if _is_bool(value):
        return None
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def _is_bool(value: object) -> bool:
    """Whether it is a truth value, of any library."""
    return isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
