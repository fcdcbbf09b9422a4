"""From what a router returns to scores that sum to 1 over the experts.

Letters: T tokens, E router classes (the experts; a few families add classes that compute nothing), K experts per token.

Routers differ in what they return (logits or probabilities, in any order, with or without the selection) and in the
activation that makes scores of logits. The activation is not guessed from a family's name: the router is watched while
it runs, and where nothing was seen (the block applies it, or the model is compiled) the one is taken whose values at
the selected experts are proportional to the weights that the layer applies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from uoe_peft.errors import UnsupportedModelError

Activation = Literal["identity", "softmax", "sigmoid", "sqrtsoftplus"]

# Function names as torch reports them. `sqrt(softplus(x))` is the only use of softplus in any router known.
_ACTIVATION_OF: dict[str, Activation] = {
    "softmax": "softmax",
    "log_softmax": "softmax",
    "sigmoid": "sigmoid",
    "logsigmoid": "sigmoid",
    "log_sigmoid": "sigmoid",
    "softplus": "sqrtsoftplus",
}
# In this order where several explain the weights equally well: the paper's router first.
_CANDIDATES: tuple[Activation, ...] = ("softmax", "sigmoid", "sqrtsoftplus")


class RoutingSpy(TorchFunctionMode):
    """Watches the code between hidden states and expert weights while it is active.

    Args:
        widths: Numbers of columns that router logits can have.
        keep_tensors: Whether to keep the tensors seen, for blocks whose router and experts do not hand them out.
    """

    def __init__(self, *, widths: Sequence[int], keep_tensors: bool) -> None:
        super().__init__()
        self._widths = tuple(widths)
        self._keep_tensors = keep_tensors
        self.seen: set[Activation] = set()  # activations applied to anything as narrow as router logits
        self.values: Tensor | None = None  # what the last of them gave, (T, E)
        self.top_k_index: Tensor | None = None
        self.top_k_weights: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        activation = _ACTIVATION_OF.get(name)
        # Wider tensors belong to hidden layers inside the router.
        if activation and isinstance(out, Tensor) and 0 < out.shape[-1] <= max(self._widths):
            self.seen.add(activation)
        if self._keep_tensors:
            self._follow(name, args, out)
        return out

    def _follow(self, name: str, args: Any, out: Any) -> None:
        """Follow the selection from the top-k to the weights that the block multiplies with."""
        if name in ("softmax", "sigmoid") and out.shape[-1] in self._widths:
            self.values = out
        elif name == "topk" and args[0].shape[-1] in self._widths:
            self.top_k_weights, self.top_k_index = out
        elif self.top_k_weights is not None and isinstance(out, Tensor) and out.shape == self.top_k_weights.shape:
            # Weights taken elsewhere for the same selection, then normalised, scaled or cast.
            taken = name == "gather" and any(arg is self.top_k_index for arg in args)
            changed = out.is_floating_point() and any(arg is self.top_k_weights for arg in args)
            if taken or changed:
                self.top_k_weights = out


def router_tensors(output: object) -> list[Tensor]:
    """The tensors of a router's output, in order, each with its token dimensions flattened to one."""
    parts: Iterable[object] = output if isinstance(output, (tuple, list)) else (output,)
    return [part.reshape(-1, part.shape[-1]) for part in parts if isinstance(part, Tensor) and part.dim() > 0]


def find_logits(tensors: Sequence[Tensor], *, widths: Sequence[int], num_tokens: int | None) -> Tensor | None:
    """The router logits (or probabilities) among a router's tensors, or None.

    Args:
        tensors: As `router_tensors` gives them.
        widths: Numbers of columns that logits can have.
        num_tokens: Number of rows that logits must have; None if unknown.

    Returns:
        Shape `(T, E)`; of several that fit, the first that is not the zero-filled copy of another.
    """
    fitting = [
        t for t in tensors if t.is_floating_point() and t.shape[-1] in widths and num_tokens in (None, t.shape[0])
    ]
    dense = [t for t in fitting if len(fitting) == 1 or _num_selected(t) is None]
    return next(iter(dense or fitting), None)


def find_selection(tensors: Sequence[Tensor], logits: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Selected experts and their weights among a router's tensors, for blocks that do not hand them to `experts`.

    Either a pair of an integer and a float tensor of shape `(T, K)`, or one float tensor of the logits' shape `(T, E)`
    that is 0 at the experts not selected.

    Returns:
        `top_k_index` and `top_k_weights`, both of shape `(T, K)`; None if neither is there.
    """
    integers = [t for t in tensors if t.dtype in (torch.int64, torch.int32)]
    for index in integers:
        weights = [t for t in tensors if t.is_floating_point() and t.shape == index.shape and t is not logits]
        if weights:
            return index.long(), weights[0]
    for filled in tensors:
        fits = logits is not None and filled.shape == logits.shape
        num_selected = _num_selected(filled) if fits else None
        if num_selected is not None:
            weights_, index_ = filled.topk(num_selected, dim=-1)
            return index_, weights_
    return None


def from_marks(marks: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Selected experts and their weights where the selection is a 0/1 mark for each expert.

    Args:
        marks: At most K ones in each row: fewer where an expert was full. Shape `(T, E)`.
        weights: Of each expert, or of the only one selected. Shape `(T, E)` or `(T, 1)`.

    Returns:
        `top_k_index` and `top_k_weights`, 0 where an expert was full. Shape `(T, K)` each.
    """
    chosen, index = marks.float().topk(max(1, int((marks != 0).sum(dim=-1).max())), dim=-1)
    return index, weights.expand_as(marks).gather(1, index) * chosen.to(weights.dtype)


def are_marks(index: Tensor, *, num_experts: int) -> bool:
    """Whether the experts module is told its selection by 0/1 marks rather than by indices."""
    # Indices of all E > 2 experts would include one above 1.
    return index.shape[-1] == num_experts > 2 and bool((index <= 1).all())


def watched_selection(spy: RoutingSpy | None) -> tuple[Tensor, Tensor] | None:
    """Selected experts and their weights that a spy saw, shape `(T, K)` each; None if it saw none."""
    if spy is None or spy.top_k_index is None or spy.top_k_weights is None:
        return None
    width = spy.top_k_index.shape[-1]
    return spy.top_k_index.reshape(-1, width), spy.top_k_weights.reshape(-1, width)


def find_activation(
    seen: Iterable[Activation], logits: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Activation | None:
    """How a router makes scores of its logits; None if no known activation explains its weights.

    Args:
        seen: Activations that the router was seen to apply; may be empty.
        logits: What it returned. Shape `(T, E)`.
        top_k_index: Selected experts. Shape `(T, K)`.
        top_k_weights: Weights that the layer applies. Shape `(T, K)`.
    """
    if _are_probabilities(logits):
        return "identity"
    observed = [candidate for candidate in _CANDIDATES if candidate in set(seen)]
    if len(observed) == 1:
        return observed[0]
    return _explaining_activation(observed or _CANDIDATES, logits, top_k_index, top_k_weights)


def normalised_scores(logits: Tensor, activation: Activation) -> Tensor:
    """Scores of a router's logits, float32, normalised to sum 1 over the experts of each token. Shape `(T, E)`."""
    match activation:
        case "identity":
            return logits.float()
        case "softmax":
            return logits.float().softmax(dim=-1)
        case "sigmoid" | "sqrtsoftplus":
            return sum_to_one(_activate(logits, activation))


def sum_to_one(values: Tensor) -> Tensor:
    """Values >= 0, as float32, over their sum for each token. Shape `(T, E)`."""
    return values.float() / values.float().sum(dim=-1, keepdim=True)


def no_scores_error(where: str, found: str) -> UnsupportedModelError:
    """The error for a router whose output cannot be read; `where` names it, `found` says what came."""
    return UnsupportedModelError(
        f"cannot read the routing of {where}: {found}; expected router logits (T, E) with softmax, sigmoid or "
        "sqrt(softplus) scores, and the selected experts with their weights, (T, K) each, as inputs of the experts "
        "module or in the router's output"
    )


def _activate(logits: Tensor, activation: Activation) -> Tensor:
    match activation:
        case "identity":
            return logits.float()
        case "softmax":
            return logits.float().softmax(dim=-1)
        case "sigmoid":
            return logits.float().sigmoid()
        case "sqrtsoftplus":
            return F.softplus(logits.float()).sqrt()


@torch.no_grad()
def _explaining_activation(
    candidates: Sequence[Activation], logits: Tensor, index: Tensor, weights: Tensor
) -> Activation | None:
    """The candidate whose values at the selected experts are proportional to the weights, token by token."""
    eps = max(torch.finfo(weights.dtype).eps, torch.finfo(logits.dtype).eps)
    tolerance = max(1e-4, 8 * eps)
    deviations: dict[Activation, float] = {}
    for candidate in candidates:
        values = _activate(logits, candidate).gather(1, index)  # (T, K)
        used = (weights > 0) & (values > 0)
        ratio = torch.where(used, weights.float().log() - values.log(), torch.nan)  # (T, K)
        deviation = (ratio - ratio.nanmean(dim=1, keepdim=True)).abs().nanmean().item()
        if deviation <= tolerance:
            # One expert per token is proportional to anything: then only weights that follow the values over tokens
            # are evidence (normalised weights are all 1, and fit nothing better than the rest).
            spread = (ratio - ratio.nanmean()).abs().nanmean().item()
            deviations[candidate] = deviation if index.shape[1] > 1 else spread
    if index.shape[1] == 1 and weights.unique().numel() == 1:
        return next(iter(deviations), None)
    return min(deviations, key=deviations.__getitem__, default=None)


@torch.no_grad()
def _are_probabilities(logits: Tensor) -> bool:
    sums = logits.float().sum(dim=-1)
    return bool((logits >= 0).all()) and bool(((sums - 1).abs() < 1e-2).all())


@torch.no_grad()
def _num_selected(tensor: Tensor) -> int | None:
    """K of a `(T, E)` tensor that is 0 but for K entries in every row; None for any other tensor."""
    if not tensor.is_floating_point() or len(tensor) == 0:
        return None
    counts = (tensor != 0).sum(dim=-1)
    uniform = bool((counts == counts[0]).all()) and 0 < int(counts[0]) < tensor.shape[-1]
    return int(counts[0]) if uniform else None
