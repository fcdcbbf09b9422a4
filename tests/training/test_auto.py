"""`target_experts="auto"` attributes on the tokens that training sees, and what would be ignored is refused."""

from __future__ import annotations

from typing import Any

import pytest
from datasets import Dataset

from uoe_peft.data import encoding
from uoe_peft.training import UnlearningTrainer
from uoe_peft.tuner import UOEConfig

pytestmark = pytest.mark.filterwarnings("ignore::uoe_peft.attribution.AttributionWarning")

TEMPLATE = "{% for m in messages %}{{ '[' + m.role + ']' + m.content + ';' }}{% endfor %}"


def auto(make_trainer: Any, build: Any, **options: Any) -> tuple[UnlearningTrainer, dict[str, Any]]:
    trainer = make_trainer(build.model(), peft_config=UOEConfig(target_experts="auto"), **options)
    return trainer, trainer.model.peft_config["default"].attribution


def texts(rows: Dataset, tokenizer: Any) -> list[str]:
    return ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in rows["input_ids"]]


def test_each_text_is_tokenised_once_for_attribution_and_training(make_trainer, build, sets, tokenizer, monkeypatch):
    seen: list[str] = []
    encode = encoding._encode
    monkeypatch.setattr(encoding, "_encode", lambda tokenizer, text: seen.append(text) or encode(tokenizer, text))
    forget, retain = (
        Dataset.from_dict({"body": [p + c for p, c in zip(rows["prompt"], rows["completion"], strict=True)]})
        for rows in sets
    )
    trainer, attribution = auto(make_trainer, build, forget=forget, retain=retain, dataset_text_field="body")
    expected = [text + "|end|" for rows in (forget, retain) for text in rows["body"]]
    assert sorted(seen) == sorted(expected)
    # One token a character, one for the end.
    assert attribution["forget"]["num_tokens"] == sum(len(text) + 1 for text in forget["body"])
    assert attribution["retain"]["num_tokens"] == sum(len(text) + 1 for text in retain["body"])
    assert texts(trainer.train_dataset.forget, tokenizer) == [text + "|end|" for text in forget["body"]]


def test_attribution_reads_what_the_formatting_function_writes(make_trainer, build, tokenizer):
    options = {"formatting_func": lambda row: f"<{row['completion']}>", "completion_only_loss": False}
    rows = Dataset.from_dict({"prompt": ["who? ", "what? "], "completion": ["ab", "cde"]})
    trainer, attribution = auto(make_trainer, build, forget=rows, **options)
    # Not the prompt and completion, which the rows have, too.
    assert texts(trainer.train_dataset.forget, tokenizer) == ["<ab>|end|", "<cde>|end|"]
    assert attribution["forget"]["num_tokens"] == 5 + 6


def test_attribution_reads_conversations_by_the_template_that_is_asked_for(make_trainer, build, tmp_path, tokenizer):
    path = tmp_path / "other.jinja"
    path.write_text(TEMPLATE)
    rows = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "abc"}]}]
    )
    trainer, attribution = auto(make_trainer, build, forget=rows, chat_template_path=str(path))
    assert texts(trainer.train_dataset.forget, tokenizer) == ["[user]q;[assistant]abc;"]
    assert attribution["forget"]["num_tokens"] == len("[user]q;[assistant]abc;")


def test_attribution_reads_texts_with_the_end_that_is_asked_for(make_trainer, build, tokenizer):
    rows = Dataset.from_dict({"text": ["ab", "cd~"]})
    trainer, attribution = auto(make_trainer, build, forget=rows, eos_token="~")
    assert texts(trainer.train_dataset.forget, tokenizer) == ["ab~", "cd~"]
    assert attribution["forget"]["num_tokens"] == 6
    with pytest.raises(ValueError, match="eos_token='nowhere' is not in the tokenizer's vocabulary"):
        auto(make_trainer, build, forget=rows, eos_token="nowhere")


def test_a_template_that_comes_with_new_tokens_is_refused(make_trainer, build, tmp_path, tokenizer):
    tokenizer.add_tokens(["|new|"])
    tokenizer.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=r"adds \d+ tokens to the vocabulary.*named \*\.jinja"):
        auto(make_trainer, build, chat_template_path=str(tmp_path / "other"))


def test_a_retain_set_that_training_does_not_need_still_tells_specialists_from_generalists(make_trainer, build, sets):
    trainer, attribution = auto(make_trainer, build, retain_loss="none", attribution_score="contrast")
    assert trainer.train_dataset.retain is None
    assert attribution["score"] == "contrast"
    # Questions and answers, and the token that ends each.
    rows = sets[1]
    expected = sum(len(p + c) + 1 for p, c in zip(rows["prompt"], rows["completion"], strict=True))
    assert attribution["retain"]["num_tokens"] == expected


def test_a_retain_set_that_attribution_alone_reads_is_formatted_too(make_trainer, build, sets):
    options = {"formatting_func": lambda row: f"<{row['completion']}>", "completion_only_loss": False}
    _, attribution = auto(make_trainer, build, retain_loss="none", attribution_score="contrast", **options)
    assert attribution["retain"]["num_tokens"] == sum(len(answer) + 3 for answer in sets[1]["completion"])


def test_all_processes_train_what_the_first_has_found(make_trainer, build, monkeypatch):
    monkeypatch.setattr("uoe_peft.training.auto.broadcast_object_list", lambda found: [[(0, 4)], {**found[1], "of": 0}])
    trainer, attribution = auto(make_trainer, build)
    assert trainer.model.peft_config["default"].target_experts == [(0, 4)]
    assert attribution["of"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_collator": lambda rows: rows}, "data_collator is not used in unlearning: rows are padded role by role"),
        ({"compute_loss_func": lambda *_: 0}, "compute_loss_func is not used in unlearning: the loss is what"),
    ],
)
def test_what_would_be_ignored_is_refused(uoe_model, sets, tokenizer, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        UnlearningTrainer(
            uoe_model, train_dataset=sets[0], retain_dataset=sets[1], processing_class=tokenizer, **options
        )


def test_sets_that_unlearning_cannot_read_are_refused_before_the_model_is_loaded(make_trainer):
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        make_trainer("no/such/model", dataset_kwargs={"skip_prepare_dataset": True})
    pictures = Dataset.from_dict({"prompt": ["q"], "completion": ["a"], "images": ["a.png"]})
    for role in ("forget", "retain"):
        with pytest.raises(ValueError, match=rf"the {role} set has the columns \['images'\]"):
            make_trainer("no/such/model", **{role: pictures})


def test_processes_for_tokenising_are_honoured(make_trainer, monkeypatch):
    asked: list[Any] = []
    plain = Dataset.map

    def spy(self: Dataset, *args: Any, num_proc: int | None = None, **options: Any) -> Dataset:
        asked.append(num_proc)
        return plain(self, *args, **options)

    monkeypatch.setattr(Dataset, "map", spy)
    written = {"formatting_func": lambda row: row["prompt"], "completion_only_loss": False}
    for options in ({"forget_loss": "npo"}, {"forget_loss": "idk"}, written):
        asked.clear()
        make_trainer(dataset_num_proc=3, **options)
        assert set(asked) == {3}
