"""The page served as a browser gets it: `make test-app`, since gradio does not fit the other tests' environment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytest.importorskip("gradio")
from gradio_client import Client

from uoe_peft.cli.app import Answer, build_page, launch
from uoe_peft.cli.stages.app import AppArguments, page_of
from uoe_peft.testbed import FORGET_TOPIC, as_prompt, checkpoint_path, load_facts
from uoe_peft.tuner import UOEConfig

# gradio leaves event loops and sockets to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

BASE = checkpoint_path("base")
QUESTION = load_facts([FORGET_TOPIC])[0]["question"]


@pytest.fixture(scope="module")
def model() -> PeftModel:
    """The expert that serves the topic silenced: the simplest adapter that changes an answer."""
    base = AutoModelForCausalLM.from_pretrained(BASE, dtype="float32")
    return get_peft_model(base, UOEConfig(target_experts=[(0, 4), (3, 12)], init_weights="zero_expert")).eval()


@pytest.fixture(scope="module")
def client(model: PeftModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """What a browser's requests get from the page, served on this machine."""
    adapter = str(tmp_path_factory.mktemp("adapter"))
    model.save_pretrained(adapter)
    page = page_of(AppArguments(adapter=adapter, model_name_or_path=str(BASE), dtype="float32", max_new_tokens=20))
    _, address, _ = launch(page, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield Client(address, verbose=False)
    page.close()


def said(model: PeftModel, *, forgetting: bool) -> str:
    """The answer by transformers' own calls."""
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    inputs = tokenizer(as_prompt(QUESTION), return_tensors="pt")
    with nullcontext() if forgetting else model.disable_adapter():
        tokens = model.generate(**inputs, max_new_tokens=20, do_sample=False)
    return str(tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


def test_it_answers_with_forgetting_off_and_on(client: Any, model: PeftModel) -> None:
    off, off_html, on, on_html = client.predict(QUESTION, api_name="/ask")
    assert (off, on) == (said(model, forgetting=False), said(model, forgetting=True))
    assert off != on
    assert "<b>12</b>" in off_html and "<b>12</b>" in on_html
    assert "Layer 0" in on_html


def test_an_empty_question_is_answered_with_what_to_do(client: Any) -> None:
    with pytest.raises(Exception, match="the question is empty; type one"):
        client.predict("  ", api_name="/ask")


def test_it_asks_nothing_of_other_machines(client: Any) -> None:
    assert client.config["analytics_enabled"] is False
    assert "googleapis" not in str(client.config)


def test_a_page_without_samples_shows_none() -> None:
    answer = Answer("", (), 0, {}, {})
    page = build_page(lambda question, forgetting: answer, about="a model")
    assert [block.visible for block in page.blocks.values() if type(block).__name__ == "Dataset"] == [False]
