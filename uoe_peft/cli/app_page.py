"""The page of `uoe-peft app`: one question, two answers, and the experts that each token was sent to."""

from __future__ import annotations

from contextlib import nullcontext
from html import escape
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from uoe_peft.moe.routing import record_routing
from uoe_peft.palette import UNLEARNED


def page(model: PeftModel, tokenizer: PreTrainedTokenizerBase, *, max_new_tokens: int) -> Any:
    """The page, not yet served.

    Args:
        model: A model with an active UOE adapter.
        tokenizer: Its tokenizer.
        max_new_tokens: Where an answer is cut.

    Returns:
        A `gradio.Blocks`.

    Raises:
        ImportError: gradio is not installed.
    """
    try:
        import gradio
    except ImportError as error:
        raise ImportError("the page needs gradio; install it with: pip install 'uoe-peft[app]'") from error

    def answer_twice(question: str) -> tuple[str, str, str, str]:
        off = ask(model, tokenizer, question, forgetting=False, max_new_tokens=max_new_tokens)
        return (*off, *ask(model, tokenizer, question, forgetting=True, max_new_tokens=max_new_tokens))

    with gradio.Blocks(title="uoe-peft: forgetting on and off") as blocks:
        gradio.Markdown("## One question, forgetting off and on\nFramed tokens reach an edited expert.")
        question = gradio.Textbox(label="Question")
        button = gradio.Button("Ask", variant="primary")
        shown = []
        with gradio.Row():
            for title in ("Forgetting off", "Forgetting on"):
                with gradio.Column():
                    shown += [gradio.Textbox(label=title, lines=3), gradio.HTML()]
        button.click(answer_twice, question, shown)
        question.submit(answer_twice, question, shown)
    return blocks


@torch.inference_mode()
def ask(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, question: str, *, forgetting: bool, max_new_tokens: int
) -> tuple[str, str]:
    """A greedy answer, and HTML of its tokens with the experts of the edited layer that each was sent to.

    Args:
        model: A model with an active UOE adapter.
        tokenizer: Its tokenizer; a chat template is used where it has one.
        question: As a user types it.
        forgetting: Whether the adapter is on.
        max_new_tokens: Where the answer is cut.
    """
    prompt: str = question
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": question}]
        prompt = str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
    inputs = tokenizer(prompt, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
    (layer_idx, expert_idx), *_ = model.active_peft_config.target_experts
    with nullcontext() if forgetting else model.disable_adapter():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        with record_routing(model, layer_indices=[layer_idx]) as trace:
            model(input_ids=tokens)
    start = inputs["input_ids"].shape[1]
    answer = str(tokenizer.decode(tokens[0, start:], skip_special_tokens=True)).strip()
    selected = trace[layer_idx].top_k_index.reshape(tokens.shape[1], -1).tolist()
    spans = [
        _span(str(tokenizer.decode([token])), experts, edited=expert_idx in experts)
        for token, experts in zip(tokens[0].tolist(), selected, strict=True)
    ]
    return answer, f"<p>Experts of layer {layer_idx}; expert {expert_idx} is edited.</p><div>{''.join(spans)}</div>"


def _span(text: str, experts: list[int], *, edited: bool) -> str:
    frame = f"2px solid {UNLEARNED}" if edited else "1px solid #c5cad2"
    style = f"display:inline-block;border:{frame};border-radius:4px;margin:2px;padding:1px 4px"
    numbers = ", ".join(map(str, sorted(experts)))
    return f'<span style="{style}">{escape(text) or "∅"}<br><small>{numbers}</small></span>'
