"""A later request that leaves earlier ones withdrawable: with an adapter off, its request's facts are there again.

An adapter that is trained while earlier ones are on sees a model that has forgotten their facts, and nothing keeps it
from damaging what it cannot see. Where the text of earlier requests is still there, it can be shown: in each step the
adapter of one earlier request is switched off, and answers to that request's questions are kept as retain rows are,

    L = L_request + retain_weight · CE(facts of request i | adapters without i)

with i in turn. That is the model that withdrawing i leaves, in training already.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch, tokenize_dataset
from uoe_peft.losses import nll_loss
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.training.objective.forward import forward_answers

# So that the draw is not that of the pairs, which has the same seed.
_STREAM = 0x3D11


class WithdrawableTrainer(UnlearningTrainer):
    """`UnlearningTrainer` for a further request, which leaves each earlier one withdrawable.

    Each step runs one more batch of the size of the others: facts of one earlier request, with its adapter off. All
    else is as in `UnlearningTrainer`; without earlier requests everything is. What is trained for is the withdrawal of
    one request at a time.

    Args:
        model: A model with the adapters of earlier requests, active and frozen, and of the new one, see `add_request`.
        args: As for `UnlearningTrainer`; `retain_weight` is the weight of the facts, too.
        earlier: By the name of its adapter, the forget set of each earlier request that should stay withdrawable.
        **kwargs: As for `UnlearningTrainer`.

    Raises:
        ValueError: A request has no active adapter, or one that this training changes; activations are recomputed
            (`gradient_checkpointing`), which would happen with other adapters on; and as in `UnlearningTrainer`.
        TypeError: The model is no PEFT model.
    """

    def __init__(
        self,
        model: PeftModel,
        args: UnlearningConfig | None = None,
        *,
        earlier: Mapping[str, Dataset],
        **kwargs: Any,
    ) -> None:
        if earlier:
            check_withdrawable(model, list(earlier))
        self._earlier: dict[str, Dataset] = {}
        self._drawn_at, self._drawn = -1, 0
        super().__init__(model, args, **kwargs)
        if earlier and self.args.gradient_checkpointing:
            raise ValueError(
                "gradient_checkpointing=True runs passes again in the backward pass, when adapters that were off are "
                "on; leave it off to train with earlier requests"
            )
        for name, rows in earlier.items():
            self._earlier[name] = tokenize_dataset(
                rows, self._processing_class, max_length=self.args.max_length, name=f"earlier forget ({name})"
            )

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """As in `UnlearningTrainer`; with the facts of an earlier request."""
        found = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if "forget" not in inputs or not self._earlier:
            return found
        name, batch = self._draw(len(inputs["forget"]["input_ids"]))
        with withdrawn(cast(PeftModel, self.model), name), self._reusing({f"earlier forget ({name})": batch}):
            kept = nll_loss(forward_answers(model, batch).log_probs)
        self._metrics["train"]["withdrawn_nll"].append(float(kept.detach()))
        loss, *rest = found if return_outputs else (found,)
        loss = loss + self.args.retain_weight * kept
        return (loss, *rest) if return_outputs else loss

    def evaluated_rows(self) -> list[list[int]]:
        """Token ids of the rows that are read beside the pairs: they are in the prefix cache, too."""
        return [*super().evaluated_rows(), *(ids for rows in self._earlier.values() for ids in rows["input_ids"])]

    def _draw(self, size: int) -> tuple[str, Batch]:
        """The earlier request whose turn it is, and rows of it; the same when training goes on from a checkpoint."""
        step = self.state.global_step
        self._drawn = self._drawn + 1 if step == self._drawn_at else 0  # of the micro-batches of a step
        self._drawn_at = step
        name = list(self._earlier)[(step + self._drawn) % len(self._earlier)]
        rows = self._earlier[name]
        seed = (self.args.seed, _STREAM, step, self._drawn, self.args.process_index)
        drawn = np.random.default_rng(seed).choice(len(rows), min(size, len(rows)), replace=False)
        batch = cast(Any, self.data_collator)([rows[int(index)] for index in drawn])
        return name, cast(Batch, self._prepare_inputs(batch))


def check_withdrawable(model: nn.Module, names: list[str]) -> None:
    """Whether adapters can be switched off while others train.

    Raises:
        ValueError: One is not active, or is trained itself.
        TypeError: The model is no PEFT model.
    """
    if not isinstance(model, PeftModel):
        raise TypeError(f"expected a model with the adapters of earlier requests, got {type(model).__name__}")
    missing = sorted(set(names) - set(model.active_adapters))
    if missing:
        raise ValueError(
            f"earlier requests {missing} have no active adapter, active are {sorted(model.active_adapters)}; name each "
            "set by its adapter, and leave out requests that are withdrawn"
        )
    trained = model.get_model_status().requires_grad  # True, False or "irregular" by adapter
    own = [name for name in names if trained.get(name) is not False]
    if own:
        raise ValueError(f"the adapters {own} are trained, expected frozen ones of earlier requests; see add_request")


@contextmanager
def withdrawn(model: PeftModel, adapter_name: str) -> Iterator[None]:
    """Inside the context a model is what withdrawing a request would leave; which parameters train does not change.

    Args:
        model: A model with several active adapters.
        adapter_name: The one that is off inside.

    Raises:
        ValueError: The adapter is not active.
    """
    active, tuner = list(model.active_adapters), cast(Any, model.base_model)
    if adapter_name not in active:
        raise ValueError(f"adapter {adapter_name!r} is not active, active are {active}; name one of these")
    others = [name for name in active if name != adapter_name]
    # PEFT makes every parameter of the adapters that it switches on trainable.
    trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore() -> None:
        for parameter, requires_grad in trainable:
            parameter.requires_grad_(requires_grad)

    try:
        with nullcontext() if others else model.disable_adapter():
            if others:
                tuner.set_adapter(others)
                restore()
            yield
    finally:
        if others:
            tuner.set_adapter(active)
        restore()
