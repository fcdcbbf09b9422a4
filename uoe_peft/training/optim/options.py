"""Options of optimisers, masks and the retain projection, which `UnlearningConfig` has beside those of the losses."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from trl.trainer.sft_config import SFTConfig

from uoe_peft.training.choices import SophiaEstimator
from uoe_peft.tuner.arguments import as_int, as_number


@dataclass
class OptimiserOptions:
    """How weights are moved.

    Args:
        optim: As in transformers, and "sophia", SOUL's optimiser (https://arxiv.org/abs/2404.18239). Then
            `learning_rate` bounds what a weight moves in a step: 5e-6 to 1e-5 in the paper, on all weights.
        sophia_estimator: Where Sophia's curvature comes from. "squared_gradient": the gradient itself, at no cost,
            SOUL's own. "gauss_newton_bartlett": answers sampled from the model, on the forget and retain batch.
            "hutchinson": the Hessian of the whole objective along random signs; differentiates twice. Each costs a
            pass over the first micro-batch of the step.
        sophia_interval: Steps between two estimates. None: 1 for "squared_gradient", else 10.
        sophia_beta1: Decay of Sophia's momentum, in [0, 1).
        sophia_beta2: Decay of its curvature, in [0, 1).
        sophia_rho: Scale of its curvature, > 0: the larger, the fewer weights move by the full learning rate.
        weight_mask_ratio: Train only this share of the trainable weights, those that WAGLE finds on the first
            epoch (https://arxiv.org/abs/2410.17509); the others do not move by a bit, whatever `optim` and
            `weight_decay`. Not for fresh low-rank deltas, where one factor has no gradient yet. Costs as much as that
            epoch, and memory for two copies of the trained weights. None: train all.
        weight_mask_mu: Curvature of the retain loss in WAGLE, > 0.
        retain_projection: Damp what the deltas of a UOE adapter do to inputs that retain tokens have: the trained
            matrix is multiplied by `P = (I + C / (rho λ̄))⁻¹`, C the second moments of what the slice is multiplied with
            on up to 100,000 tokens of the retain set, λ̄ their mean eigenvalue. The value is rho, > 0: 1 damps a
            direction of mean energy by one half; smaller is stricter. Needs a retain set, whatever `retain_loss`, and
            a forward pass over both sets up to the edited layer, and a higher learning rate; the adapter stays an
            ordinary one. More is kept, but relearning restores more (benchmarks/RESULTS.md). None: off.
        relearner_steps: Train against somebody who trains the forget answers back, a simplified TAR
            (https://arxiv.org/abs/2408.00761): each step has a second forget pass through weights that he has moved,
            one step of AdamW to each step of training, and its gradient is added. He begins anew after so many steps.
            Far less comes back in relearning; what the rest loses by it, `retain_loss="relative_embed_diff"` with
            `rmu_layer=-1` keeps, and two experts of each layer do it better than one (benchmarks/RESULTS.md). Moves
            every layer, so that there is no prefix cache; takes twice the time or more, and memory for five float32
            copies of the model. One process, weights in float32. A resumed run begins with a fresh relearner. 0: off.
        relearner_rate: His learning rate, > 0, constant.
    """

    # Declared anew: the parent's type makes the command line refuse names that transformers does not know.
    optim: str = field(default=SFTConfig.default_optim, metadata={"help": 'As in transformers, or "sophia".'})
    sophia_estimator: SophiaEstimator = field(
        default="squared_gradient", metadata={"help": "Where the curvature of optim='sophia' comes from."}
    )
    sophia_interval: int | None = field(
        default=None, metadata={"help": "Steps between two estimates; None: 1 for squared_gradient, else 10."}
    )
    sophia_beta1: float = field(default=0.9, metadata={"help": "Decay of Sophia's momentum."})
    sophia_beta2: float = field(default=0.95, metadata={"help": "Decay of Sophia's curvature."})
    sophia_rho: float = field(default=0.04, metadata={"help": "Scale of Sophia's curvature."})
    weight_mask_ratio: float | None = field(
        default=None, metadata={"help": "Share of the trainable weights that WAGLE lets move; None: all."}
    )
    weight_mask_mu: float = field(default=1.0, metadata={"help": "Curvature of the retain loss in WAGLE."})

    retain_projection: float | None = field(
        default=None, metadata={"help": "rho: damp deltas along what retain tokens have in common; None: off."}
    )

    relearner_steps: int = field(
        default=0, metadata={"help": "Steps after which a simulated relearning begins anew; 0: there is none."}
    )
    relearner_rate: float = field(default=2e-4, metadata={"help": "Learning rate of the simulated relearning."})

    def _check_optimiser(self) -> None:
        self._check_projection()
        self._check_relearner()
        for name in ("sophia_rho", "weight_mask_mu"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be > 0, got {getattr(self, name)}")
        for name in ("sophia_beta1", "sophia_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")
        if self.sophia_interval is not None and self.sophia_interval < 1:
            raise ValueError(f"sophia_interval must be >= 1, got {self.sophia_interval}")
        if self.weight_mask_ratio is not None and not 0 < self.weight_mask_ratio <= 1:
            raise ValueError(f"weight_mask_ratio must be in (0, 1], got {self.weight_mask_ratio}")

    def _check_relearner(self) -> None:
        self.relearner_steps = as_int("relearner_steps", self.relearner_steps, minimum=0)
        self.relearner_rate = as_number("relearner_rate", self.relearner_rate, zero=False)

    def _check_projection(self) -> None:
        rho = self.retain_projection
        if rho is None:
            return
        if isinstance(rho, bool) or not 0 < rho < math.inf:
            raise ValueError(f"retain_projection must be None or a rho > 0, got {rho}")
        others = {
            f"weight_mask_ratio={self.weight_mask_ratio}": self.weight_mask_ratio is not None,
            "sophia_estimator='hutchinson'": self.optim == "sophia" and self.sophia_estimator == "hutchinson",
        }
        for option, chosen in others.items():
            if chosen:
                raise ValueError(f"retain_projection mixes weights of a slice, which {option} cannot have; drop one")
