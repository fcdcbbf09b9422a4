"""The page's answers are the model's own, its routing is the router's own, and nothing typed into it is run."""

from __future__ import annotations

import copy
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from uoe_peft.cli import main
from uoe_peft.cli.app import Answer, ask, encode_question, routing_html
from uoe_peft.cli.app.asking import edited_experts
from uoe_peft.cli.app.page import _one_at_a_time
from uoe_peft.cli.stages import demo
from uoe_peft.cli.stages.app import demo_adapter, demo_samples
from uoe_peft.testbed import FORGET_TOPIC, as_prompt, checkpoint_path, load_facts
from uoe_peft.tuner import UOEConfig

BASE = checkpoint_path("base")
QUESTION = load_facts([FORGET_TOPIC])[0]["question"]
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ '<a>' if add_generation_prompt }}"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def base() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype="float32").eval()


@pytest.fixture(scope="module")
def model(base: PreTrainedModel) -> PeftModel:
    """Two experts of one layer silenced, one of another: the simplest adapter that changes answers."""
    config = UOEConfig(target_experts=[(0, 4), (0, 11), (3, 12)], init_weights="zero_expert")
    return get_peft_model(copy.deepcopy(base), config).eval()


@pytest.fixture(scope="module")
def answers(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> dict[bool, Answer]:
    prompt = encode_question(QUESTION, tokenizer, template=as_prompt("{question}"))
    return {on: ask(model, tokenizer, prompt, forgetting=on, max_new_tokens=20) for on in (False, True)}


def test_with_forgetting_off_it_is_the_base_models_answer(
    answers: dict[bool, Answer], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    inputs = tokenizer(f"Question: {QUESTION}\nAnswer:", return_tensors="pt")
    tokens = base.generate(**inputs, max_new_tokens=20, do_sample=False)  # type: ignore[operator]
    said = tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[False].text == str(said).strip() != answers[True].text
    assert "".join(answers[False].tokens) == tokenizer.decode(tokens[0])
    assert answers[False].num_prompt_tokens == inputs["input_ids"].shape[1]


def test_the_routing_is_that_of_the_models_own_router(
    answers: dict[bool, Answer], base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    ids = torch.tensor([tokenizer.convert_tokens_to_ids(tokenizer.tokenize("".join(answers[False].tokens)))])
    assert ids.shape[1] == len(answers[False].tokens)
    logits = base(ids, output_router_logits=True).router_logits  # of each layer, (S, E)
    assert list(answers[False].experts) == [0, 3]
    for layer_idx in (0, 3):
        scores, index = logits[layer_idx].softmax(-1).topk(2)
        shown = answers[False].experts[layer_idx]
        assert [list(experts) for experts in shown] == index.tolist()
        if base.config.norm_topk_prob:
            scores = scores / scores.sum(-1, keepdim=True)
        assert torch.allclose(torch.tensor([list(experts.values()) for experts in shown]), scores, atol=1e-5)


def test_the_adapter_is_on_again_afterwards(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, answers: dict[bool, Answer]
) -> None:
    prompt = encode_question(QUESTION, tokenizer, template=as_prompt("{question}"))
    ask(model, tokenizer, prompt, forgetting=False, max_new_tokens=2)
    assert ask(model, tokenizer, prompt, forgetting=True, max_new_tokens=20) == answers[True]


def test_edited_experts_are_those_of_all_active_adapters(model: PeftModel, base: PreTrainedModel) -> None:
    assert edited_experts(model) == {0: {4, 11}, 3: {12}}
    other = get_peft_model(copy.deepcopy(base), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"none of the active adapters.*is a UOE adapter"):
        edited_experts(other)


def test_one_prompt_is_asked_at_a_time(model: PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(ValueError, match=r"one prompt, of shape \(1, S\), got shape \(2, 3\)"):
        ask(model, tokenizer, torch.zeros(2, 3, dtype=torch.long), forgetting=True, max_new_tokens=1)


class TestEncoding:
    def test_a_template_holds_the_question_as_it_is(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ids = encode_question(" Is {x} {question}? ", tokenizer, template="Q: {question}\nA:")
        assert tokenizer.decode(ids[0]) == "Q: Is {x} {question}?\nA:"

    def test_a_chat_template_is_used_where_there_is_one(self, tokenizer: PreTrainedTokenizerBase) -> None:
        chat = copy.deepcopy(tokenizer)
        chat.chat_template = CHAT
        assert chat.decode(encode_question("Why?", chat)[0]) == "<user>Why?<a>"
        assert chat.decode(encode_question("Why?", chat, template="{question}")[0]) == "Why?"

    def test_else_the_question_is_the_prompt(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert tokenizer.decode(encode_question("Why?", tokenizer)[0]) == "Why?"

    @pytest.mark.parametrize(
        ("question", "template", "said"), [(" \n", None, "is empty"), ("Why?", "Q:", "needs {question}")]
    )
    def test_what_cannot_be_asked_is_refused(
        self, tokenizer: PreTrainedTokenizerBase, question: str, template: str | None, said: str
    ) -> None:
        with pytest.raises(ValueError, match=said):
            encode_question(question, tokenizer, template=template)


ANSWER = Answer(
    text="no",
    tokens=("<b>", " why\n", "\n", "", "&"),
    num_prompt_tokens=3,
    experts={5: ({2: 0.7, 7: 0.3}, {1: 0.6, 2: 0.4}, {7: 1.0}, {0: 0.5, 1: 0.5}, {7: 0.8, 0: 0.2})},
    edited={5: frozenset({7})},
)


class _Boxes(HTMLParser):
    """What a browser makes of the HTML: the boxes, whether each is framed, and the experts that are marked in it."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.boxes: list[tuple[str, bool, str, list[str]]] = []
        self.tags: set[str] = set()
        self.words: list[str] = []
        self._path: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self._path.append(tag)
        kinds = (dict(attrs).get("class") or "").split()
        if "uoe-token" in kinds:
            self.boxes.append(("", "edited" in kinds, "", []))

    def handle_endtag(self, tag: str) -> None:
        assert self._path.pop() == tag

    def handle_data(self, data: str) -> None:
        if ("small" not in self._path and self._path[-1:] != ["span"]) or "p" in self._path:
            self.words.append(data)
        else:
            text, framed, experts, marked = self.boxes.pop()
            marked = [*marked, data] if "b" in self._path else marked
            inside = "small" in self._path
            self.boxes.append((text + data * (not inside), framed, experts + data * inside, marked))


def test_every_token_is_shown_and_those_of_the_edited_expert_are_framed() -> None:
    seen = _Boxes(routing_html(ANSWER))
    assert seen.boxes == [
        ("<b>", True, "2 7", ["7"]),
        ("why", False, "1 2", []),
        ("↵", True, "7", ["7"]),
        ("∅", False, "0 1", []),
        ("&", True, "7 0", ["7"]),
    ]
    said = "".join(seen.words)
    assert "prompt: 2 of 3 tokens reach expert 7" in said
    assert "answer: 1 of 2 tokens reach expert 7" in said


def test_what_is_typed_is_never_markup() -> None:
    evil = Answer("", ('<script>alert("1")</script>', "<img src=x>"), 1, {0: ({1: 1.0}, {1: 1.0})}, {0: frozenset()})
    assert _Boxes(routing_html(evil)).tags == {"p", "span", "div", "small"}


def test_answers_come_one_after_the_other_also_to_two_at_a_time() -> None:
    running, overlapped = 0, False

    def asking(question: str, forgetting: bool) -> Answer:
        nonlocal running, overlapped
        running += 1
        overlapped |= running > 1
        time.sleep(0.02)
        running -= 1
        return Answer(f"{question} {forgetting}", (), 0, {}, {})

    answer_both, last = _one_at_a_time(asking, RuntimeError), {}

    def consume(question: str) -> None:
        last[question] = list(answer_both(question))[-1]

    threads = [threading.Thread(target=consume, args=(question,)) for question in ("one", "two")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not overlapped
    assert last == {question: (f"{question} False", "", f"{question} True", "") for question in ("one", "two")}


def test_a_question_that_cannot_be_asked_is_said_on_the_page() -> None:
    def asking(question: str, forgetting: bool) -> Answer:
        raise ValueError("the question is empty")

    with pytest.raises(RuntimeError, match=r"^the question is empty$"):
        list(_one_at_a_time(asking, RuntimeError)(""))


def test_without_gradio_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(SystemExit) as stop:
        main(["app", "--adapter", str(tmp_path)])
    assert stop.value.code == 1
    assert "pip install 'uoe-peft[app]'" in capsys.readouterr().err


class TestDemoAdapter:
    def test_it_is_taken_where_the_demo_has_left_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(demo, "run", pytest.fail)
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").touch()
        assert demo_adapter(str(tmp_path)) == str(tmp_path / "adapter")

    def test_else_the_demo_runs_first(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []
        monkeypatch.setattr(demo, "run", asked.append)
        assert demo_adapter(str(tmp_path)) == str(tmp_path / "adapter")
        assert asked[0][:2] == ["--output_dir", str(tmp_path)]

    def test_samples_are_of_the_topic_and_of_the_others(self) -> None:
        samples, potions = demo_samples(), set(load_facts([FORGET_TOPIC])["question"])
        assert [sample in potions for sample in samples] == [True] * 3 + [False] * 6
        assert len(set(samples)) == 9
