"""Clusters of equal size find what was planted, and neurons that are active on the same texts come together."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from scipy.optimize import linear_sum_assignment
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.dense.conftest import NEURONS, logits
from uoe_peft.data import collate
from uoe_peft.dense import cluster_neurons
from uoe_peft.dense.balanced import assign_evenly, balanced_clusters
from uoe_peft.dense.clustering import measure_effects
from uoe_peft.errors import UnsupportedModelError


def test_planted_clusters_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(5, 30, generator=generator)
    truth = torch.randperm(40, generator=generator) % 5
    vectors = normalize(centres[truth] + 0.1 * torch.randn(40, 30, generator=generator), dim=1)
    found = balanced_clusters(vectors, 5, generator=generator)
    assert torch.equal(found.bincount(), torch.full((5,), 8))
    together = found[:, None] == found[None, :]
    assert torch.equal(together, truth[:, None] == truth[None, :])


@pytest.mark.parametrize("seed", range(5))
def test_an_even_assignment_is_nearly_the_best_one(seed: int) -> None:
    gain = torch.rand(60, 6, generator=torch.Generator().manual_seed(seed))
    found = assign_evenly(gain)
    assert torch.equal(found.bincount(minlength=6), torch.full((6,), 10))
    slots = gain.repeat_interleave(10, dim=1).numpy()  # (60, 60): ten places in every cluster
    best = slots[linear_sum_assignment(slots, maximize=True)].sum()
    worst = slots[linear_sum_assignment(slots)].sum()
    assert (float(gain.gather(1, found[:, None]).sum()) - worst) / (best - worst) > 0.98


def test_an_even_assignment_where_all_want_the_same() -> None:
    gain = torch.tensor([[9.0, 0.0], [9.0, 8.0], [9.0, 1.0], [9.0, 7.0]])
    assert assign_evenly(gain).tolist() == [0, 1, 0, 1]  # who loses least gives way


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_vectors_that_are_all_the_same_are_divided_all_the_same(value: float) -> None:
    vectors = normalize(torch.full((12, 4), value), dim=1)
    found = balanced_clusters(vectors, 3, generator=torch.Generator().manual_seed(0))
    assert found.bincount(minlength=3).tolist() == [4, 4, 4]


def test_effects_are_means_over_the_tokens_of_each_sequence(model: PreTrainedModel) -> None:
    rows = [{"input_ids": [5, 9, 11, 2], "labels": [5, 9, 11, 2]}, {"input_ids": [7, 30], "labels": [7, 30]}]
    effects = measure_effects(model, [collate(rows, pad_token_id=0)])
    assert {layer_idx: own.shape for layer_idx, own in effects.items()} == dict.fromkeys(range(3), (NEURONS, 2))
    for column, row in enumerate(rows):  # one at a time, without padding
        with torch.no_grad():
            states = model.model(torch.tensor([row["input_ids"]]), output_hidden_states=True).hidden_states
            layer = model.model.layers[0]
            attended = (
                states[0]
                + layer.self_attn(
                    layer.input_layernorm(states[0]),
                    position_embeddings=model.model.rotary_emb(states[0], torch.arange(len(row["input_ids"]))[None]),
                    attention_mask=None,
                )[0]
            )
            x = layer.post_attention_layernorm(attended)[0]
            mlp = layer.mlp
            activations = torch.nn.functional.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
            expected = activations.abs().mean(dim=0) * mlp.down_proj.weight.square().sum(dim=0).sqrt()
        torch.testing.assert_close(effects[0][:, column], expected)


def test_neurons_that_are_active_on_the_same_texts_come_together(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    texts = Dataset.from_dict({"text": ["aaaaaaa", "bbbbbbb", "ccccccc"] * 4})
    planted = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(4)) % 3
    directions = torch.eye(32)[:3] * 6
    with torch.no_grad():
        for place, letter in enumerate("abc"):  # each letter has a direction of its own, and attention adds nothing
            model.model.embed_tokens.weight[tokenizer(letter)["input_ids"][0]] = directions[place]
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.mul_(1e-3)
            layer.post_attention_layernorm.weight.fill_(1.0)
            layer.mlp.gate_proj.weight.copy_(torch.eye(32)[planted])
            layer.mlp.up_proj.weight.copy_(torch.eye(32)[planted])
    before = logits(model)
    groups = cluster_neurons(model, texts, processing_class=tokenizer, num_groups=3, batch_size=5, show_progress=False)
    assert torch.equal(before, logits(model))
    for found in groups.by_layer.values():
        together = found[:, None] == found[None, :]
        assert torch.equal(together, planted[:, None] == planted[None, :])


def test_bad_calibration_is_named(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, forget: Dataset) -> None:
    def cluster(rows: Dataset, **options: int) -> None:
        cluster_neurons(model, rows, processing_class=tokenizer, show_progress=False, **{"num_groups": 6, **options})

    with pytest.raises(ValueError, match="has 1 sequences"):
        cluster(forget.select([0]))
    with pytest.raises(ValueError, match="calibration set is empty"):
        cluster(forget.select([]))
    with pytest.raises(ValueError, match="cannot be divided into 5 groups"):
        cluster(forget, num_groups=5)
    with pytest.raises(ValueError, match="num_groups must be at least 2, got 1"):
        cluster(forget, num_groups=1)
    with pytest.raises(ValueError, match="max_tokens must be at least 1, got 0"):
        cluster(forget, max_tokens=0)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="activations of layer 1 are NaN"):
        cluster(forget)


def test_a_model_with_adapters_is_refused(model: PreTrainedModel, forget: Dataset, tokenizer: object) -> None:
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(UnsupportedModelError, match="has an adapter"):
        cluster_neurons(wrapped, forget, processing_class=tokenizer, num_groups=6)  # type: ignore[arg-type]
