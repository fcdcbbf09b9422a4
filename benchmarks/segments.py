"""Which families can start or end at a layer, and train from a prefix cache: tries each, writes `docs/segments.md`.

Usage: `python -m benchmarks.segments` (from the repository's root; about half a minute on one core).
"""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from tests.families import SUPPORTED, build, token_ids
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.exactness import relative_difference, stops_exactly
from uoe_peft.training.objective.forward import head_is_exact
from uoe_peft.training.reuse.prefix_cache import PrefixSource, prefix_cache
from uoe_peft.training.reuse.store import PrefixCacheUnavailable

PAGE = Path(__file__).parents[1] / "docs" / "segments.md"

HEAD = """# Starting and ending at a layer

Training computes once what enters the lowest edited layer and starts every step there (`prefix_cache`). This is every
family of transformers {version} that `find_moe_blocks` knows, as `python -m benchmarks.segments` found it: tiny, random
weights, float32, starting at the last layer with routed experts.

- **Same bits**: a pass that starts at the layer gives every bit of the whole model's output. Tried with the attention
  kernels eager and, where the family has it, sdpa; without padding, and with padding on the right and on the left.
- **Other padding**: the largest difference, over the output's standard deviation, when padding on the right holds other
  values than it had. A cache keeps no padding. Real tokens never see it, but experts then multiply matrices of another
  height, and the last bit may be rounded another way.
- **Prefix cache**: whether training uses it. Before it is trusted it is tried on two rows of the user's own.
- **Ends**: losses that read one layer's output (`rmu`, `embed_diff`, `relative_embed_diff`) run nothing above it:
  whether that output then has the same bits. **Chunks**: whether the LM head can be applied to some tokens at a time,
  so that the logits of a long vocabulary never stand in memory at once. Both are tried likewise, and left out where
  they fail.

| Family | Same bits | Other padding | Prefix cache | Ends | Chunks |
|---|---|---|---|---|---|
"""

# Configured tiny, this family needs tokens that mark images wherever there is a mask.
NO_MASK = ("qwen3_omni_moe",)


def main() -> None:
    """Try all families and write the page."""
    rows = []
    for family in SUPPORTED:
        cells = _row(family)
        rows.append(f"| {' | '.join(cells)} |")
        print(*cells)
    PAGE.write_text(HEAD.format(version=transformers.__version__) + "\n".join(rows) + "\n", encoding="utf-8")


def _row(family: str) -> tuple[str, ...]:
    model = build(family)
    layer_idx = find_moe_blocks(model)[-1].layer_idx
    same = True
    for attention in ("eager", "sdpa") if model._supports_sdpa else ("eager",):
        model.set_attn_implementation(attention)
        for padding in ("none", "right", "left"):
            inputs = _inputs(family, model, padding)
            same &= relative_difference(model, inputs, layer_idx, keep_padding=True) == 0
    rounding = relative_difference(model, _inputs(family, model, "right"), layer_idx)
    ends = stops_exactly(model, _inputs(family, model, "right"), layer_idx)
    cells = ("yes" if same else "no", f"{rounding:.0e}" if rounding else "0", _cached(family, model))
    return family, *cells, "yes" if ends else "no", _in_chunks(family, model)


def _inputs(family: str, model: PreTrainedModel, padding: str) -> dict[str, Tensor]:
    ids = token_ids()
    mask = torch.ones_like(ids)
    if padding != "none":
        mask[1, 5:] = 0
    inputs = {"input_ids": ids}
    if family not in NO_MASK:
        inputs["attention_mask"] = mask.flip(1) if padding == "left" else mask
    return {**inputs, "decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else inputs


def _in_chunks(family: str, model: PreTrainedModel) -> str:
    inputs = _inputs(family, model, "right")
    if "attention_mask" not in inputs or model.config.is_encoder_decoder:
        return "not tried"
    return "yes" if head_is_exact(model, {**inputs, "labels": inputs["input_ids"]}) else "no"


def _cached(family: str, model: PreTrainedModel) -> str:
    if model.config.is_encoder_decoder:
        return "no: training is for decoders"
    if family in NO_MASK:
        return "not tried: the tiny configuration takes no mask"
    model.requires_grad_(False)
    block = find_moe_blocks(model)[-1]
    block.router.get_parameter(block.gate_name).requires_grad_(True)
    source = PrefixSource(model, 2, 0, place=lambda batch: batch, context=torch.no_grad)
    try:
        with prefix_cache(source, [[5, 6, 7, 8], [9, 10, 11]]):
            return "yes"
    except PrefixCacheUnavailable as error:
        return f"no: {error}"


if __name__ == "__main__":
    main()
