"""Options of the search for a strength, which `UnlearningConfig` has beside those of the training itself."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

Goal = Literal["forget", "retain"]
Calibrate = Literal["auto", "forget", "retain", False]
Against = Literal["likelihood", "relearning"]
Metric = Literal["accuracy", "probability"]


@dataclass
class StrengthOptions:
    """How the strength of what was trained is chosen in the end, see `UOEConfig.strength`.

    Args:
        calibrate: "retain": the greatest strength, up to that of the training, that keeps `calibrate_retain_share` on
            validation rows. "forget": the least that brings the forget set down to `calibrate_forget_limit`. Both look
            at the straight line from the base to the trained model, by bisection; where no strength will do, the log
            says so and the adapter stays as trained. "auto": "forget" where there is a limit, else "retain", if it can
            be done; the log says why not. Another adapter than UOE has no strength that is saved with it; a model that
            is trained in full is interpolated with what it was, if this is asked for by name: that takes room for two
            more copies of what is trained, on the CPU. False: never.
        calibrate_forget_limit: What "forget" asks for: the greatest value of the metric on the forget set, in [0, 1].
        calibrate_retain_share: What "retain" asks for: the share that must be left of the base's metric, in (0, 1].
        calibrate_metric: "accuracy": share of the answer tokens that are the most likely ones. "probability": mean
            over answers of the geometric mean of their tokens' probabilities.
        calibrate_against: "relearning": the forget set's metric counts after a short relearning of all weights from
            half of its validation rows, measured on the other half; for "retain" it is only logged. Each candidate
            then costs some steps of full training, and memory for a float32 copy of the model, its gradients and two
            moments: 16 bytes a parameter, in one process.
        calibrate_max_rows: Most rows of a set that are measured. Forget rows are those of training. Retain rows are a
            tenth of the retain set, which training then does not read, if that gives eight. `eval_dataset={"forget":
            ..., "retain": ...}` takes the place of either. What is drawn depends on `seed` and the size of the set.
    """

    calibrate: Calibrate = field(
        default="auto", metadata={"help": "What the strength is chosen for in the end: forget, retain, auto or False."}
    )
    calibrate_forget_limit: float | None = field(
        default=None, metadata={"help": "Greatest value of the metric on the forget set; calibrate=forget needs it."}
    )
    calibrate_retain_share: float = field(
        default=0.95, metadata={"help": "Share of the base's metric on retain rows that must be kept."}
    )
    calibrate_metric: Metric = field(default="accuracy", metadata={"help": "accuracy or probability, of answers."})
    calibrate_against: Against = field(
        default="likelihood", metadata={"help": "Forgetting as it is, or after a short relearning."}
    )
    calibrate_max_rows: int = field(default=64, metadata={"help": "Most rows of a set that strengths are tried on."})

    @property
    def calibration_goal(self) -> Goal | None:
        """What is asked for; None for nothing."""
        if self.calibrate is False:
            return None
        if self.calibrate == "auto":
            return "retain" if self.calibrate_forget_limit is None else "forget"
        return self.calibrate

    def _check_strength(self, *, offload_prefix: bool) -> None:
        for name, choices in (("calibrate", Calibrate), ("calibrate_metric", Metric), ("calibrate_against", Against)):
            value = getattr(self, name)
            if value not in get_args(choices) or (value == 0 and value is not False):
                raise ValueError(f"{name} must be one of {list(get_args(choices))}, got {value!r}")
        limit = self.calibrate_forget_limit
        if limit is None and self.calibrate == "forget":
            raise ValueError("calibrate='forget' needs calibrate_forget_limit, the most that may be left, such as 0.3")
        if limit is not None and not 0 <= limit <= 1:
            raise ValueError(f"calibrate_forget_limit must be in [0, 1], got {limit}")
        if not 0 < self.calibrate_retain_share <= 1:
            raise ValueError(f"calibrate_retain_share must be in (0, 1], got {self.calibrate_retain_share}")
        if self.calibrate_max_rows < 2:
            raise ValueError(f"calibrate_max_rows must be at least 2, got {self.calibrate_max_rows}")
        if self.calibrate_against == "relearning" and self.calibration_goal and offload_prefix:
            raise ValueError(
                "calibrate_against='relearning' trains every layer, and offload_prefix=True takes some away; choose one"
            )
