"""The tiny model and the sets of the tests of training, and retain rows enough to set some aside."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from tests.training.conftest import make_args, make_model, make_sets, make_tokenizer, with_lora, with_uoe
from uoe_peft.training import UnlearningTrainer


def many_retain_rows() -> Dataset:
    """Ninety different rows, whose answers are made of the letters that the forget set's are made of."""
    answers = [f"{'stuvwxyz'[i % 8] * 3}{'stuvwxyz'[i // 8 % 8]}" for i in range(90)]
    return Dataset.from_dict({"prompt": [f"where is {i}? " for i in range(90)], "completion": answers})


@pytest.fixture
def trainer_of(tmp_path: Any) -> Any:
    """A trainer whose steps are large, so that its adapter does harm at full strength."""

    def make(model: Any = None, *, retain: Any = None, eval_dataset: Any = None, callbacks: Any = None, **options: Any):
        settings = {"output_dir": str(tmp_path / "out"), "max_steps": 3, "learning_rate": 0.1}
        settings |= {"forget_loss": "grad_ascent", "retain_weight": 1e-3}
        return UnlearningTrainer(
            with_uoe(make_model()) if model is None else model,
            make_args(**{**settings, "calibrate_metric": "probability", **options}),
            train_dataset=make_sets()[0],
            retain_dataset=many_retain_rows() if retain is None else retain,
            eval_dataset=eval_dataset,
            processing_class=make_tokenizer(),
            callbacks=callbacks,
        )

    return make


@pytest.fixture
def builders() -> Any:
    class Builders:
        model = staticmethod(make_model)
        uoe = staticmethod(with_uoe)
        lora = staticmethod(with_lora)

    return Builders
