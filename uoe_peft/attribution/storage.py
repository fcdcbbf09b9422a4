"""An attribution as JSON: versioned, restored exactly, one line a layer so that a person can read it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uoe_peft.attribution.affinities import Affinities
from uoe_peft.attribution.confidence import Confidence
from uoe_peft.attribution.expert_use import ExpertUse

FORMAT = "uoe_peft.expert_attribution"
VERSION = 1


def metadata(attribution: Affinities) -> dict[str, Any]:
    """Everything but the tables, as plain JSON."""
    described: dict[str, Any] = {
        "score": attribution.score,
        "gate": attribution.gate,
        "model_name": attribution.model_name,
        "model_revision": attribution.model_revision,
        "seed": attribution.seed,
        "layer_indices": list(attribution.layer_indices),
        "options": dict(attribution.options),
    }
    for name, use in (("forget", attribution.forget), ("retain", attribution.retain)):
        described[name] = None if use is None else _counts(use)
    sure = attribution.confidence
    described["confidence"] = None if sure is None else _scalars(sure)
    return described


def to_json(attribution: Affinities) -> str:
    """The file's text."""
    layers = attribution.layer_indices
    content = {"format": FORMAT, "version": VERSION, **metadata(attribution)}
    content["affinity"] = _rows(attribution.affinity, layers)
    for name, use in (("forget", attribution.forget), ("retain", attribution.retain)):
        if use is not None:
            tables = {"softmax": use.softmax, "applied": use.applied, "token_ratio": use.token_ratio}
            content[name] |= {key: _rows(table, layers) for key, table in tables.items()}
    if (sure := attribution.confidence) is not None:
        content["confidence"] |= {"low": _rows(sure.low, layers), "high": _rows(sure.high, layers)}
    return _dump(content) + "\n"


def from_content(content: object, *, where: str) -> dict[str, Any]:
    """Arguments of `ExpertAttribution` from a file's content.

    Raises:
        ValueError: It is no attribution, or of a newer version.
    """
    if not isinstance(content, Mapping) or content.get("format") != FORMAT:
        raise ValueError(f"{where} is not an expert attribution: expected the entry 'format': {FORMAT!r}")
    if content["version"] > VERSION:
        raise ValueError(
            f"{where} has version {content['version']}, this package reads up to {VERSION}; upgrade uoe-peft"
        )
    fields = {key: value for key, value in content.items() if key not in ("format", "version")}
    fields["layer_indices"] = tuple(fields["layer_indices"])
    fields["affinity"] = _table(fields["affinity"])
    for name in ("forget", "retain"):
        fields[name] = _restored(ExpertUse, fields[name], ("softmax", "applied", "token_ratio"))
    fields["confidence"] = _restored(Confidence, fields["confidence"], ("low", "high"))
    return fields


def _counts(use: ExpertUse) -> dict[str, Any]:
    return {name: getattr(use, name) for name in ("num_sequences", "num_tokens", "top_k", "fingerprint")}


def _scalars(sure: Confidence) -> dict[str, Any]:
    names = ("margin", "margin_low", "margin_high", "stability", "half_agreement")
    return {name: getattr(sure, name) for name in names}


def _rows(table: Tensor, layers: Sequence[int]) -> dict[str, list[float | None]]:
    """A table by layer. Digits are the fewest that restore each float32; what was not measured is null."""
    rows = table.detach().cpu().numpy().astype(np.float32)
    return {
        str(layer_idx): [None if np.isnan(value) else float(str(value)) for value in row]
        for layer_idx, row in zip(layers, rows, strict=True)
    }


def _table(rows: Mapping[str, Sequence[float | None]]) -> Tensor:
    return torch.tensor([[np.nan if value is None else value for value in row] for row in rows.values()])


def _restored(cls: type[Any], content: Mapping[str, Any] | None, tables: Sequence[str]) -> Any:
    if content is None:
        return None
    return cls(**{name: _table(value) if name in tables else value for name, value in content.items()})


def _dump(value: object, indent: str = "") -> str:
    """JSON with objects spread over lines and lists kept on one."""
    if not isinstance(value, Mapping) or not value:
        return json.dumps(value, allow_nan=False, ensure_ascii=False)
    inner = indent + "  "
    lines = (f"{inner}{json.dumps(key)}: {_dump(entry, inner)}" for key, entry in value.items())
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"
