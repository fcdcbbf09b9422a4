"""What is optional in a loss is passed by name, and its defaults are the papers'."""

import inspect

import pytest

from uoe_peft import losses

OPTIONS = {
    "adaptive_coefficient": {"beta": inspect.Parameter.empty},
    "adversarial_labels": {},
    "anchor_loss": {"reduction": "token", "denominator": None},
    "answer_lengths": {"num_examples": inspect.Parameter.empty},
    "answer_positions": {},
    "answer_targets": {},
    "control_direction": {"seed": inspect.Parameter.empty},
    "dpo_loss": {"beta": 0.1, "denominator": None},
    "embed_diff_loss": {"denominator": None},
    "grad_ascent_loss": {"denominator": None},
    "kl_loss": {"reduction": "mean", "denominator": None},
    "mask_to_top_k": {},
    "mean": {},
    "nll_loss": {"weights": None, "denominator": None},
    "npo_loss": {"beta": 0.1, "denominator": None},
    "random_labels": {"vocab_size": inspect.Parameter.empty, "seeds": inspect.Parameter.empty},
    "relative_embed_diff_loss": {"denominator": None},
    "rmu_loss": {"coefficient": inspect.Parameter.empty, "denominator": None},
    "satimp_loss": {"beta1": 5.0, "beta2": 1.0, "denominator": None},
    "sequence_nll": {"num_examples": inspect.Parameter.empty, "reduction": "sum"},
    "simnpo_loss": {"beta": 4.5, "delta": 0.0, "denominator": None},
    "token_log_probs": {},
    "trace_weights": {"cap": 10.0},
    "undial_loss": {"beta": 10.0, "reduction": "mean", "denominator": None},
    "wga_loss": {"beta": 1.0, "denominator": None},
}


@pytest.mark.parametrize("name", [name for name in losses.__all__ if name != "IGNORE_INDEX"])
def test_options_have_names_and_the_papers_values(name):
    parameters = inspect.signature(getattr(losses, name)).parameters.values()
    assert {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY} == OPTIONS[name]
    assert all(p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)
