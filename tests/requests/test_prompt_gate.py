"""The gate against two Gaussians by scikit-learn, and what it reads against the model's own hidden states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from safetensors.torch import save_file
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from tests.training.conftest import make_model, make_tokenizer, with_lora
from tests.tuner.conftest import randomise
from uoe_peft import PromptGate
from uoe_peft.requests import generate_gated
from uoe_peft.requests.prompt_gate import _discriminant, prompt_features
from uoe_peft.tuner import UOEConfig

TOKENIZER = make_tokenizer()


def rows(*prompts: str) -> Dataset:
    return Dataset.from_dict({"prompt": list(prompts), "completion": [" x"] * len(prompts)})


def sets() -> tuple[dict[str, Dataset], Dataset]:
    names = "ABCDEFGHIJKL"
    requests = {
        "people": rows(*(f"who is {c}? " for c in names)),
        "sums": rows(*(f"{i} + {i + 3} = " for i in range(12))),
    }
    return requests, rows(*(f"where lies the town of {c}{d}? " for c, d in zip(names, reversed(names), strict=True)))


def with_requests() -> Any:
    """Two adapters, the lower of which edits layer 1."""
    model = get_peft_model(make_model(), UOEConfig(target_experts=[(2, 3)]), adapter_name="people")
    model.add_adapter("sums", UOEConfig(target_experts=[(1, 0), (1, 1), (1, 2), (1, 3)]))
    randomise(model, adapter_name="people")
    randomise(model, adapter_name="sums", std=1.0)
    return model.eval()


def encoded(*prompts: str) -> dict[str, torch.Tensor]:
    batch = TOKENIZER(list(prompts), padding=True, padding_side="left", return_tensors="pt")
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_the_discriminant_is_that_of_scikit_learn() -> None:
    generator = torch.Generator().manual_seed(0)
    classes = [torch.randn(50, 4, generator=generator, dtype=torch.float64) * torch.arange(1, 5) + i for i in range(3)]
    weight, bias = _discriminant(classes[0], classes[1:], ridge=1e-12)
    labels = [i for i in range(3) for _ in range(50)]
    known = LinearDiscriminantAnalysis(solver="lsqr", priors=[1 / 3] * 3).fit(torch.cat(classes).numpy(), labels)
    expected = torch.from_numpy(known.coef_[1:] - known.coef_[0])
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bias, torch.from_numpy(known.intercept_[1:] - known.intercept_[0]), rtol=1e-6, atol=1e-8)


def test_features_are_means_over_tokens_whatever_the_padding() -> None:
    model = make_model().eval()
    inputs: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.gate.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    prompts = ["who is A? ", "1 + 4 = "]
    with torch.no_grad():
        for prompt in prompts:  # alone, without padding
            model(torch.tensor([TOKENIZER(prompt)["input_ids"]]))
    handle.remove()
    expected = torch.stack([own.flatten(0, -2).mean(dim=0) for own in inputs])
    found = prompt_features(model, 1, **encoded(*prompts))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_it_tells_requests_from_each_other_and_from_all_else_whatever_is_on() -> None:
    requests, other = sets()
    model = with_requests()
    gate = PromptGate.fit(model, requests, other, processing_class=TOKENIZER)
    assert gate.layer_idx == 1  # the lowest that is edited
    asked = encoded("who is Z? ", "45 + 48 = ", "where lies the town of QR? ")
    expected = gate.scores(model, **asked)
    for active in ("people", "sums"):
        model.set_adapter(active)
        assert gate.choose(model, **asked) == ["people", "sums", "__base__"]
        assert torch.equal(gate.scores(model, **asked), expected)
    above = float(expected.max()) + 1
    assert gate.choose(model, **asked, threshold=above) == ["__base__"] * 3


def test_gated_generation_is_each_adapters_own(tmp_path: Path) -> None:
    requests, other = sets()
    model = with_requests()
    PromptGate.fit(model, requests, other, processing_class=TOKENIZER).save(tmp_path / "gate.safetensors")
    gate = PromptGate.load(tmp_path / "gate.safetensors")
    assert (tmp_path / "gate.safetensors").stat().st_size < 4 * 2 * (32 + 1) + 600
    asked = encoded("who is Z? ", "45 + 48 = ", "where lies the town of QR? ")
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "min_new_tokens": 4}
    found = generate_gated(model, gate, **asked, **options)
    for place, name in enumerate(("people", "sums", None)):
        model.set_adapter(name or "people")
        if name is None:
            with model.disable_adapter():
                alone = model.generate(**asked, **options)
        else:
            alone = model.generate(**asked, **options)
        assert found[place].tolist() == alone[place].tolist()
    model.delete_adapter("sums")
    with pytest.raises(ValueError, match=r"lacks: \['sums'\]"):
        generate_gated(model, gate, **asked, **options)


def test_a_withdrawn_request_is_no_longer_chosen_and_the_others_are_as_before() -> None:
    requests, other = sets()
    model = with_requests()
    gate = PromptGate.fit(model, requests, other, processing_class=TOKENIZER)
    asked = encoded("who is Z? ", "45 + 48 = ", "where lies the town of QR? ")
    left = gate.without("people")
    assert left.adapters == ("sums",) and left.choose(model, **asked) == ["__base__", "sums", "__base__"]
    torch.testing.assert_close(left.scores(model, **asked), gate.scores(model, **asked)[:, 1:])
    with pytest.raises(ValueError, match="only request"):
        left.without("sums")
    with pytest.raises(ValueError, match=r"no adapter 'others'; it has \['people', 'sums'\]"):
        gate.without("others")


def test_without_adapters_it_reads_the_lowest_layer() -> None:
    requests, other = sets()
    assert PromptGate.fit(make_model(), requests, other, processing_class=TOKENIZER).layer_idx == 0
    assert PromptGate.fit(with_lora(make_model()), requests, other, processing_class=TOKENIZER).layer_idx == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_idx": 2}, "layer 2 lies above layer 1"),
        ({"ridge": 0.0}, "ridge must be > 0"),
        ({"requests": {}}, "requests must name an adapter each"),
        ({"requests": {"__base__": rows("a")}}, "requests must name an adapter each"),
        ({"requests": {"people": Dataset.from_dict({"text": ["no prompt"]})}}, "has a prompt in front of"),
        ({"layer_idx": 7}, "7"),
    ],
)
def test_bad_input_is_named(options: dict[str, Any], message: str) -> None:
    requests, other = sets()
    model = make_model() if options.get("layer_idx") == 7 else with_requests()
    with pytest.raises(ValueError, match=message):
        PromptGate.fit(model, options.pop("requests", requests), other, **{"processing_class": TOKENIZER, **options})


def test_a_gate_of_another_model_or_file_is_refused(tmp_path: Path) -> None:
    gate = PromptGate(("a",), 1, torch.zeros(1, 16), torch.zeros(1))
    with pytest.raises(ValueError, match="routers read 16 numbers, this one's read 32"):
        gate.scores(make_model(), **encoded("who"))
    empty = {"input_ids": torch.zeros(2, 3, dtype=torch.int64), "attention_mask": torch.tensor([[1, 1, 1], [0, 0, 0]])}
    with pytest.raises(ValueError, match="no tokens that count"):
        gate.scores(make_model(), **empty)
    path = tmp_path / "gate.safetensors"
    with pytest.raises(FileNotFoundError, match="not there"):
        PromptGate.load(path)
    path.write_bytes(b"no gate")
    with pytest.raises(ValueError, match="no readable safetensors"):
        PromptGate.load(path)
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match=r"expected 'uoe_peft\.prompt_gate/1'"):
        PromptGate.load(path)
    PromptGate(("a",), 1, torch.full((1, 4), float("nan")), torch.zeros(1)).save(path)
    with pytest.raises(ValueError, match="NaN"):
        PromptGate.load(path)
