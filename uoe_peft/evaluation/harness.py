"""An adapter inside lm-eval (https://github.com/EleutherAI/lm-evaluation-harness): WMDP, MMLU and all its other tasks.

    from uoe_peft.evaluation.harness import load_in_harness
    lm_eval.simple_evaluate(model=load_in_harness("forget-authors"), tasks=["wmdp", "mmlu"])

lm-eval's own `--model hf --model_args pretrained=...,peft=...` knows nothing of this package, and PEFT then not of UOE.
"""

from __future__ import annotations

from os import PathLike
from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft.tuner import UOEConfig  # noqa: F401  (registers the method with PEFT)


def load_in_harness(
    adapter: str | PathLike[str], *, base: str | None = None, dtype: str = "auto", **options: Any
) -> Any:
    """A model that lm-eval can evaluate, with the adapter on.

    Args:
        adapter: Folder of the adapter, or its name on the Hub.
        base: Its base model; None: the one that the adapter names.
        dtype: Of the base model.
        options: Of lm-eval's `HFLM`, such as `batch_size` or `max_length`.

    Returns:
        An `HFLM`.

    Raises:
        ValueError: The adapter does not say what its base model is.
        ImportError: The package `lm-eval` is missing.
    """
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ImportError("this needs the package lm-eval: pip install 'uoe-peft[harness]'") from error
    name = base or PeftConfig.from_pretrained(str(adapter)).base_model_name_or_path
    if not name:
        raise ValueError(f"{adapter} does not say which base model it is for; pass base")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    tuned = PeftModel.from_pretrained(model, str(adapter)).eval()
    return HFLM(pretrained=tuned, tokenizer=AutoTokenizer.from_pretrained(name), **options)
