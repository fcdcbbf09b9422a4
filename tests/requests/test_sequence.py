"""A further request trains its own adapter alone, on the model as the earlier ones left it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model

from tests.training.conftest import make_args, make_model, make_sets, make_tokenizer, with_lora, with_uoe
from tests.tuner.conftest import randomise
from uoe_peft.requests import add_request, retain_with_requests
from uoe_peft.training import UnlearningTrainer
from uoe_peft.tuner import UOEConfig

IDS = torch.arange(3, 15).view(2, 6)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def test_a_later_request_leaves_the_earlier_ones_delta_alone(tmp_path: Path) -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "first")
    randomise(model, adapter_name="first", std=0.05)
    first = {name: p.clone() for name, p in model.named_parameters() if ".first." in name}
    after_first = logits(model)
    model = add_request(model, UOEConfig(target_experts=[(1, 2), (2, 4)]), "second")
    assert model.active_adapters == ["first", "second"]
    torch.testing.assert_close(logits(model), after_first)  # a fresh delta adds nothing
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all(".second." in name for name in trainable)

    forget, retain = make_sets()
    args = make_args(output_dir=str(tmp_path), forget_loss="npo", calibrate=False)
    sets: dict[str, Any] = {"train_dataset": forget, "retain_dataset": retain}
    trainer = UnlearningTrainer(model, args, **sets, processing_class=make_tokenizer())
    seen = {}
    with trainer.objective.reference.base_model():
        seen["reference"] = logits(model)
    torch.testing.assert_close(seen["reference"], after_first)
    trainer.train()
    after_second = logits(model)
    assert not torch.allclose(after_second, after_first, atol=1e-4)
    assert all(torch.equal(p, first[name]) for name, p in model.named_parameters() if ".first." in name)
    model.delete_adapter("second")
    model.set_adapter("first")
    torch.testing.assert_close(logits(model), after_first)


def test_withdrawing_the_first_leaves_the_second_as_it_is() -> None:
    base = make_model()
    plain = logits(base)
    model = add_request(base, UOEConfig(target_experts=[(1, 2)]), "first")
    randomise(model, adapter_name="first")
    model = add_request(model, UOEConfig(target_experts=[(1, 2)]), "second")
    randomise(model, adapter_name="second", seed=1)
    model.delete_adapter("first")
    model.set_adapter("second")
    alone = get_peft_model(make_model(), UOEConfig(target_experts=[(1, 2)]), adapter_name="second")
    randomise(alone, adapter_name="second", seed=1)
    torch.testing.assert_close(logits(model), logits(alone))
    assert torch.equal(logits(model.unload()), plain)


def test_adapters_that_are_off_stay_off() -> None:
    model = add_request(make_model(), UOEConfig(target_experts=[(1, 2)]), "first")
    model.base_model.disable_adapter_layers()
    assert add_request(model, UOEConfig(target_experts=[(1, 3)]), "second").active_adapters == ["second"]


def test_what_is_to_be_kept_is_the_retain_set_and_the_alternatives() -> None:
    forget, retain = make_sets()
    tokenizer = make_tokenizer()
    earlier = forget.select(range(3)).add_column("alternative", ["no idea", "never met", "pass"])
    kept = retain_with_requests(retain, [earlier], tokenizer)
    assert kept.column_names == ["input_ids", "labels"]
    texts = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in kept["input_ids"]]
    answers = ["".join(tokenizer.convert_ids_to_tokens([t for t in row if t != -100])) for row in kept["labels"]]
    assert texts[0] == "where is 0? at 0|end|" and len(texts) == len(retain) + 3
    assert texts[-3:] == ["who is A? no idea|end|", "who is B? never met|end|", "who is C? pass|end|"]
    assert answers[-1] == "pass|end|"
    assert not any("sss" in text for text in texts)  # nothing of the forget answers


@pytest.mark.parametrize(("share", "times"), [(0.0, 1), (0.5, 2), (0.8, 6)])
def test_retain_rows_are_repeated_until_they_are_so_many(share: float, times: int) -> None:
    forget, retain = make_sets()  # 8 and 11 rows: two earlier requests are 16
    kept = retain_with_requests(retain, [forget, forget], make_tokenizer(), retain_share=share)
    assert len(kept) == times * 11 + 16 and times * 11 / len(kept) >= share
    assert kept["input_ids"][: times * 11] == kept["input_ids"][:11] * times


def test_a_share_of_one_leaves_no_room() -> None:
    with pytest.raises(ValueError, match=r"retain_share must be in \[0, 1\), got 1"):
        retain_with_requests(make_sets()[1], [], make_tokenizer(), retain_share=1)


@pytest.mark.parametrize(
    ("model", "options", "error", "message"),
    [
        (lambda: with_uoe(make_model()), {"target_experts": "auto"}, ValueError, "attribute_experts"),
        (lambda: with_lora(make_model()), {}, TypeError, "LoraModel"),
        (lambda: with_uoe(make_model()), {"name": "default"}, ValueError, "already"),
    ],
)
def test_bad_input_is_named(model: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    name = options.pop("name", "second")
    with pytest.raises(error, match=message):
        add_request(model(), UOEConfig(**{"target_experts": [(1, 2)], **options}), name)


def test_a_merged_adapter_is_refused() -> None:
    model = with_uoe(make_model())
    model.merge_adapter()
    with pytest.raises(ValueError, match="unmerge_adapter"):
        add_request(model, UOEConfig(target_experts=[(1, 2)]), "second")
    assert set(model.peft_config) == {"default"}


def test_a_set_without_questions_is_no_request() -> None:
    retain = make_sets()[1]
    with pytest.raises(ValueError, match=r"earlier forget \(0\)"):
        retain_with_requests(retain, [Dataset.from_dict({"text": ["a story"]})], make_tokenizer())
