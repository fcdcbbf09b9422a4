"""Evaluation while training and after it: sets are tokenised on the way, and a forget and a retain set weighed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from datasets import Dataset, IterableDataset
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.trainer_utils import EvalLoopOutput, PredictionOutput
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from uoe_peft.evaluation.metrics import forget_retain_balance
from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.setup import prepare_set


class EvaluatingTrainer(SFTTrainer):
    """TRL's `SFTTrainer` that evaluates sets as unlearning reads them."""

    args: UnlearningConfig
    _losses_of_sets: dict[str, float] | None = None  # by role, while a dict of sets is evaluated

    def _prepare_dataset(
        self,
        dataset: Dataset | IterableDataset,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin,
        args: SFTConfig,
        packing: bool,
        formatting_func: Callable[..., Any] | None,
        dataset_name: str,
    ) -> Dataset | IterableDataset:
        # TRL calls this for every set, once it has settled the tokenizer. The training set is paired after that.
        if dataset_name == "train":
            return dataset
        config = cast(UnlearningConfig, args)
        return prepare_set(dataset, processing_class, config, name=dataset_name, formatting_func=formatting_func)

    @property
    def _processing_class(self) -> PreTrainedTokenizerBase | ProcessorMixin:
        return cast(Any, self.processing_class)

    def evaluated_rows(self) -> list[list[int]]:
        """Token ids of the rows that are evaluated while training."""
        if self.eval_dataset is None or (self.args.eval_strategy == "no" and not self.args.eval_on_start):
            return []
        sets = self.eval_dataset.values() if isinstance(self.eval_dataset, dict) else [self.eval_dataset]
        return [ids for rows in sets for ids in cast(Any, rows)["input_ids"]]

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """As in transformers; of a forget and a retain set also their balance, see `metric_for_best_model`."""
        if not isinstance(self.eval_dataset if eval_dataset is None else eval_dataset, dict):
            return super().evaluate(eval_dataset, *args, **kwargs)
        self._losses_of_sets = {}
        try:
            return super().evaluate(eval_dataset, *args, **kwargs)
        finally:
            self._losses_of_sets = None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in transformers; the balance is among the metrics of the later of the two sets.

        There the log, callbacks such as early stopping, and the choice of the best checkpoint all find it.
        """
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        prefix, _, role = metric_key_prefix.rpartition("_")
        losses, metrics = self._losses_of_sets, cast(dict[str, float], output.metrics)
        if losses is not None and role in ("forget", "retain"):
            losses[role] = metrics[f"{metric_key_prefix}_loss"]
            if len(losses) == 2:
                metrics[f"{prefix}_balance"] = forget_retain_balance(losses["forget"], losses["retain"])
        return output

    def predict(self, test_dataset: Dataset | IterableDataset, *args: Any, **kwargs: Any) -> PredictionOutput:
        """As in transformers; the set is tokenised on the way, as in `evaluate`."""
        formatting_func = self._formatting_func
        prepared = prepare_set(
            test_dataset, self._processing_class, self.args, name="test", formatting_func=formatting_func
        )
        return super().predict(prepared, *args, **kwargs)
