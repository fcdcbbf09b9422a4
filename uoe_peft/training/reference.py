"""What the base model says: the same model with the adapter disabled, never a second copy.

A base model that is not trained says the same of an example in every epoch, so likelihoods are computed
once, before the first step, in a fixed order: resuming then sees the very same numbers. A model that is
trained in full has no base model left once training has begun; what is needed is computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.losses import answer_positions
from uoe_peft.training.forward import AnswerOutputs, evaluation_mode, forward_answers


@dataclass
class Reference:
    """The base model's view of batches.

    Attributes:
        model: The trained model: with an adapter, or trained in full.
        hidden_layer: Decoder layer whose output counts as hidden state; None where no loss reads one.
        last_layer: Decoder layer at which a pass may end that needs hidden states alone; None: none may.
        logits_at_once: More logits than these are made and dropped in chunks; None: all at once.
    """

    model: nn.Module
    hidden_layer: int | None = None
    last_layer: int | None = None
    logits_at_once: int | None = None
    _nll: dict[tuple[str, int], float] = field(default_factory=dict, repr=False)
    _hidden: dict[tuple[str, int], Tensor] = field(default_factory=dict, repr=False)

    @property
    def has_adapter(self) -> bool:
        """Whether the base model can be reached at any time, by disabling the adapter."""
        return isinstance(self.model, PeftModel)

    @contextmanager
    def base_model(self) -> Iterator[None]:
        """Inside the context the model is the base model: no adapter, no dropout, no gradient.

        Raises:
            RuntimeError: The model is trained in full: there is no base model to return to.
        """
        if not isinstance(self.model, PeftModel):
            raise RuntimeError(
                "a model that is trained in full has no base model any more; call Reference.precompute before "
                "training, or train an adapter (peft_config=...)"
            )
        # PEFT makes every parameter of the active adapters trainable when it enables them again.
        trainable = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        try:
            with evaluation_mode(self.model), self.model.disable_adapter():
                yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad_(requires_grad)

    def answers(self, forward_model: nn.Module, batch: Batch) -> AnswerOutputs:
        """The base model's outputs on a batch.

        Args:
            forward_model: What to call: `model`, or what a launcher wrapped it in.
            batch: The batch.

        Raises:
            RuntimeError: The model is trained in full.
        """
        with self.base_model():
            return forward_answers(forward_model, batch, logits_at_once=self.logits_at_once)

    def nll(self, forward_model: nn.Module, role: str, batch: Batch) -> Tensor:
        """Negative log-likelihood of each answer, summed over its tokens. Shape `(B,)`.

        Raises:
            RuntimeError: The model is trained in full and nothing was precomputed.
        """
        keys = _keys(role, batch)
        if not all(key in self._nll for key in keys):
            return self.answers(forward_model, batch).nll()
        return torch.tensor([self._nll[key] for key in keys], device=batch["labels"].device)

    def hidden(self, forward_model: nn.Module, role: str, batch: Batch) -> Tensor:
        """Hidden states from which answer tokens are predicted. Shape `(N, H)`.

        Raises:
            RuntimeError: The model is trained in full and nothing was precomputed.
        """
        keys = _keys(role, batch)
        if not all(key in self._hidden for key in keys):
            with self.base_model():
                return self._hidden_states(forward_model, batch)
        return torch.cat([self._hidden[key] for key in keys]).to(batch["labels"].device)

    def precompute(
        self,
        role: str,
        batches: Iterable[Batch],
        *,
        with_hidden: bool = False,
        place: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        """Compute each answer's likelihood, or its hidden states, now; call it before the first step.

        Args:
            role: "forget", "retain" or "alternative".
            batches: Batches with `index`.
            with_hidden: Hidden states, kept on the CPU, instead of likelihoods.
            place: Moves a batch to the model's device.
        """
        # A model that is trained in full is its own base model as long as it has not been trained.
        base = self.base_model() if self.has_adapter else nullcontext()
        with evaluation_mode(self.model), base:
            for batch in map(place, batches):
                keys = _keys(role, batch)
                if with_hidden:
                    hidden = self._hidden_states(self.model, batch).cpu()
                    lengths = answer_positions(batch["labels"]).sum(dim=1).tolist()
                    self._hidden.update(zip(keys, hidden.split(lengths), strict=True))
                else:
                    outputs = forward_answers(self.model, batch, logits_at_once=self.logits_at_once)
                    self._nll.update(zip(keys, outputs.nll().tolist(), strict=True))

    def _hidden_states(self, model: nn.Module, batch: Batch) -> Tensor:
        hidden = forward_answers(model, batch, hidden_layer=self.hidden_layer, last_layer=self.last_layer).hidden
        if hidden is None:
            raise RuntimeError("no hidden_layer was chosen, so there are no hidden states")
        return hidden


def _keys(role: str, batch: Batch) -> list[tuple[str, int]]:
    return [(role, index) for index in batch["index"].tolist()]
