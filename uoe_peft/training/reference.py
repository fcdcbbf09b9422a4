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
from uoe_peft.training.forward import AnswerOutputs, evaluation_mode, forward_answers


@dataclass
class Reference:
    """The base model's view of batches.

    Attributes:
        model: The trained model: with an adapter, or trained in full.
        hidden_layer: Decoder layer whose output counts as hidden state; None where no loss reads one.
    """

    model: nn.Module
    hidden_layer: int | None = None
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
        with evaluation_mode(self.model), self.model.disable_adapter():
            yield

    def answers(self, forward_model: nn.Module, batch: Batch, *, with_hidden: bool = False) -> AnswerOutputs:
        """The base model's outputs on a batch.

        Args:
            forward_model: What to call: `model`, or what a launcher wrapped it in.
            batch: The batch.
            with_hidden: Keep hidden states after `hidden_layer`.

        Raises:
            RuntimeError: The model is trained in full.
        """
        with self.base_model():
            return forward_answers(forward_model, batch, hidden_layer=self.hidden_layer if with_hidden else None)

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
            hidden = self.answers(forward_model, batch, with_hidden=True).hidden
            if hidden is None:
                raise RuntimeError("no hidden_layer was chosen, so there are no hidden states")
            return hidden
        return torch.cat([self._hidden[key] for key in keys]).to(batch["labels"].device)

    def precompute(
        self,
        role: str,
        batches: Iterable[Batch],
        *,
        with_hidden: bool = False,
        place: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        """Compute each answer's likelihood (and hidden states) now; call it before the first step.

        Args:
            role: "forget", "retain" or "alternative".
            batches: Batches with `index`.
            with_hidden: Keep hidden states, too, on the CPU.
            place: Moves a batch to the model's device.
        """
        # A model that is trained in full is its own base model as long as it has not been trained.
        base = self.base_model() if self.has_adapter else nullcontext()
        with evaluation_mode(self.model), base:
            for batch in map(place, batches):
                outputs = forward_answers(self.model, batch, hidden_layer=self.hidden_layer if with_hidden else None)
                keys = _keys(role, batch)
                self._nll.update(zip(keys, outputs.nll().tolist(), strict=True))
                if outputs.hidden is not None:
                    parts = outputs.hidden.cpu().split(outputs.lengths.tolist())
                    self._hidden.update(zip(keys, parts, strict=True))


def _keys(role: str, batch: Batch) -> list[tuple[str, int]]:
    return [(role, index) for index in batch["index"].tolist()]
