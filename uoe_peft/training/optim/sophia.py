"""Sophia, the second-order optimiser that SOUL unlearns with.

`m ← β1 m + (1 - β1) g` at each step, `h ← β2 h + (1 - β2) ĥ` at every k-th, and
`θ ← θ (1 - lr·wd) - lr · clip(m / max(ρ h, ε), ±1)`, Algorithm 3 of https://arxiv.org/abs/2305.14342; for unlearning:
https://arxiv.org/abs/2404.18239. ĥ estimates the diagonal of the loss's curvature, see `curvature.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from uoe_peft.training.config import UnlearningConfig


class Sophia(torch.optim.Optimizer):
    """Momentum, divided by an estimate of the curvature and clipped to one learning rate a step.

    The state is float32 whatever the parameters are, also after loading. Where the estimate is negative or tiny, the
    step is a full learning rate in the direction of the momentum.

    Args:
        params: Parameters, or groups of them.
        lr: Learning rate: no weight moves further than this in one step, weight decay aside. >= 0.
        betas: Decay of the momentum and of the curvature, each in [0, 1).
        rho: Scale of the curvature, > 0: the larger, the fewer weights are clipped.
        eps: Smallest denominator, > 0.
        weight_decay: Decoupled, >= 0.
        interval: k, steps between two estimates of the curvature, >= 1.
        squared_gradient_scale: Take the estimate from the gradient itself, as SOUL's own code does: ĥ is `g ⊙ g` times
            this number, the batch size. None: estimates come through `add_curvature`.

    Raises:
        ValueError: A number is out of range.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-5,
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        rho: float = 0.04,
        eps: float = 1e-15,
        weight_decay: float = 0.0,
        interval: int = 1,
        squared_gradient_scale: float | None = None,
    ) -> None:
        if not (lr >= 0 and weight_decay >= 0):
            raise ValueError(f"lr and weight_decay must be >= 0, got {lr} and {weight_decay}")
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not (rho > 0 and eps > 0):
            raise ValueError(f"rho and eps must be > 0, got {rho} and {eps}")
        if interval < 1:
            raise ValueError(f"interval must be >= 1, got {interval}")
        if squared_gradient_scale is not None and not 0 < squared_gradient_scale < math.inf:
            raise ValueError(f"squared_gradient_scale must be a number > 0 or None, got {squared_gradient_scale}")
        defaults = {"lr": lr, "betas": betas, "rho": rho, "eps": eps, "weight_decay": weight_decay}
        # A group's entries are saved and loaded with it, so the interval goes on where it was.
        super().__init__(params, {**defaults, "interval": interval, "steps": 0})
        self._squared_gradient_scale = squared_gradient_scale

    @property
    def curvature_is_due(self) -> bool:
        """Whether the next step should see a new estimate."""
        group = self.param_groups[0]
        return bool(group["steps"] % group["interval"] == 0)

    @torch.no_grad()
    def add_curvature(self, estimates: Mapping[nn.Parameter, Tensor]) -> None:
        """Take a new estimate ĥ of each parameter's curvature into the running mean.

        Args:
            estimates: By parameter, of its shape.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter in estimates:
                    curvature = self._state_of(parameter)["curvature"]
                    curvature.lerp_(estimates[parameter].float(), 1 - group["betas"][1])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `closure`, if given, computes the loss and the gradients anew.

        Returns:
            What `closure` returned, else None.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._squared_gradient_scale
        if self.curvature_is_due and scale is not None:
            gradients = {p: p.grad for group in self.param_groups for p in group["params"] if p.grad is not None}
            self.add_curvature({p: gradient.float().square() * scale for p, gradient in gradients.items()})
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), group)
            group["steps"] += 1
        return loss

    def _update(self, parameter: nn.Parameter, gradient: Tensor, group: Mapping[str, Any]) -> None:
        state = self._state_of(parameter)
        state["momentum"].lerp_(gradient, 1 - group["betas"][0])
        denominator = (group["rho"] * state["curvature"]).clamp_(min=group["eps"])
        direction = (state["momentum"] / denominator).clamp_(-1, 1)
        decayed = parameter.float() * (1 - group["lr"] * group["weight_decay"])
        parameter.copy_(decayed - group["lr"] * direction)  # rounded once, where the parameter is not float32

    def _state_of(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            for name in ("momentum", "curvature"):
                state[name] = torch.zeros_like(parameter, dtype=torch.float32)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, bit for bit."""
        super().load_state_dict(state_dict)
        # The base class rounds the state to the parameters' dtype.
        saved = [index for group in state_dict["param_groups"] for index in group["params"]]
        own = [parameter for group in self.param_groups for parameter in group["params"]]
        for index, parameter in zip(saved, own, strict=True):
            for name, value in state_dict["state"].get(index, {}).items():
                self.state[parameter][name] = value.to(parameter.device, copy=True)


def sophia_and_options(args: UnlearningConfig) -> tuple[type[Sophia], dict[str, Any]]:
    """What the Trainer makes its optimiser of under `optim="sophia"`."""
    from_gradient = args.sophia_estimator == "squared_gradient"
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return Sophia, {
        "lr": args.learning_rate,
        "betas": (args.sophia_beta1, args.sophia_beta2),
        "rho": args.sophia_rho,
        "interval": args.sophia_interval or (1 if from_gradient else 10),
        "squared_gradient_scale": float(batch_size) if from_gradient else None,
    }
