"""What the reference says: the same model without the adapter that is trained, never a second copy.

Under `reference="current"` adapters that are active but not trained stay on, so that a later request starts from what
earlier ones left; under "base" every adapter is off.

A reference that is not trained says the same of an example in every epoch, so likelihoods are computed
once, before the first step, in a fixed order: resuming then sees the very same numbers. Hidden states are larger:
they are computed before where they can be kept on disk, see :mod:`uoe_peft.training.reuse.reference_store`. A
model that is trained in full has no base model left once training has begun; what is needed is computed before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.losses import answer_positions
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.training.choices import ReferenceKind
from uoe_peft.training.objective.forward import AnswerOutputs, forward_answers

Need = Literal["nll", "hidden"]
"""What is asked of the reference: likelihoods of answers, or hidden states."""


@dataclass
class Reference:
    """The reference's view of batches.

    Attributes:
        model: The trained model: with an adapter, or trained in full.
        kind: Which of its adapters are off. With one active adapter both kinds are the base model.
        hidden_layer: Decoder layer whose output counts as hidden state; None where no loss reads one.
        last_layer: Decoder layer at which a pass may end that needs hidden states alone; None: none may.
        logits_at_once: More logits than these are made and dropped in chunks; None: all at once.
    """

    model: nn.Module
    hidden_layer: int | None = None
    kind: ReferenceKind = "current"
    last_layer: int | None = None
    logits_at_once: int | None = None
    _known: dict[tuple[Need, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def has_adapter(self) -> bool:
        """Whether the reference can be reached at any time, by switching an adapter off."""
        return isinstance(self.model, PeftModel)

    @property
    def adapters_left_on(self) -> list[str]:
        """Adapters that the reference has, too: those that are active and not trained; none under "base"."""
        model = self.model
        if self.kind == "base" or not isinstance(model, PeftModel) or len(model.active_adapters) < 2:
            return []
        trained = model.get_model_status().requires_grad  # True, False or "irregular" by adapter
        return [name for name in model.active_adapters if trained.get(name) is False]

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Inside the context the model is the reference: without the trained adapter, dropout and gradient.

        Raises:
            RuntimeError: The model is trained in full: there is no base model to return to.
        """
        if not isinstance(self.model, PeftModel):
            raise RuntimeError(
                "a model that is trained in full has no base model any more; call Reference.precompute before "
                "training, or train an adapter (peft_config=...)"
            )
        kept = self.adapters_left_on
        # PEFT makes every parameter of the active adapters trainable when it enables them again.
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with evaluation_mode(self.model), only_adapters(self.model, kept):
                yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    @contextmanager
    def before_training(self) -> Iterator[None]:
        """As `base_model`, but a model that is trained in full is its own base model as long as it was not trained."""
        if self.has_adapter:
            with self.base_model():
                yield
        else:
            with evaluation_mode(self.model):
                yield

    def answers(self, forward_model: nn.Module, batch: Batch) -> AnswerOutputs:
        """The reference's outputs on a batch.

        Args:
            forward_model: What to call: `model`, or what a launcher wrapped it in.
            batch: The batch.

        Raises:
            RuntimeError: The model is trained in full.
        """
        with self.base_model():
            return forward_answers(forward_model, batch, logits_at_once=self.logits_at_once)

    def nll(self, forward_model: nn.Module, batch: Batch) -> Tensor:
        """Negative log-likelihood of each answer, summed over its tokens. Shape `(B,)`.

        Raises:
            RuntimeError: The model is trained in full and nothing was precomputed.
        """
        known = self._look_up("nll", batch)
        return self.answers(forward_model, batch).nll() if known is None else known

    def hidden(self, forward_model: nn.Module, batch: Batch) -> Tensor:
        """Hidden states from which answer tokens are predicted. Shape `(N, H)`.

        Raises:
            RuntimeError: The model is trained in full and nothing was precomputed.
        """
        known = self._look_up("hidden", batch)
        if known is not None:
            return known
        with self.base_model():
            return self._hidden_states(forward_model, batch)

    def precompute(self, batches: Iterable[Batch], *, need: Need = "nll") -> None:
        """Compute what batches need now, and keep it in memory; call it before the first step.

        Args:
            batches: Batches with `id`, on the model's device.
            need: Likelihoods or hidden states.
        """
        with self.before_training():
            for batch in batches:
                self.remember(need, dict(zip(batch["id"].tolist(), self.compute(need, batch), strict=True)))

    def compute(self, need: Need, batch: Batch) -> list[Tensor]:
        """What the model says of each example now, on the CPU; call it inside `before_training`.

        Returns:
            Likelihoods of shape `(1,)`, or hidden states of shape `(its answer tokens, H)`.
        """
        if need == "nll":
            outputs = forward_answers(self.model, batch, logits_at_once=self.logits_at_once)
            return list(outputs.nll().cpu().split(1))
        lengths = answer_positions(batch["labels"]).sum(dim=1).tolist()
        return list(self._hidden_states(self.model, batch).cpu().split(lengths))

    def remember(self, need: Need, values: Mapping[int, Tensor]) -> None:
        """Take what was computed before of examples, by their `id`: whatever their role, it is the same."""
        self._known.update({(need, example): value for example, value in values.items()})

    def knows(self, need: Need, ids: Iterable[int]) -> bool:
        """Whether what is needed of these examples was computed before."""
        return all((need, example) in self._known for example in ids)

    def _look_up(self, need: Need, batch: Batch) -> Tensor | None:
        values = [self._known.get((need, example)) for example in batch["id"].tolist()]
        known = [value for value in values if value is not None]
        return torch.cat(known).to(batch["labels"].device) if len(known) == len(values) else None

    def _hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden = forward_answers(model, batch, hidden_layer=self.hidden_layer, last_layer=self.last_layer).hidden
        if hidden is None:
            raise RuntimeError("no hidden_layer was chosen, so there are no hidden states")
        return hidden


@contextmanager
def only_adapters(model: PeftModel, names: list[str]) -> Iterator[None]:
    """Inside the context only these of the active adapters are on. Whether parameters train is the caller's to restore.

    Args:
        model: Any PEFT model; one whose adapters are not layers of it (prompts) has one active adapter at most.
        names: Active adapters; empty for none of them, which is the base model.
    """
    if not names:
        with model.disable_adapter():
            yield
        return
    active, tuner = list(model.active_adapters), cast(Any, model.base_model)
    tuner.set_adapter(names, inference_mode=True)
    try:
        yield
    finally:
        tuner.set_adapter(active)
