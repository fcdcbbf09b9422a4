"""A forward pass over a batch -> its answer tokens.

Letters: B batch, S sequence, V vocabulary, H hidden size, N answer tokens of the batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from peft import PeftModel
from torch import Tensor, nn

from uoe_peft.data import Batch
from uoe_peft.errors import UnsupportedModelError
from uoe_peft.losses import answer_lengths, answer_positions, answer_targets, sequence_nll, token_log_probs
from uoe_peft.losses.answer_tokens import SequenceReduction
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.lm_head import apply_lm_head, find_lm_head, no_logits, record_decoder_output
from uoe_peft.moe.segments import find_layers, stop_after_layer
from uoe_peft.training.objective.logits import AnswerLogits

_TOKENS_TO_TRY = 8


@dataclass(frozen=True, eq=False)
class AnswerOutputs:
    """What a model says of a batch's answer tokens.

    Attributes:
        targets: The answer tokens. Shape `(N,)`.
        rows: The example that each belongs to, 0 to B - 1. Shape `(N,)`.
        num_examples: B.
        predictions: Logits with which each answer token is predicted; None where the forward pass ended below the LM
            head.
        hidden: Hidden states from which answer tokens are predicted, after the layer asked for. Shape `(N, H)`.
    """

    targets: Tensor
    rows: Tensor
    num_examples: int
    predictions: AnswerLogits | None = None
    hidden: Tensor | None = None

    @property
    def logits(self) -> Tensor:
        """With which each answer token is predicted, all at once. Shape `(N, V)`."""
        return self._predictions.part(slice(None))

    @property
    def log_probs(self) -> Tensor:
        """Log-probability of each answer token. Shape `(N,)`."""
        return self._scored[0]

    @property
    def accuracy(self) -> Tensor:
        """Share of the answer tokens that are the most likely ones. Scalar."""
        return self._scored[1].float().mean()

    def nll(self, reduction: SequenceReduction = "sum") -> Tensor:
        """Negative log-likelihood of each answer. Shape `(B,)`."""
        return sequence_nll(self.log_probs, self.rows, num_examples=self.num_examples, reduction=reduction)

    def nll_of(self, labels: Callable[[Tensor, slice], Tensor]) -> Tensor:
        """Negative log-likelihood of other tokens in the answer tokens' places. Shape `(N,)`.

        Args:
            labels: Logits `(C, V)` of some of the answer tokens, and which they are -> token ids, shape `(C,)`.
        """
        return self._predictions.per_token(lambda logits, part: -token_log_probs(logits, labels(logits, part)))

    def compared(self, other: AnswerOutputs, function: Callable[[Tensor, Tensor, slice], Tensor]) -> Tensor:
        """A number for each answer token from the logits of two models. Shape `(N,)`.

        Args:
            other: Of another model on the same batch.
            function: Logits `(C, V)` of this and of the other model, and which tokens they are of -> shape `(C,)`.
        """
        theirs = other._predictions
        return self._predictions.per_token(lambda logits, part: function(logits, theirs.part(part), part))

    @property
    def lengths(self) -> Tensor:
        """Number of answer tokens of each example. Shape `(B,)`."""
        return answer_lengths(self.rows, num_examples=self.num_examples)

    @property
    def _predictions(self) -> AnswerLogits:
        if self.predictions is None:
            raise RuntimeError("the forward pass ended below the LM head: there are no logits")
        return self.predictions

    @cached_property
    def _scored(self) -> tuple[Tensor, Tensor]:
        """Log-probability of each answer token, and whether it is the most likely one. Shape `(N,)`, both."""
        right: list[Tensor] = []  # beside the log-probabilities, or the LM head would run twice

        def score(logits: Tensor, part: slice) -> Tensor:
            right.append(logits.detach().argmax(dim=-1) == self.targets[part])
            return token_log_probs(logits, self.targets[part])

        return self._predictions.per_token(score), torch.cat(right)


def forward_answers(
    model: nn.Module,
    batch: Batch,
    *,
    hidden_layer: int | None = None,
    last_layer: int | None = None,
    logits_at_once: int | None = None,
) -> AnswerOutputs:
    """Run a model on a batch and keep what concerns its answer tokens.

    Args:
        model: A causal language model.
        batch: `input_ids`, `attention_mask` and `labels`, shape `(B, S)`.
        hidden_layer: Decoder layer whose output is kept, too.
        last_layer: Decoder layer at which the pass may end: then there are no logits. None: run the whole model.
        logits_at_once: More logits than these are made and dropped in chunks, see `head_is_exact`. None: all at once.

    Returns:
        Logits (and hidden states) of the N answer tokens; with gradient where autograd is on.
    """
    labels = batch["labels"]
    positions = answer_positions(labels)
    targets, rows = answer_targets(labels)
    predictions, outputs = None, []
    with ExitStack() as stack:
        if hidden_layer is not None:
            outputs = stack.enter_context(layer_output(model, hidden_layer))
        if last_layer is not None:
            stack.enter_context(stop_after_layer(_unwrapped(model), last_layer))
            model(**_inputs(batch), use_cache=False)
        elif _in_chunks(model, len(targets), logits_at_once):
            predictions = _logits_in_chunks(model, batch, positions, cast(int, logits_at_once))
        else:
            predictions = _logits_at_once(model, batch, positions)
    # Prompt tuning puts tokens of its own before those of the batch.
    hidden = _at(outputs[-1][:, -positions.shape[1] :], positions) if outputs else None
    return AnswerOutputs(targets, rows, labels.shape[0], predictions, hidden)


def _inputs(batch: Batch) -> dict[str, Any]:
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def _logits_at_once(model: nn.Module, batch: Batch, positions: Tensor) -> AnswerLogits:
    if not _accepts_logits_to_keep(model):
        return AnswerLogits(_at(model(**_inputs(batch), use_cache=False).logits, positions))
    # Prompts are often longer than answers, and the vocabulary is the largest dimension of all: the LM head is
    # applied only where some row of the batch predicts an answer token.
    columns = positions.any(dim=0).nonzero().squeeze(1)
    if _is_spread(model) and len(columns):
        # The last layer's device is not that of the columns, which the model cannot know: all from the first one on.
        columns = torch.arange(int(columns[0]), positions.shape[1], device=columns.device)
        keep: Tensor | int = len(columns)
    else:
        keep = columns
    logits = model(**_inputs(batch), use_cache=False, logits_to_keep=keep).logits
    return AnswerLogits(_at(logits, positions[:, columns]))


def _at(values: Tensor, positions: Tensor) -> Tensor:
    """Values at some positions, on the positions' device: of a model on several devices layers and batches differ.

    Args:
        values: Shape `(B, S, ...)`.
        positions: Bool, N of them True. Shape `(B, S)`.

    Returns:
        Shape `(N, ...)`.
    """
    return values[positions.to(values.device)].to(positions.device)


def _is_spread(model: nn.Module) -> bool:
    """Whether the model's parts are on several devices (`device_map`)."""
    placed = getattr(_unwrapped(model), "hf_device_map", None) or {}
    return len({str(device) for device in placed.values()}) > 1


def _logits_in_chunks(model: nn.Module, batch: Batch, positions: Tensor, logits_at_once: int) -> AnswerLogits:
    whole = _unwrapped(model)
    with record_decoder_output(whole) as outputs, no_logits(whole):
        model(**_inputs(batch), use_cache=False)
    (output,) = outputs

    def head(hidden: Tensor) -> Tensor:
        return apply_lm_head(whole, output, hidden).to(positions.device)

    size = max(1, logits_at_once // vocab_size(model))
    return AnswerLogits(_at(output.last_hidden_state, positions), head, size)


def head_is_exact(model: nn.Module, batch: Batch) -> bool:
    """Whether the LM head, applied to chosen hidden states, gives the model's own logits to their dtype's rounding.

    Tried on the batch's first answer tokens, since all at once may be too many.
    """
    positions = answer_positions(batch["labels"])
    positions &= positions.flatten().cumsum(0).view_as(positions) <= _TOKENS_TO_TRY
    with evaluation_mode(model):
        try:
            expected = _logits_at_once(model, batch, positions).states.float()
            found = _logits_in_chunks(model, batch, positions, logits_at_once=vocab_size(model)).part(slice(None))
        # What a family does between its decoder and its logits cannot be known: any failure means that it needs it.
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError):
            return False
    rounding = 4 * torch.finfo(found.dtype).eps
    return bool((found.float() - expected).square().mean().sqrt() <= rounding * expected.square().mean().sqrt())


@contextmanager
def layer_output(model: nn.Module, layer_idx: int) -> Iterator[list[Tensor]]:
    """A list that receives the output of a decoder layer, shape `(B, S, H)`, at each forward pass.

    Raises:
        ValueError: The model has no such layer.
    """
    outputs: list[Tensor] = []

    def keep(layer: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        outputs[:] = [output if isinstance(output, Tensor) else output[0]]

    handle = decoder_layer(model, layer_idx).register_forward_hook(keep)
    try:
        yield outputs
    finally:
        handle.remove()


def decoder_layer(model: nn.Module, layer_idx: int) -> nn.Module:
    """The decoder layer with the given index.

    Raises:
        ValueError: The model has no such layer.
        UnsupportedModelError: The model's layers are not found.
    """
    stack = find_layers(_unwrapped(model))
    num_layers = len(list(stack.children()))
    if not 0 <= layer_idx < num_layers:
        raise ValueError(
            f"{type(model).__name__} has {num_layers} decoder layers, got layer {layer_idx}; use 0 to {num_layers - 1}"
        )
    return stack.get_submodule(str(layer_idx))


def _accepts_logits_to_keep(model: nn.Module) -> bool:
    base = _unwrapped(model)
    base = base.get_base_model() if isinstance(base, PeftModel) else base
    return "logits_to_keep" in inspect.signature(type(base).forward).parameters


def _in_chunks(model: nn.Module, num_tokens: int, logits_at_once: int | None) -> bool:
    """Whether there are too many logits, and the LM head can be applied by itself: neither trained nor adapted."""
    if logits_at_once is None or num_tokens * vocab_size(model) <= logits_at_once:
        return False
    try:
        head = find_lm_head(_unwrapped(model))
    except UnsupportedModelError:
        return False
    # PEFT wraps what it adapts or trains a copy of: such a head says other things once the adapter is on again.
    return not head._modules and not any(p.requires_grad for p in head.parameters())


def vocab_size(model: nn.Module) -> int:
    """V of a language model, under PEFT and what a launcher wrapped it in."""
    return int(cast(Any, _unwrapped(model)).config.get_text_config().vocab_size)


def _unwrapped(model: nn.Module) -> nn.Module:
    return cast(nn.Module, getattr(model, "module", model))  # what DistributedDataParallel wraps
