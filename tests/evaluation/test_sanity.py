"""An evaluation that nothing passes by itself: what forgets, what keeps, what does both."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from uoe_peft.evaluation import Suite, UnlearningReport, evaluate_unlearning, suites
from uoe_peft.testbed import checkpoint_path


@pytest.fixture(scope="module")
def report() -> UnlearningReport:
    base, retrained = (
        AutoModelForCausalLM.from_pretrained(checkpoint_path(name), dtype=torch.float32).eval()  # type: ignore[arg-type]
        for name in ("base", "retrained")
    )
    destroyed = get_peft_model(base, LoraConfig(target_modules="all-linear", r=4)).eval()
    with torch.no_grad():
        for name, parameter in destroyed.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=1.0)
    whole = suites.testbed_suite()
    few = [part.rows.shuffle(seed=0).select(range(10)) for part in whole.sets if isinstance(part.rows, Dataset)]
    suite = Suite("few", tuple(replace(part, rows=rows) for part, rows in zip(whole.sets, few, strict=True)))
    return evaluate_unlearning(
        destroyed,
        suite,
        processing_class=AutoTokenizer.from_pretrained(checkpoint_path("base")),
        retrained_model=retrained,
        batch_size=10,
        max_new_tokens=32,
    )


def test_the_base_fails_to_forget_and_keeps(report: UnlearningReport) -> None:
    verdict = report.verdict("base")
    assert (verdict.forgotten, verdict.kept) == (False, True)
    assert report.scores["base"]["forget"].score > 0.9
    assert report.metrics["base"]["mia_min_k"] > 0.9


def test_destroyed_weights_forget_and_fail_to_keep(report: UnlearningReport) -> None:
    verdict = report.verdict("unlearned")
    assert (verdict.forgotten, verdict.kept) == (True, False)
    assert report.scores["unlearned"]["retain"].score < 0.2
    assert report.metrics["unlearned"]["rr2r"] < 0.3  # noise is no answer


def test_the_retrained_model_passes_both(report: UnlearningReport) -> None:
    verdict = report.verdict("retrained", forget_limit=0.1)
    assert (verdict.forgotten, verdict.kept) == (True, True)
    assert report.metrics["retrained"]["mia_min_k"] < 0.8
    assert report.metrics["retrained"]["rr2r"] > 0.4  # it says that it does not know, often of the wrong subject
    assert report.metrics["base"]["rr2r"] < 0.1
