"""Configuration of the UOE method."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig, PeftType

DeltaType = Literal["full", "low_rank"]
Pairs = list[tuple[int, int]]


@dataclass
class UOEConfig(PeftConfig):
    """Which experts of a Mixture-of-Experts model to edit, and how.

    Trainable deltas are put on the slices of the target experts and on the router of their layers; everything else is
    frozen. Method: "UOE: Unlearning One Expert Is Enough for Mixture-of-Experts LLMs" (SEUF),
    https://arxiv.org/abs/2411.18797.

    Args:
        target_experts: `(layer_idx, expert_idx)` pairs, or `{layer_idx: [expert_idx, ...]}`, or "auto", which
            :class:`~uoe_peft.UnlearningTrainer` replaces by the expert that its forget set engages most. Layer indices
            are the decoder layer's own, as in `model.layers.20`. Kept as sorted pairs.
        target_projections: Which matrices of an expert get a delta, by the names that the experts module uses, such as
            `["gate_up_proj", "down_proj"]`. None: all of them.
        delta_type: "full": a delta of the slice's own shape, as in the paper. "low_rank": `uoe_alpha / r * B @ A`.
        r: Rank of a low-rank delta, >= 1.
        uoe_alpha: Scale of a low-rank delta, > 0; the delta is scaled by `uoe_alpha / r`. A full delta has scale 1.
        use_rslora: Scale a low-rank delta by `uoe_alpha / sqrt(r)` instead (https://arxiv.org/abs/2312.03732).
        init_weights: True: the fresh adapter changes nothing. "zero_expert": the delta is `-W` of the last projection,
            so that the expert contributes nothing, the training-free baseline. False: random values, for tests.
        train_router: Whether the routers of the target layers get a delta, too.
        router_delta_type: Like `delta_type`, for routers.
        corrected_router_layers: Further decoder layers whose routers have a delta that no optimiser trains; filled in
            by :func:`~uoe_peft.correct_routers`, which computes these deltas. They are full ones, whatever
            `router_delta_type` says.
        attribution: How the target experts were chosen, as plain JSON; kept for the record, never read.
        provenance: How the adapter came about, as plain JSON: "forgets" (what it forgets, in the user's own words),
            "training" (settings) and "figures" (numbers by name). For the model card and `inspect`; never read by the
            method, and nothing in it is taken from the data.
        target_modules: Filled in at injection: the paths of the edited modules.
        exclude_modules: Not supported, since targets are named by expert; must stay None.
        target_parameters: Not supported, likewise.
        modules_to_save: Further modules to train and save in full, as for any PEFT method.
        base_experts: Filled in at injection: number of experts and slice shapes in each target layer, so that an
            adapter is not loaded onto another model.

    Raises:
        ValueError: An unknown choice, an empty or malformed target, a rank or scale out of range.
    """

    target_experts: Any = field(default=None, metadata={"help": "(layer_idx, expert_idx) pairs, or 'auto'."})
    target_projections: list[str] | None = field(
        default=None, metadata={"help": "Matrices of an expert that get a delta; all of them by default."}
    )
    delta_type: str = field(default="full", metadata={"help": "'full' or 'low_rank'."})
    r: int = field(default=16, metadata={"help": "Rank of a low-rank delta."})
    uoe_alpha: float = field(default=32, metadata={"help": "A low-rank delta is scaled by uoe_alpha / r."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by uoe_alpha / sqrt(r) instead."})
    init_weights: bool | Literal["zero_expert"] = field(
        default=True, metadata={"help": "True: no change at first; 'zero_expert': the expert contributes nothing."}
    )
    train_router: bool = field(default=True, metadata={"help": "Whether routers of the target layers are trained."})
    router_delta_type: str = field(default="full", metadata={"help": "'full' or 'low_rank', for routers."})
    corrected_router_layers: list[int] | None = field(
        default=None, metadata={"help": "Filled in by correct_routers: further layers whose routers have a delta."}
    )
    attribution: dict[str, Any] | None = field(default=None, metadata={"help": "How the targets were chosen."})
    provenance: dict[str, Any] | None = field(default=None, metadata={"help": "How the adapter came about."})
    target_modules: set[str] | list[str] | str | None = field(
        default=None, metadata={"help": "Filled in at injection: the paths of the edited modules."}
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Not supported."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Not supported."})
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules to train and save in full."}
    )
    base_experts: dict[str, Any] | None = field(
        default=None, metadata={"help": "Filled in at injection: expert counts and shapes of the target layers."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.UOE  # type: ignore[attr-defined]
        if self.target_experts != "auto":
            self.target_experts = _as_pairs(self.target_experts)
        self.corrected_router_layers = _as_layers(self.corrected_router_layers)
        self._check_choices()
        self._check_low_rank()

    def _check_choices(self) -> None:
        for name in ("delta_type", "router_delta_type"):
            if getattr(self, name) not in get_args(DeltaType):
                raise ValueError(f"{name} must be one of {get_args(DeltaType)}, got {getattr(self, name)!r}")
        if self.init_weights not in (True, False, "zero_expert"):
            raise ValueError(f'init_weights must be True, False or "zero_expert", got {self.init_weights!r}')
        if self.init_weights == "zero_expert" and self.delta_type != "full":
            raise ValueError('init_weights="zero_expert" needs delta_type="full": a low-rank delta cannot be -W')
        if self.target_projections is not None and not self.target_projections:
            raise ValueError("target_projections is empty; name at least one projection, or pass None for all of them")
        for name in ("exclude_modules", "target_parameters"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by UOE: name the experts to edit in target_experts")

    def _check_low_rank(self) -> None:
        if not isinstance(self.r, int) or self.r < 1:
            raise ValueError(f"r must be an integer >= 1, got {self.r!r}")
        if not self.uoe_alpha > 0:
            raise ValueError(f"uoe_alpha must be > 0, got {self.uoe_alpha!r}")


def _as_pairs(target_experts: object) -> Pairs:
    """Sorted `(layer_idx, expert_idx)` pairs from any accepted form, including what JSON makes of it."""
    given: Iterable[Any]
    if isinstance(target_experts, Mapping):
        given = [(layer, expert) for layer, experts in target_experts.items() for expert in experts]
    elif isinstance(target_experts, Iterable) and not isinstance(target_experts, str):
        given = target_experts
    else:
        raise ValueError(_expected_pairs(target_experts))
    try:
        pairs = [(int(layer_idx), int(expert_idx)) for layer_idx, expert_idx in given]
    except (TypeError, ValueError) as error:
        raise ValueError(_expected_pairs(target_experts)) from error
    if not pairs or any(index < 0 for pair in pairs for index in pair):
        raise ValueError(_expected_pairs(target_experts))
    if len(set(pairs)) < len(pairs):
        raise ValueError(f"target_experts names an expert twice: {sorted(pairs)}")
    return sorted(pairs)


def _as_layers(layers: Iterable[int] | None) -> list[int] | None:
    """Sorted decoder layers; None for none."""
    given = sorted(layers or ())
    if not all(isinstance(layer, int) and layer >= 0 for layer in given) or len(set(given)) < len(given):
        raise ValueError(f"corrected_router_layers must be distinct decoder layers >= 0, got {layers!r}")
    return given or None


def _expected_pairs(got: object) -> str:
    return (
        "target_experts must be non-empty (layer_idx, expert_idx) pairs of integers >= 0, {layer_idx: [expert_idx]} "
        f'or "auto", got {got!r}; for example target_experts=attribution.top(1)'
    )
