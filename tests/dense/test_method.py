"""The method on groups of neurons: attribution, an edit of one group, and the edit as one of the dense model."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.dense.conftest import GROUPS, NEURONS, logits, make_groups, make_model, weights
from tests.training.conftest import make_args
from tests.tuner.conftest import randomise
from uoe_peft.attribution import ExpertAttribution, attribute_experts
from uoe_peft.attribution.scores import Score
from uoe_peft.dense import NeuronGroups, factorize, to_dense
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moments import measure_moments
from uoe_peft.training import UnlearningTrainer
from uoe_peft.training.solve import solve_unlearning
from uoe_peft.tuner import UOEConfig

TARGET = (1, 4)
PROJECTIONS = ("gate_proj", "up_proj", "down_proj")

pytestmark = pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")


def adapted(model: PreTrainedModel, **options: object) -> PeftModel:
    """A factorized model with a random adapter of one group."""
    peft_model = get_peft_model(model, UOEConfig(**{"target_experts": [TARGET], "train_router": False, **options}))
    randomise(peft_model)
    return peft_model.eval()


def own_neurons(groups: NeuronGroups) -> list[int]:
    layer_idx, expert_idx = TARGET
    return [n for n in range(NEURONS) if int(groups.by_layer[layer_idx][n]) == expert_idx]


def attribute(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, forget: Dataset, retain: Dataset, score: Score
) -> ExpertAttribution:
    return attribute_experts(
        model,
        forget,
        processing_class=tokenizer,
        score=score,
        retain_dataset=retain,
        num_resamples=3,
        num_candidates=18,
        show_progress=False,
    )


def test_a_fresh_adapter_changes_no_bit(model: PreTrainedModel, groups: NeuronGroups) -> None:
    factorize(model, groups)
    before = logits(model)
    peft_model = get_peft_model(model, UOEConfig(target_experts=[TARGET, (2, 0)], train_router=False))
    assert torch.equal(logits(peft_model), before)


@pytest.mark.parametrize("family", ["llama with biases", "qwen2", "gemma"])
@pytest.mark.parametrize("options", [{}, {"delta_type": "low_rank", "r": 3, "uoe_alpha": 5}])
def test_an_edit_written_back_is_a_hand_edited_dense_model(
    family: str, options: dict[str, object], groups: NeuronGroups
) -> None:
    model = make_model(family)
    original, (layer_idx, expert_idx), own = weights(model), TARGET, own_neurons(groups)
    peft_model = adapted(factorize(model, groups), **options)
    layer = peft_model.base_model.model.model.layers[layer_idx].mlp.experts
    gate_up = layer.get_delta_weight("default", "gate_up_proj", expert_idx).detach()  # (H, 2i)
    down = layer.get_delta_weight("default", "down_proj", expert_idx).detach()  # (i, H)
    edited_logits = logits(peft_model)
    expected = {name: tensor.clone() for name, tensor in original.items()}
    half = len(own)
    for place, neuron in enumerate(own):
        mlp = f"model.layers.{layer_idx}.mlp"
        expected[f"{mlp}.gate_proj.weight"][neuron] += gate_up[:, place]
        expected[f"{mlp}.up_proj.weight"][neuron] += gate_up[:, half + place]
        expected[f"{mlp}.down_proj.weight"][:, neuron] += down[place]

    dense = to_dense(peft_model.merge_and_unload())
    found = weights(dense)
    assert list(found) == list(original)
    by_hand = make_model(family)
    by_hand.load_state_dict(expected)
    torch.testing.assert_close(logits(dense), logits(by_hand))
    torch.testing.assert_close(logits(dense), edited_logits, rtol=1e-4, atol=1e-5)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-6)
        by_column = name.endswith("down_proj.weight")
        rows, before = (t.T if by_column else t for t in (tensor, original[name]))
        if f"layers.{layer_idx}.mlp" in name and "weight" in name:
            others = [n for n in range(NEURONS) if n not in own]
            assert torch.equal(rows[others], before[others])
            assert (rows[own] != before[own]).any(dim=1).all()
        else:
            assert torch.equal(rows, before), name


def test_an_adapter_that_is_not_merged_keeps_the_model_from_becoming_dense(
    model: PreTrainedModel, groups: NeuronGroups
) -> None:
    peft_model = adapted(factorize(model, groups))
    with pytest.raises(ValueError, match="merge_and_unload"):
        to_dense(peft_model.get_base_model())
    before = make_model()
    after = to_dense(peft_model.unload())
    assert all(torch.equal(tensor, before.state_dict()[name]) for name, tensor in after.state_dict().items())


def test_an_adapter_of_other_groups_is_refused(model: PreTrainedModel, groups: NeuronGroups, tmp_path: Path) -> None:
    adapted(factorize(model, groups)).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(factorize(make_model(), groups), tmp_path)
    assert loaded.peft_config["default"].base_experts["1"]["neurons"] == groups.fingerprint(1)
    with pytest.raises(ValueError, match="made for another model"):
        PeftModel.from_pretrained(factorize(make_model(), make_groups(seed=4)), tmp_path)
    with pytest.raises(ValueError, match="A dense model is factorized first"):
        PeftModel.from_pretrained(make_model(), tmp_path)


def test_routers_are_not_trained_and_that_is_said(model: PreTrainedModel, groups: NeuronGroups) -> None:
    factorize(model, groups)
    with pytest.warns(UserWarning, match=r"train_router is turned off: in the layers \[1\]"):
        peft_model = get_peft_model(model, UOEConfig(target_experts=[TARGET]))
    assert peft_model.peft_config["default"].train_router is False
    trained = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 and all(".experts.uoe_delta." in name for name in trained)


def test_the_gate_is_the_mean_share_of_each_group(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast, forget: Dataset, retain: Dataset
) -> None:
    factorize(model, groups)
    with torch.no_grad():  # one group that writes a hundred times as much
        find_moe_blocks(model)[2].storage.weight("down_proj", 3).mul_(100)
    found = attribute(model, tokenizer, forget, retain, "gate")
    torch.testing.assert_close(found.affinity.sum(dim=1), torch.ones(3))
    assert found.top(1) == [(2, 3)] and found.value(found.affinity, (2, 3)) > 0.8
    assert found.forget is not None and found.forget.top_k == GROUPS


def test_contrast_finds_the_group_of_the_forget_set(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast
) -> None:
    with torch.no_grad():  # neurons that fire on the letter z alone, all in one group
        z = tokenizer("z")["input_ids"][0]
        model.model.embed_tokens.weight[z] = 0
        model.model.embed_tokens.weight[z, 7] = 40
        for name in ("gate_proj", "up_proj"):
            weight = model.model.layers[0].mlp.get_submodule(name).weight
            weight[own := groups.by_layer[0] == 5] = 0
            weight[own, 7] = 3
    factorize(model, groups)
    sets = [Dataset.from_dict({"text": [letter * 6] * 4}) for letter in ("z", "b")]
    found = attribute(model, tokenizer, *sets, "contrast")
    assert found.top(1, exclude_layers=(1, 2)) == [(0, 5)]


def test_ablation_is_the_loss_of_a_model_without_the_groups_columns(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast, forget: Dataset, retain: Dataset
) -> None:
    def loss(dense: PreTrainedModel) -> float:
        total = 0.0
        for row in forget:
            prompt, answer = (tokenizer(row[key])["input_ids"] for key in ("prompt", "completion"))
            ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
            labels = ids.clone()
            labels[0, : len(prompt)] = -100
            total += float(dense(input_ids=ids, labels=labels).loss)
        return total / len(forget)

    with torch.no_grad():
        base = loss(model)
        edited = make_model()
        edited.model.layers[2].mlp.down_proj.weight[:, groups.by_layer[2] == 3] = 0
        rise = loss(edited) - base
    found = attribute_experts(
        factorize(model, groups),
        forget,
        processing_class=tokenizer,
        score="ablation",
        num_resamples=3,
        num_candidates=18,
        show_progress=False,
    )
    assert found.value(found.affinity, (2, 3)) == pytest.approx(rise, abs=1e-4)


def test_the_gradient_score_is_that_of_the_dense_weights(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast, forget: Dataset
) -> None:
    rows = forget.select([2])
    prompt, answer = (tokenizer(rows[0][key])["input_ids"] for key in ("prompt", "completion"))
    ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
    labels = ids.clone()
    labels[0, : len(prompt)] = -100
    model(input_ids=ids, labels=labels).loss.backward()
    mlp, own = model.model.layers[1].mlp, groups.by_layer[1] == 4
    products = {name: (p.weight * p.weight.grad).abs() for name in PROJECTIONS if (p := mlp.get_submodule(name))}
    expected = products["gate_proj"][own].sum() + products["up_proj"][own].sum() + products["down_proj"][:, own].sum()
    model.zero_grad()
    found = attribute_experts(
        factorize(model, groups), rows, processing_class=tokenizer, score="gradient", show_progress=False
    )
    assert found.value(found.affinity, TARGET) == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(
    ("score", "gate", "message"),
    [
        ("token_ratio", "softmax", "score='token_ratio' cannot tell"),
        ("gate", "applied", "gate='applied' cannot tell"),
        ("ablation", "applied", "gate='applied' cannot tell"),
    ],
)
def test_scores_that_are_the_same_for_all_groups_are_refused(
    model: PreTrainedModel,
    groups: NeuronGroups,
    tokenizer: PreTrainedTokenizerFast,
    forget: Dataset,
    score: Score,
    gate: str,
    message: str,
) -> None:
    factorize(model, groups)
    with pytest.raises(ValueError, match=message):
        attribute_experts(model, forget, processing_class=tokenizer, score=score, gate=gate, show_progress=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("prefix_cache", [True, False])
def test_training_changes_one_group_and_no_other_bit(
    prefix_cache: bool,
    model: PreTrainedModel,
    groups: NeuronGroups,
    tokenizer: PreTrainedTokenizerFast,
    forget: Dataset,
    retain: Dataset,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    original = weights(model)
    with caplog.at_level(logging.INFO, logger="uoe_peft"):
        trainer = UnlearningTrainer(
            factorize(model, groups),
            make_args(output_dir=str(tmp_path), forget_loss="grad_ascent", prefix_cache=prefix_cache, max_steps=4),
            train_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=[TARGET], train_router=False),
        )
        trainer.train()
    assert "the router anchor does not apply" in caplog.text
    assert all("anchor" not in entry and "loss_anchor" not in entry for entry in trainer.state.log_history)
    found = weights(to_dense(trainer.model.merge_and_unload()))
    own = own_neurons(groups)
    for name, tensor in found.items():
        by_column = name.endswith("down_proj.weight")
        rows, before = (t.T if by_column else t for t in (tensor, original[name]))
        changed = (rows != before).any(dim=-1) if rows.dim() > 1 else rows != before
        expected = own if "layers.1.mlp" in name else []
        assert changed.nonzero().flatten().tolist() == expected, name


def test_the_prefix_cache_gives_the_same_weights(
    groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast, forget: Dataset, retain: Dataset, tmp_path: Path
) -> None:
    deltas = []
    for prefix_cache in (True, False):
        torch.manual_seed(0)
        trainer = UnlearningTrainer(
            factorize(make_model(), groups),
            make_args(output_dir=str(tmp_path), forget_loss="npo", prefix_cache=prefix_cache, max_steps=3),
            train_dataset=forget,
            retain_dataset=retain,
            processing_class=tokenizer,
            peft_config=UOEConfig(target_experts=[TARGET], train_router=False),
        )
        trainer.train()
        deltas.append([p.detach() for p in trainer.model.parameters() if p.requires_grad])
    for cached, whole in zip(*deltas, strict=True):
        assert cached.abs().max() > 0
        torch.testing.assert_close(cached, whole, rtol=1e-3, atol=1e-6)


def test_auto_attributes_on_groups(
    model: PreTrainedModel,
    groups: NeuronGroups,
    tokenizer: PreTrainedTokenizerFast,
    forget: Dataset,
    retain: Dataset,
    tmp_path: Path,
) -> None:
    trainer = UnlearningTrainer(
        factorize(model, groups),
        make_args(output_dir=str(tmp_path), forget_loss="npo", attribution_score="contrast"),
        train_dataset=forget,
        retain_dataset=retain,
        processing_class=tokenizer,
        peft_config=UOEConfig(target_experts="auto", train_router=False),
    )
    config = trainer.model.peft_config["default"]
    assert len(config.target_experts) == 1 and config.attribution["score"] == "contrast"


def test_moments_of_a_group_are_those_of_its_neurons(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast
) -> None:
    seen: dict[str, torch.Tensor] = {}
    mlp = model.model.layers[1].mlp
    for name in ("gate_proj", "down_proj"):
        mlp.get_submodule(name).register_forward_pre_hook(lambda m, args, name=name: seen.update({name: args[0]}))
    ids = torch.tensor([[5, 9, 11, 30, 2]])
    with torch.no_grad():
        model(input_ids=ids)
    into, activations = seen["gate_proj"][0], seen["down_proj"][0][:, own_neurons(groups)]
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}]
    with pytest.warns(UserWarning, match="dimensions"):
        moments = measure_moments(factorize(model, groups), batches, [TARGET], routers=False)  # type: ignore[arg-type]
    by_name = {name.projection: own for name, own in moments.slices.items()}
    torch.testing.assert_close(by_name["gate_up_proj"].second.float(), into.T @ into / 5)
    torch.testing.assert_close(by_name["down_proj"].second.float(), activations.T @ activations / 5)


def test_a_solution_without_training_is_one_of_groups(
    model: PreTrainedModel, groups: NeuronGroups, tokenizer: PreTrainedTokenizerFast, forget: Dataset, retain: Dataset
) -> None:
    solved = solve_unlearning(
        factorize(model, groups), forget, retain, processing_class=tokenizer, target_experts=[TARGET], keep_retain=0.01
    )
    assert (logits(solved) - logits(make_model())).abs().max() > 1e-3
    said = logits(solved)
    torch.testing.assert_close(logits(to_dense(solved.merge_and_unload())), said, rtol=1e-4, atol=1e-5)


def test_the_card_says_how_such_an_adapter_is_loaded(
    model: PreTrainedModel, groups: NeuronGroups, tmp_path: Path
) -> None:
    adapted(factorize(model, groups)).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "load_factorized(" in card and "to_dense(" in card and "AutoPeft" not in card
