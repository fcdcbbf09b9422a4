"""Greedy coordinate gradient: a nonsense text before the question, searched for so that the answer follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from types import ModuleType

import torch
from datasets import Dataset

from uoe_peft.data.tokenization import ProcessingClass, text_tokenizer
from uoe_peft.evaluation.attacks.result import AttackResult, CausalLM, Score, Scores, baseline, measured


def gcg(
    model: CausalLM,
    dataset: Dataset,
    *,
    processing_class: ProcessingClass,
    score: Score,
    num_rows: int = 5,
    num_steps: int = 50,
    num_tokens: int = 12,
    search_width: int = 64,
    top_k: int = 64,
    seed: int = 0,
    before: Scores | None = None,
) -> AttackResult:
    """Searches for each of some rows a text that makes its answer likely, https://arxiv.org/abs/2307.15043.

    By the package `nanogcg`. The text stands before the question, so that it fits every prompt format; each row
    has its own, and only these rows are asked with it. Compare with a model that never knew the answers: a long enough
    search makes any model say anything.

    Args:
        model: Any causal language model.
        dataset: Rows with `prompt` and `completion`, both strings: some of those that the score asks.
        processing_class: The model's tokenizer, or a processor that holds one.
        score: Measures forget and retain.
        num_rows: So many rows of the set are attacked, the first ones.
        num_steps: Steps of the search.
        num_tokens: Length of the text, in words of one letter, which most tokenizers have as one token.
        search_width: Candidates a step.
        top_k: Tokens among which replacements are drawn, by their gradient.
        seed: Of the draws.
        before: Scores of the plain questions; None: they are measured.

    Returns:
        After: scores where the attacked rows are asked with their texts, which stand in the settings.

    Raises:
        ImportError: `nanogcg` is missing.
        ValueError: The set lacks the columns or rows, a budget is below 1, or a score is not finite.
    """
    budget = {"num_rows": num_rows, "num_steps": num_steps, "num_tokens": num_tokens}
    budget |= {"search_width": search_width, "top_k": top_k}
    if min(budget.values()) < 1:
        raise ValueError(f"every budget of gcg must be at least 1, got {budget}")
    rows = _rows(dataset, num_rows)
    nanogcg = _nanogcg()
    tokenizer = deepcopy(text_tokenizer(processing_class))  # the search sets a chat template where there is none
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    start = baseline(score, model, before)
    num_allowed = len(tokenizer) - len(nanogcg.utils.get_nonascii_toks(tokenizer).unique())
    texts: dict[str, str] = {}
    with _searching(model, seed=seed):
        for prompt, completion in rows:
            config = nanogcg.GCGConfig(
                num_steps=int(num_steps),
                optim_str_init=" ".join(["x"] * int(num_tokens)),
                search_width=int(search_width),
                topk=min(int(top_k), num_allowed),
                use_prefix_cache=False,  # its batched cache is a list of pairs, which transformers 5 does not take
                verbosity="ERROR",
            )
            result = nanogcg.run(model, tokenizer, "{optim_str} " + prompt, completion, config)
            texts[prompt] = result.best_string
    after = measured(score, model, prompts=lambda prompt: f"{texts[prompt]} {prompt}" if prompt in texts else prompt)
    return AttackResult("gcg", before=start, after=after, settings={**budget, "seed": seed, "texts": texts})


def _rows(dataset: Dataset, num_rows: int) -> list[tuple[str, str]]:
    """Prompt and completion of the first rows."""
    rows = [(row.get("prompt"), row.get("completion")) for row in islice(dataset, num_rows)]
    if len(rows) < num_rows or not all(isinstance(text, str) and text for row in rows for text in row):
        raise ValueError(
            f"gcg needs {num_rows} rows with 'prompt' and 'completion', both non-empty strings; got {len(rows)} rows "
            f"with the columns {dataset.column_names}"
        )
    return [(str(prompt), str(completion)) for prompt, completion in rows]


def _nanogcg() -> ModuleType:
    try:
        import nanogcg
        import nanogcg.utils
    except ImportError as error:
        raise ImportError(
            "gcg needs the package nanogcg, whose metadata asks for transformers 4 though it runs with 5: "
            "pip install --no-deps nanogcg==0.3.0, and scipy"
        ) from error
    return nanogcg


@contextmanager
def _searching(model: CausalLM, *, seed: int) -> Iterator[None]:
    """In evaluation mode and with a random state of its own; afterwards every module is in the mode that it was in."""
    modes = {module: module.training for module in model.modules()}
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model.eval()
            yield
    finally:
        for module, training in modes.items():
            module.training = training
