"""Attribution is Eq. 2, finds what was planted, says when it is unsure, and refuses what it cannot read."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from tests.attribution.conftest import FORGET, RETAIN, SHARED, Plant, make_texts, make_tokenizer
from tests.families import build
from uoe_peft.attribution import GeneralistExpertWarning, UnidentifiedExpertWarning, attribute_experts
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.tuner import UOEConfig

# Random experts are rarely told apart; tests of the warnings themselves catch them.
pytestmark = pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")

# Where the router is, and how its scores come of its logits.
FAMILIES = {
    "qwen2_moe": ("mlp.gate", "softmax"),
    "qwen3_moe": ("mlp.gate", "softmax"),
    "mixtral": ("mlp.gate", "softmax"),
    "olmoe": ("mlp.gate", "softmax"),
    "deepseek_v2": ("mlp.gate", "softmax"),
    "gpt_oss": ("mlp.router", "softmax"),
    "deepseek_v3": ("mlp.gate", "sigmoid"),
    "glm4_moe": ("mlp.gate", "sigmoid"),
}


def by_hand(
    model: PreTrainedModel, rows: list[list[int]], *, path: str, activation: str, gate: str, padding_side: str
) -> dict[int, list[float]]:
    """Eq. 2, token by token, from what the routers themselves returned for one padded batch of all rows."""
    length = max(map(len, rows))
    padding = [[0] * (length - len(row)) for row in rows]
    left = padding_side == "left"
    input_ids = [pad + row if left else row + pad for row, pad in zip(rows, padding, strict=True)]
    mask = [[int(t >= len(p)) if left else int(t < length - len(p)) for t in range(length)] for p in padding]
    outputs: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
    handles = []
    for layer_idx, layer in enumerate(model.model.layers):
        if any(name == path for name, _ in layer.named_modules()):
            keep = lambda m, a, output, idx=layer_idx: outputs.update({idx: output})  # noqa: E731
            handles.append(layer.get_submodule(path).register_forward_hook(keep))
    with torch.no_grad():
        model(input_ids=torch.tensor(input_ids), attention_mask=torch.tensor(mask))
    for handle in handles:
        handle.remove()
    affinity = {}
    for layer_idx, (router_logits, weights, index) in outputs.items():
        scores = router_logits.double().softmax(-1) if activation == "softmax" else router_logits.double().sigmoid()
        scores = scores / scores.sum(-1, keepdim=True)
        totals = [0.0] * scores.shape[-1]
        for j, row in enumerate(rows):
            for t in range(length):
                if not mask[j][t]:
                    continue
                token = j * length + t
                for place, expert in enumerate(index[token].tolist()):
                    value = scores[token, expert] if gate == "softmax" else weights[token, place]
                    totals[expert] += float(value) / len(row) / len(rows)
        affinity[layer_idx] = totals
    return affinity


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("family", FAMILIES)
def test_affinity_equals_equation_2_computed_by_hand(family: str, padding_side: str) -> None:
    model = build(family)
    generator = torch.Generator().manual_seed(7)
    rows = [torch.randint(3, 97, (n,), generator=generator).tolist() for n in (13, 4, 9, 2, 6)]
    path, activation = FAMILIES[family]
    for gate in ("softmax", "applied"):
        attribution = attribute_experts(
            model,
            Dataset.from_dict({"input_ids": rows}),
            processing_class=make_tokenizer(padding_side),
            gate=gate,
            batch_size=len(rows),
            show_progress=False,
        )
        expected = by_hand(model, rows, path=path, activation=activation, gate=gate, padding_side=padding_side)
        assert list(attribution.layer_indices) == list(expected)
        torch.testing.assert_close(
            attribution.affinity, torch.tensor(list(expected.values())), atol=1e-6, rtol=0, check_dtype=False
        )


def test_batches_padding_and_order_do_not_matter(model: PreTrainedModel, forget_set: Dataset) -> None:
    tables = [
        attribute_experts(
            model, forget_set, processing_class=make_tokenizer(side), batch_size=size, seed=seed, show_progress=False
        ).affinity
        for side, size, seed in (("right", 1, 0), ("right", 23, 1), ("left", 5, 2))
    ]
    for table in tables[1:]:
        torch.testing.assert_close(table, tables[0], atol=1e-5, rtol=0)


def test_a_sequence_counts_once_whatever_its_length(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    def affinity(*texts: str) -> Tensor:
        rows = Dataset.from_dict({"text": texts})
        return attribute_experts(model, rows, processing_class=tokenizer, show_progress=False).affinity

    short, long = "abc", "xyzzy, wxyz. vwxy"
    mean = (affinity(short) + affinity(long)) / 2
    torch.testing.assert_close(affinity(short, long), mean, atol=1e-6, rtol=0)


def test_prompts_count_unless_they_are_left_out(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"prompt": ["abc", "de"], "completion": [" xyz", " w."]})
    whole, answers = (
        attribute_experts(model, rows, processing_class=tokenizer, include_prompt=include, show_progress=False)
        for include in (True, False)
    )
    assert whole.forget is not None
    assert answers.forget is not None
    end_tokens = 2
    assert whole.forget.num_tokens == len("abc xyz") + len("de w.") + end_tokens
    assert answers.forget.num_tokens == len(" xyz") + len(" w.") + end_tokens
    assert not torch.allclose(whole.affinity, answers.affinity)


def test_selection_ratios_of_a_layer_sum_to_one(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    attribution = attribute_experts(
        model, forget_set, processing_class=tokenizer, score="token_ratio", show_progress=False
    )
    torch.testing.assert_close(attribution.affinity.sum(dim=1), torch.ones(3))
    gate = attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False)
    torch.testing.assert_close(gate.rescored("token_ratio").affinity, attribution.affinity)
    torch.testing.assert_close(attribution.rescored("gate").affinity, gate.affinity)


@pytest.mark.parametrize("score", ["gate", "token_ratio", "contrast"])
def test_a_planted_expert_is_found_and_not_before_planting(
    model: PreTrainedModel,
    forget_set: Dataset,
    retain_set: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    plant: Plant,
    score: str,
) -> None:
    def attribute() -> list[tuple[int, int]]:
        attribution = attribute_experts(
            model,
            forget_set,
            processing_class=tokenizer,
            score=score,
            retain_dataset=retain_set,
            layer_indices=[0],
            show_progress=False,
        )
        return attribution.top(1)

    planted = 2
    assert attribute() != [(0, planted)]
    plant(model, planted, FORGET, strength=6.0)
    assert attribute() == [(0, planted)]


def test_contrast_finds_the_specialist_where_the_gate_prefers_a_generalist(
    model: PreTrainedModel,
    forget_set: Dataset,
    retain_set: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    plant: Plant,
) -> None:
    specialist, generalist = 1, 5
    plant(model, generalist, FORGET + RETAIN + SHARED, strength=5.0)
    plant(model, specialist, FORGET, strength=4.0)
    options = {"processing_class": tokenizer, "retain_dataset": retain_set, "layer_indices": [0]}
    with pytest.warns(GeneralistExpertWarning, match=r"\(0, 5\) is a generalist"):
        gate = attribute_experts(model, forget_set, **options, show_progress=False)
    assert gate.top(1) == [(0, generalist)]
    contrast = attribute_experts(model, forget_set, score="contrast", **options, show_progress=False)
    assert contrast.top(1) == [(0, specialist)]
    assert gate.lift((0, specialist)) > 1.5 > gate.lift((0, generalist))
    assert gate.rescored("contrast").top(1) == [(0, specialist)]


def test_ablation_finds_the_expert_whose_loss_matters(
    model: PreTrainedModel, forget_set: Dataset, retain_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    def attribute(kappa: float = 0.0) -> Tensor:
        return attribute_experts(
            model,
            forget_set,
            processing_class=tokenizer,
            score="ablation",
            retain_dataset=retain_set,
            num_candidates=6,
            kappa=kappa,
            layer_indices=[1],
            show_progress=False,
        ).affinity

    # Each rise is the difference of two losses that the model itself reports, one with the expert's output zeroed.
    affinity = attribute()
    assert affinity.shape == (1, 6)
    silenced = copy.deepcopy(model)
    with torch.no_grad():
        silenced.model.layers[1].mlp.experts.down_proj[3].zero_()
    rise = mean_loss(silenced, forget_set, tokenizer) - mean_loss(model, forget_set, tokenizer)
    assert float(affinity[0, 3]) == pytest.approx(rise, abs=1e-5)
    retain_rise = mean_loss(silenced, retain_set, tokenizer) - mean_loss(model, retain_set, tokenizer)
    assert float(attribute(kappa=2.0)[0, 3]) == pytest.approx(rise - 2 * retain_rise, abs=1e-5)


def test_ablation_measures_only_the_gates_candidates(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    gate = attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False)
    ablation = attribute_experts(
        model, forget_set, processing_class=tokenizer, score="ablation", num_candidates=4, show_progress=False
    )
    measured = {(layer_idx, expert_idx) for layer_idx, expert_idx, _ in ablation.ranking()}
    assert measured == set(gate.top(4))
    assert int(ablation.affinity.isnan().sum()) == 3 * 6 - 4


def test_gradient_is_wagle_summed_over_an_experts_weights(
    model: PreTrainedModel, forget_set: Dataset, retain_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    attribution = attribute_experts(
        model,
        forget_set,
        processing_class=tokenizer,
        score="gradient",
        retain_dataset=retain_set,
        mu=0.5,
        show_progress=False,
    )
    expected = torch.zeros(3, 6)
    gradients = []
    for rows in (forget_set, retain_set):
        reference = copy.deepcopy(model)
        mean_loss_tensor(reference, rows, tokenizer).backward()
        gradients.append(reference.model.layers)
    for layer_idx, layer in enumerate(model.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            weight = getattr(layer.mlp.experts, name).detach()
            forget, retain = (getattr(layers[layer_idx].mlp.experts, name).grad for layers in gradients)
            expected[layer_idx] += ((weight - retain / 0.5) * forget).abs().sum(dim=(1, 2))
    torch.testing.assert_close(attribution.affinity, expected, rtol=1e-4, atol=1e-7)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def mean_loss_tensor(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Mean over sequences of the loss that the model reports for each alone."""
    losses = []
    for text in rows["text"]:
        ids = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        losses.append(model(input_ids=ids, labels=ids).loss)
    return torch.stack(losses).mean()


def mean_loss(model: PreTrainedModel, rows: Dataset, tokenizer: PreTrainedTokenizerFast) -> float:
    with torch.no_grad():
        return float(mean_loss_tensor(model, rows, tokenizer))


def test_random_reads_no_data_and_depends_on_the_seed_alone(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    def attribute(seed: int) -> Tensor:
        model.forward = model.model.forward = None  # neither may run
        return attribute_experts(model, forget_set, processing_class=tokenizer, score="random", seed=seed).affinity

    assert torch.equal(attribute(3), attribute(3))
    assert not torch.equal(attribute(3), attribute(4))


def test_the_pass_stops_at_the_last_layer_asked_for(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    whole = attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False)
    for module in (model.model.layers[1].mlp.experts, model.model.layers[2], model.model.norm, model.lm_head):
        module.forward = None  # none may run
    part = attribute_experts(model, forget_set, processing_class=tokenizer, layer_indices=[1], show_progress=False)
    assert part.layer_indices == (1,)
    torch.testing.assert_close(part.affinity, whole.affinity[1:2])


def test_the_model_is_left_as_it_was(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    model.train()
    model.model.layers[1].eval()
    modes = [module.training for module in model.modules()]
    attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False)
    assert [module.training for module in model.modules()] == modes
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_an_adapter_takes_part_and_can_be_switched_off(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    def attribute(model: torch.nn.Module) -> Tensor:
        return attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False).affinity

    before = attribute(model)
    adapted = get_peft_model(model, UOEConfig(target_experts=[(1, 3)], init_weights=False))
    assert not torch.allclose(attribute(adapted), before)
    with adapted.disable_adapter():
        assert torch.equal(attribute(adapted), before)


def test_bfloat16_agrees_with_float32(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    tables = [
        attribute_experts(model.to(dtype), forget_set, processing_class=tokenizer, show_progress=False).affinity
        for dtype in (torch.float32, torch.bfloat16)
    ]
    assert tables[1].dtype == torch.float32
    torch.testing.assert_close(tables[1], tables[0], atol=0.02, rtol=0)


def test_a_choice_that_the_data_cannot_make_warns(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast, plant: Plant
) -> None:
    options = {"processing_class": tokenizer, "layer_indices": [0], "show_progress": False}
    # Two letters each, all letters equally frequent: which comes up more often is chance.
    plant(model, 2, FORGET[:2], strength=9.0)
    plant(model, 4, FORGET[2:4], strength=9.0)
    with pytest.warns(UnidentifiedExpertWarning, match="does not single out one expert"):
        attribution = attribute_experts(model, forget_set, **options)
    assert attribution.confidence is not None
    assert not attribution.confidence.identified
    plant(model, 2, FORGET, strength=9.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attribution = attribute_experts(model, forget_set, **options)
    assert attribution.confidence is not None
    assert attribution.confidence.identified
    assert attribution.top(1) == [(0, 2)]


def test_a_set_does_not_seem_to_differ_from_itself(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    attribution = attribute_experts(
        model,
        forget_set,
        processing_class=tokenizer,
        score="contrast",
        retain_dataset=forget_set,
        show_progress=False,
    )
    assert attribution.affinity.abs().max() == 0
    sure = attribution.confidence
    assert sure is not None
    # The intervals know that both sets are samples.
    assert (sure.low < 0).all()
    assert (sure.high > 0).all()


def test_one_sequence_warns_that_nothing_is_known_of_its_spread(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.warns(UnidentifiedExpertWarning, match="one sequence"):
        attribution = attribute_experts(
            model, Dataset.from_dict({"text": ["abc, de."]}), processing_class=tokenizer, show_progress=False
        )
    assert attribution.confidence is None


def test_the_progress_bar_counts_tokens(
    model: PreTrainedModel,
    forget_set: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    capsys: pytest.CaptureFixture[str],
) -> None:
    attribute_experts(model, forget_set, processing_class=tokenizer)
    shown = capsys.readouterr().err
    assert "Reading forget set: 100%" in shown
    assert "tok/s" in shown


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "gates"}, "score must be one of"),
        ({"gate": "sigmoid"}, "gate must be one of"),
        ({"score": "contrast"}, "needs retain_dataset"),
        ({"max_tokens": 0}, "max_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"num_candidates": 1}, "num_candidates must be at least 2"),
        ({"score": "gradient", "mu": 0.0}, "mu must be > 0"),
        ({"layer_indices": [3]}, r"layers \[0, 1, 2\]"),
    ],
)
def test_bad_options_are_named(
    model: PreTrainedModel,
    forget_set: Dataset,
    tokenizer: PreTrainedTokenizerFast,
    options: dict[str, object],
    message: str,
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_experts(model, forget_set, processing_class=tokenizer, show_progress=False, **options)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ({"text": []}, "forget set is empty"),
        ({"input_ids": [[], []]}, "forget set"),
        ({"question": ["a"], "answer": ["b"]}, r"columns \['answer', 'question'\]"),
    ],
)
def test_bad_sets_are_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, rows: dict[str, list[object]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        attribute_experts(model, Dataset.from_dict(rows), processing_class=tokenizer, show_progress=False)


def test_a_bad_retain_set_is_called_retain(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(ValueError, match="retain set is empty"):
        attribute_experts(
            model,
            forget_set,
            processing_class=tokenizer,
            retain_dataset=Dataset.from_dict({"text": []}),
            show_progress=False,
        )


@pytest.mark.parametrize("score", ["gate", "token_ratio"])
def test_nan_scores_are_an_error_naming_the_layer(
    model: PreTrainedModel, forget_set: Dataset, tokenizer: PreTrainedTokenizerFast, score: str
) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight[2] = torch.nan
    with pytest.raises(ValueError, match="router of layer 1 gives NaN"):
        attribute_experts(model, forget_set, processing_class=tokenizer, score=score, show_progress=False)


def test_a_dense_model_is_refused(forget_set: Dataset, tokenizer: PreTrainedTokenizerFast) -> None:
    config = LlamaConfig(
        vocab_size=100, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(UnsupportedModelError, match="LlamaForCausalLM has no Mixture-of-Experts block"):
        attribute_experts(LlamaForCausalLM(config), forget_set, processing_class=tokenizer, show_progress=False)


def test_the_sample_is_uniform_and_seeded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = Dataset.from_dict({"text": make_texts(FORGET, num_rows=40, seed=3)})

    def fingerprint(seed: int) -> str:
        attribution = attribute_experts(
            model, rows, processing_class=tokenizer, max_tokens=100, seed=seed, show_progress=False
        )
        assert attribution.forget is not None
        assert 70 < attribution.forget.num_tokens <= 100
        return attribution.forget.fingerprint

    assert fingerprint(0) == fingerprint(0)
    assert fingerprint(0) != fingerprint(1)
