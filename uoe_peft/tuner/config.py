"""Configuration of the UOE method."""

from __future__ import annotations

from dataclasses import InitVar, dataclass, field
from typing import Any, Literal, get_args

from peft import PeftConfig, PeftType

from uoe_peft.tuner.arguments import as_bool, as_int, as_names, as_number, as_pairs

DeltaType = Literal["full", "low_rank"]


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
        strength: A factor on every delta of the adapter, experts' and routers', >= 0. Training usually overshoots:
            once it has ended, a lower strength gives back what other knowledge lost, at the price of a forgetting that
            is easier to undo. See :meth:`UOEModel.set_strength`.
        attribution: How the target experts were chosen, as plain JSON; kept for the record, never read.
        provenance: How the adapter came about, as plain JSON: "forgets" (what it forgets, in the user's own words),
            "training" (settings) and "figures" (numbers by name). For the model card and `inspect`; never read by the
            method, and nothing in it is taken from the data.
        target_modules: Filled in at injection: the paths of the edited modules. Not to be set.
        exclude_modules: Not supported, since targets are named by expert; must stay None.
        target_parameters: Not supported, likewise.
        modules_to_save: Further modules to train and save in full, as for any PEFT method.
        base_experts: Filled in at injection: number of experts and slice shapes in each target layer, so that an
            adapter is not loaded onto another model.
        corrected_router_layers: Written by version 0.1.0, which could correct further routers; anything but None is
            refused.

    Raises:
        ValueError: An unknown choice, an empty or malformed target, a number out of range, a value of another type.
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
    strength: float = field(default=1.0, metadata={"help": "A factor on every delta of the adapter, >= 0."})
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

    corrected_router_layers: InitVar[list[int] | None] = None

    def __post_init__(self, corrected_router_layers: list[int] | None) -> None:
        super().__post_init__()
        if corrected_router_layers:
            raise ValueError(
                f"the adapter corrects the routers of layers {corrected_router_layers}, which this version cannot: "
                "merge it with uoe_peft 0.1.0"
            )
        self.peft_type = PeftType.UOE  # type: ignore[attr-defined]
        if not (isinstance(self.target_experts, str) and self.target_experts == "auto"):
            self.target_experts = as_pairs(self.target_experts)
        self.target_projections = as_names("target_projections", self.target_projections)
        self.r = as_int("r", self.r, minimum=1)
        self.uoe_alpha = as_number("uoe_alpha", self.uoe_alpha, zero=False)
        self.strength = as_number("strength", self.strength, zero=True)
        self.use_rslora = as_bool("use_rslora", self.use_rslora)
        self.train_router = as_bool("train_router", self.train_router)
        self._check_choices()
        self._check_unsupported()
        # Whether the adapter was put on for tensors that are still to come; no field, and never saved.
        self.awaits_state = False

    def _check_choices(self) -> None:
        for name in ("delta_type", "router_delta_type"):
            value = getattr(self, name)
            if not isinstance(value, str) or value not in get_args(DeltaType):
                raise ValueError(f"{name} must be one of {get_args(DeltaType)}, got {value!r}")
        if not isinstance(self.init_weights, str):
            self.init_weights = as_bool("init_weights", self.init_weights)
        elif self.init_weights != "zero_expert":
            raise ValueError(f'init_weights must be True, False or "zero_expert", got {self.init_weights!r}')
        elif self.delta_type != "full":
            raise ValueError('init_weights="zero_expert" needs delta_type="full": a low-rank delta cannot be -W')

    def _check_unsupported(self) -> None:
        for name in ("exclude_modules", "target_parameters"):
            if getattr(self, name):
                raise ValueError(f"{name} is not supported by UOE: name the experts to edit in target_experts")
        # A saved adapter has both: what was filled in, and what the base model looked like then.
        if self.target_modules and self.base_experts is None:
            raise ValueError(
                f"target_modules is filled in by UOE, got {self.target_modules!r}: name the experts to edit in "
                "target_experts, and their matrices in target_projections"
            )
