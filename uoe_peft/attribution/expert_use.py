"""One pass over a set: how much each expert is used, by every statistic that routing decisions give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from uoe_peft.attribution.sampling import SampleBatches, counted_tokens
from uoe_peft.attribution.scores import STATISTICS, Statistic, sequence_means
from uoe_peft.attribution.streaming import SequenceMean
from uoe_peft.data.shares import Share
from uoe_peft.moe.blocks import MoEBlock
from uoe_peft.moe.evaluation_mode import evaluation_mode
from uoe_peft.moe.interventions import run_until_routed
from uoe_peft.moe.passes import Pass, run_passes
from uoe_peft.moe.routing import record_routing, select_blocks


@dataclass(frozen=True, eq=False)
class ExpertUse:
    """How much each expert is used on a set: mean over the tokens of a sequence, then mean over sequences.

    Attributes:
        softmax: Mean gate score, Eq. 2 of https://arxiv.org/abs/2411.18797. Shape `(L, E)`, float32.
        applied: Mean weight that the layer applies. Shape `(L, E)`, float32.
        token_ratio: Share of the selections that fall on the expert; the sum over a layer is 1, or less where its
            router knows classes that compute nothing. Shape `(L, E)`, float32.
        num_sequences: Sequences that were read.
        num_tokens: Tokens that counted.
        top_k: Experts that each token selects, K.
        fingerprint: Hash of the data, 16 hexadecimal digits.
    """

    softmax: Tensor
    applied: Tensor
    token_ratio: Tensor
    num_sequences: int
    num_tokens: int
    top_k: int
    fingerprint: str

    def table(self, statistic: Statistic) -> Tensor:
        """One of the three tables by name. Shape `(L, E)`."""
        match statistic:
            case "softmax":
                return self.softmax
            case "applied":
                return self.applied
            case "token_ratio":
                return self.token_ratio


@dataclass(frozen=True, eq=False)
class Resamples:
    """The same tables over bootstrap resamples and over two halves of the sequences.

    Attributes:
        bootstrap: In the order of `STATISTICS`; None for fewer than two sequences. Shape `(R, 3, L, E)`.
        halves: None where a half is empty. Shape `(2, 3, L, E)`.
    """

    bootstrap: Tensor | None
    halves: Tensor | None

    def of(self, statistic: Statistic) -> tuple[Tensor | None, Tensor | None]:
        """Bootstrap `(R, L, E)` and halves `(2, L, E)` of one table."""
        column = STATISTICS.index(statistic)
        return (
            None if self.bootstrap is None else self.bootstrap[:, column],
            None if self.halves is None else self.halves[:, column],
        )


def measure_expert_use(
    model: nn.Module,
    batches: SampleBatches,
    *,
    layer_indices: Sequence[int] | None = None,
    include_prompt: bool = True,
    num_resamples: int = 200,
    seed: int = 0,
    name: str = "forget",
    show_progress: bool = False,
) -> tuple[ExpertUse, Resamples]:
    """How much a set uses each expert, at the cost of a forward pass up to the last layer asked for.

    Memory beside the model is that of one batch: nothing grows with the number of tokens. Processes that each have the
    whole model share the batches out.

    Args:
        model: Any model with routed experts.
        batches: The set.
        layer_indices: Decoder layers to look at, L of them; None for all with routed experts.
        include_prompt: Whether prompt tokens count.
        num_resamples: Number of bootstrap resamples, R.
        seed: Of the resamples.
        name: What messages call this set.
        show_progress: Whether to show a progress bar with tokens per second.

    Raises:
        UnsupportedModelError: The model has no routed experts, or its routing cannot be understood.
        ValueError: Router scores are NaN or infinite; a row has no token that counts; the layers differ in their
            number of experts; `layer_indices` names a layer without routed experts; processes were given different
            batches.
        RuntimeError: Another process has failed.
    """
    blocks = select_blocks(model, layer_indices)
    layers, num_experts = [block.layer_idx for block in blocks], common_num_experts(blocks)
    mean = SequenceMean((len(STATISTICS), len(layers), num_experts), num_resamples=num_resamples, seed=seed)
    device = input_device(model)
    share = Share.of(model)
    own = batches.part(share)
    share.check_same((batches.fingerprint, batches.batch_size, layers, num_resamples, seed, include_prompt), name=name)
    num_tokens = top_k = 0
    masks: dict[int, Tensor] = {}

    def read(position: int, layer_idx: int) -> Tensor:
        nonlocal top_k
        routing = trace[layer_idx]
        top_k = routing.top_k_index.shape[1]
        return sequence_means(routing, masks[position].to(routing.scores.device), num_experts=num_experts)

    def passes() -> Iterator[Pass[int]]:
        for position, batch in enumerate(own):
            masks[position] = counted_tokens(batch, include_prompt=include_prompt, name=name)
            inputs = {key: batch[key].to(device) for key in ("input_ids", "attention_mask")}
            yield partial(_run, run, inputs)

    with (
        share.failing_together(),
        evaluation_mode(model),
        progress_bar(own.num_tokens, f"Reading {name} set", show=show_progress) as bar,
        record_routing(model, layer_indices=layers) as trace,
        run_until_routed(model, layers[-1]) as run,
    ):
        for position, (num_read, means) in enumerate(run_passes(model, passes(), layer_indices=layers, read=read)):
            mean.leave_out(share.left_out_before(position), batches.batch_size)
            mean.add(_finite(_of_all_layers(cast(list[Tensor], means)), layers, name=name))
            num_tokens += int(masks.pop(position).sum())
            bar.update(num_read)
    mean.put_together(share)
    num_tokens, top_k = sum(share.gathered(num_tokens)), max(share.gathered(top_k))
    softmax, applied, token_ratio = mean.mean()
    use = ExpertUse(softmax, applied, token_ratio, mean.num_sequences, num_tokens, top_k, batches.fingerprint)
    return use, Resamples(mean.resampled_means(), mean.half_means())


@contextmanager
def progress_bar(num_tokens: int, description: str, *, show: bool) -> Iterator[tqdm]:
    """A progress bar that counts tokens."""
    with tqdm(total=num_tokens, desc=description, unit="tok", unit_scale=True, disable=not show) as bar:
        yield bar


def input_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that is not offloaded."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))


def common_num_experts(blocks: Sequence[MoEBlock]) -> int:
    """Number of experts of every block.

    Raises:
        ValueError: The blocks differ.
    """
    counts = {block.layer_idx: block.num_experts for block in blocks}
    if len(set(counts.values())) > 1:
        raise ValueError(f"layers differ in their number of experts, {counts}; pass layer_indices of equal layers")
    return blocks[0].num_experts


def _run(run: Callable[..., None], inputs: Mapping[str, Tensor]) -> int:
    """Run a pass; the number of tokens that it reads."""
    run(**inputs)
    return int(inputs["attention_mask"].sum())


def _of_all_layers(means: Sequence[Tensor]) -> Tensor:
    """Each sequence's means in all layers, on the CPU. Shape `(B, 3, L, E)`."""
    # One transfer for the batch: a wait for the device in every layer would cost more than the arithmetic.
    stacked = torch.stack([part.to(means[0].device) for part in means])  # (L, 3, B, E)
    return stacked.cpu().permute(2, 1, 0, 3)


def _finite(means: Tensor, layers: Sequence[int], *, name: str) -> Tensor:
    bad = ~means.isfinite().all(dim=0).all(dim=0).all(dim=-1)  # (L,)
    if bad.any():
        layer_idx = layers[int(bad.nonzero()[0])]
        raise ValueError(
            f"the router of layer {layer_idx} gives NaN or infinite scores on the {name} set, expected finite ones; "
            "check the checkpoint and the dtype (float16 overflows where bfloat16 does not)"
        )
    return means
