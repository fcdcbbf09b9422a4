"""A trainer for one request among many: what earlier requests are owed, and what later ones will need.

An adapter that is trained while earlier ones are on sees a model that has forgotten their facts, and nothing keeps it
from damaging what it cannot see. Where the text of earlier requests is still there, it can be shown: in each step the
adapter of one earlier request is switched off, and answers to that request's questions are kept as retain rows are,

    L = L_request + earlier_weight · CE(facts of request i | adapters without i)

with i in turn. That is the model that withdrawing i leaves, in training already. Where the text is gone, stored moments
of its tokens can join those of the retain set in the retain projection.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from uoe_peft.data import Batch, tokenize_dataset
from uoe_peft.losses import nll_loss
from uoe_peft.moments import Moments, measure_moments
from uoe_peft.requests.stored_moments import load_forget_moments, save_forget_moments, with_requests
from uoe_peft.requests.withdrawal import check_withdrawable, withdrawn
from uoe_peft.training import UnlearningConfig, UnlearningTrainer
from uoe_peft.training.model_card import add_loading_section
from uoe_peft.training.objective.anchor import active_configs
from uoe_peft.training.objective.forward import forward_answers
from uoe_peft.training.optim.projection import sampled_rows
from uoe_peft.training.step_log import mean_over_processes
from uoe_peft.tuner import UOEConfig

# So that the draw is not that of the pairs, which has the same seed.
_STREAM = 0x3D11


class RequestTrainer(UnlearningTrainer):
    """`UnlearningTrainer` for a request that is not the only one.

    With `earlier`, each step runs one more batch of the size of the others: facts of one earlier request, with its
    adapter off. What is trained for is the withdrawal of one request at a time. Without any of the arguments below
    everything is as in `UnlearningTrainer`.

    Args:
        model: A model with the adapters of earlier requests, active and frozen, and of the new one, see `add_request`.
        args: As for `UnlearningTrainer`.
        earlier: By the name of its adapter, the forget set of each earlier request that should stay withdrawable.
        earlier_weight: Weight of earlier requests' facts, which are kept by `nll` whatever the retain loss is; None:
            `retain_weight`, which suits them where that is `nll`, too.
        earlier_moments: By name, the stored moments of requests whose text is gone, or the folders of their adapters:
            they join the retain side of `retain_projection`, so that the new delta does little to their tokens.
        keep_moments: Whether `save_model` writes the moments of this request's forget set, at the experts that the
            adapter edits, beside the adapter.
        **kwargs: As for `UnlearningTrainer`.

    Attributes:
        forget_moments: With `keep_moments`, what was measured when training began.

    Raises:
        ValueError: `earlier_weight` is negative or infinite; a request of `earlier` has no active adapter, or one that
            this training changes; activations are recomputed (`gradient_checkpointing`), which would happen with other
            adapters on; `earlier_moments` without `retain_projection`, or of other experts (when training begins);
            `keep_moments` of a model that is sharded or has not exactly one UOE adapter in training; and as in
            `UnlearningTrainer`.
        FileNotFoundError: A folder of `earlier_moments` holds none.
        TypeError: `earlier` with a model that is no PEFT model.
    """

    def __init__(
        self,
        model: PeftModel,
        args: UnlearningConfig | None = None,
        *,
        earlier: Mapping[str, Dataset] | None = None,
        earlier_weight: float | None = None,
        earlier_moments: Mapping[str, Moments | str | Path] | None = None,
        keep_moments: bool = False,
        **kwargs: Any,
    ) -> None:
        earlier = {} if earlier is None else earlier
        if earlier_weight is not None and not 0 <= earlier_weight < float("inf"):
            raise ValueError(f"earlier_weight must be >= 0 and finite, got {earlier_weight}")
        _check_options(args or UnlearningConfig(), earlier, earlier_moments)
        if earlier:
            check_withdrawable(model, list(earlier))
        self._earlier: dict[str, Dataset] = {}
        self._earlier_moments = {name: load_forget_moments(own) for name, own in (earlier_moments or {}).items()}
        self._drawn_at, self._drawn = -1, 0
        self._adapter_name = ""
        self.forget_moments: Moments | None = None
        super().__init__(model, args, **kwargs)
        self._earlier_weight = self.args.retain_weight if earlier_weight is None else earlier_weight
        for name, rows in earlier.items():
            self._earlier[name] = tokenize_dataset(
                rows, self._processing_class, max_length=self.args.max_length, name=f"earlier forget ({name})"
            )
        if keep_moments:
            self._adapter_name = self._trained_adapter()
            # First, before layers leave the device: moments need them.
            self.callback_handler.callbacks.insert(0, _AtTheBeginning(self._measure_forget_set))

    # ---- Withdrawal ----

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
        logged = mean_over_processes({"withdrawn_nll": kept.detach()}, self.accelerator)
        self._metrics["train"]["withdrawn_nll"].append(logged["withdrawn_nll"])
        loss, *rest = found if return_outputs else (found,)
        loss = loss + self._earlier_weight * kept
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

    # ---- Moments ----

    def _measure(self, role: str) -> Moments:
        measured = super()._measure(role)
        return with_requests(measured, self._earlier_moments) if role == "retain" else measured

    def _measure_forget_set(self) -> None:
        """Measure the forget set where the adapter edits, on the model without it: the reference of the losses."""
        config = cast(UOEConfig, cast(Any, self.model).peft_config[self._adapter_name])
        batches = self.reuse.rows.batches("forget", sampled_rows(self.train_dataset.forget, seed=self.args.seed))
        experts = cast(list[tuple[int, int]], config.target_experts)
        with self.accelerator.autocast(), self.objective.reference.base_model():
            options: dict[str, Any] = {"routers": config.train_router, "name": "forget", "strict": False}
            self.forget_moments = measure_moments(cast(nn.Module, self.model), batches, experts, **options)

    def _trained_adapter(self) -> str:
        """Name of the adapter that is trained.

        Raises:
            ValueError: There is not exactly one, or weights are sharded.
        """
        model: Any = self.model
        trained = model.get_model_status().requires_grad if isinstance(model, PeftModel) else {}
        names = [name for name, own in trained.items() if own is not False and name in model.active_adapters]
        names = [name for name in names if isinstance(model.peft_config[name], UOEConfig)]
        if len(names) != 1 or self.is_sharded:
            how = "sharded weights" if self.is_sharded else f"{names} in training"
            raise ValueError(f"keep_moments=True needs one UOE adapter in training, on whole weights, got {how}")
        return names[0]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.forget_moments is not None and self.args.should_save:
            folder, name = Path(output_dir or cast(str, self.args.output_dir)), self._adapter_name
            save_forget_moments(folder if name == "default" else folder / name, self.forget_moments)
            add_loading_section(folder / "README.md", active_configs(cast(nn.Module, self.model)))


@dataclass(frozen=True)
class _AtTheBeginning(TrainerCallback):
    """Does something before the first step."""

    act: Callable[[], None]

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Do it."""
        self.act()


def _check_options(args: UnlearningConfig, earlier: Mapping[str, Any], moments: Mapping[str, Any] | None) -> None:
    if earlier and args.gradient_checkpointing:
        raise ValueError(
            "gradient_checkpointing=True runs passes again in the backward pass, when adapters that were off are on; "
            "leave it off to train with earlier requests"
        )
    if moments and args.retain_projection is None:
        raise ValueError("earlier_moments join the retain projection; set retain_projection, such as 1.0")
