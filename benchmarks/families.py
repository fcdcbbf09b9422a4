"""Which Mixture-of-Experts families work: builds each one tiny, tries it, and writes `docs/families.md`.

Usage: `python -m benchmarks.families` (from the repository's root; about a minute on one core).
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from dataclasses import astuple, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from torch import nn

from tests.families import FAMILIES, REMOTE_CODE, SUPPORTED, UNSUPPORTED, build, logits, token_ids
from tests.streaming import test_families as streaming
from tests.streaming.conftest import save_family
from tests.tuner import test_families as claims
from uoe_peft.moe import find_moe_blocks
from uoe_peft.moe.routing import record_routing

PAGE = Path(__file__).parents[1] / "docs" / "families.md"

NOTES = {
    "deepseek_v4": "layers with hash routing pick experts by token: there a router's delta changes weights only",
    "diffusion_gemma": "the text encoder; the whole model is refused, as its decoder shares the encoder's experts",
    "ernie4_5_vl_moe": "the text experts; vision experts of the same layers stay as they are",
    "inkling": "the router's matrix has rows for the shared experts, too",
    "llama4": "every expert is called with all tokens, zero where not selected",
    "longcat_flash": "the router also knows identity experts, which cannot be edited",
    "muse_spark": "experts work in a hidden size of their own, and are normalised one by one",
    "nllb_moe": "the decoder; transformers 5.23 calls experts 0 and 1 only, whatever the router says",
    "openai_privacy_filter": "a token classifier",
    "phimoe": "the router gets a gradient only where two experts nearly tie",
    "qwen3_omni_moe": "the thinker; pass it alone, since the talker has experts, too",
    "switch_transformers": "the decoder",
    "zaya": "the router also knows an expert that skips the layer",
}

HEAD = """# Mixture-of-Experts families

Every family with routed experts of transformers {version}, as `python -m benchmarks.families` found it: each is built
tiny, with random weights, from its own configuration.

- **Experts**, **Router**: where the experts module and the router's matrix are; `N` is the layer. They are found by
  structure, so a model that is not in the list works if it is built like one that is.
- **Trains**: a fresh adapter changes no bit of the output; a delta changes the tokens that are routed to its expert,
  and no others; the adapter's parameters get a gradient, and nothing else does.
- **Merges**: the merged model gives the unmerged one's output within rounding; unmerging restores every bit.
- **Routing**: `record_routing` reads its decisions, so experts can be attributed and anchored.
- **Streams**: read layer by layer from disk by `StreamedModel`, it gives the logits and hidden states of the model in
  memory, bit for bit. Encoder-decoders are refused; remote code was not tried.

"""

LEFT_OUT = """
## Left out

`find_moe_blocks` raises `UnsupportedModelError` for these.

"""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    family: str
    model: str
    experts: str
    router: str
    trains: bool
    merges: bool
    routing: bool
    streams: bool | None  # None: not tried

    def __str__(self) -> str:
        words = {True: "yes", False: "no", None: "not tried"}
        cells = [words.get(cell, cell) for cell in astuple(self)]
        return f"| {' | '.join([*cells, NOTES.get(self.family, '')])} |\n"


def measure(family: str) -> Row:
    """What is found in a family, and which claims hold for it."""
    return describe(
        family,
        trains=_holds(claims.test_a_fresh_adapter_changes_no_bit, family)
        and _holds(claims.test_only_tokens_routed_to_the_target_change, family)
        and _holds(claims.test_only_the_slice_and_its_router_get_a_gradient, family),
        merges=_holds(claims.test_merged_equals_unmerged_and_unmerging_restores_every_bit, family),
        streams=_streams(family) if family in streaming.STREAMED else streams_by_kind(family),
    )


def describe(family: str, *, trains: bool, merges: bool, streams: bool | None) -> Row:
    """What is found in a family, with the verdicts that take a while as given."""
    model = build(family)
    block = find_moe_blocks(model)[-1]
    experts, router = (
        f"`{re.sub('[0-9]+', 'N', name, count=1)}`"
        for name in (block.experts_name, f"{block.router_name}.{block.gate_name}")
    )
    name = "remote code" if family in REMOTE_CODE else type(model).__name__
    return Row(family, name, experts, router, trains, merges, _is_recorded(model), streams)


def streams_by_kind(family: str) -> bool | None:
    """What is known without trying: of encoder-decoders, which are refused, and of remote code, which is not tried."""
    return None if family in REMOTE_CODE else family not in streaming.ENCODER_DECODERS


def page(rows: list[Row]) -> str:
    """The page, from a line for each supported family."""
    columns = ["Family", "Model", "Experts", "Router", "Trains", "Merges", "Routing", "Streams", "Note"]
    head = f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}\n"
    left_out = "".join(f"- `{family}`: {reason}.\n" for family, reason in UNSUPPORTED.items())
    return HEAD.format(version=transformers.__version__) + head + "".join(map(str, rows)) + LEFT_OUT + left_out


@torch.no_grad()
def _is_recorded(model: nn.Module) -> bool:
    """Whether the routing of every layer is recorded."""
    with record_routing(model) as trace:
        logits(model, token_ids())
    layers = [block.layer_idx for block in find_moe_blocks(model)]
    sums = torch.stack([trace[layer_idx].scores.sum(dim=-1) for layer_idx in trace])
    return list(trace) == layers and torch.allclose(sums, torch.ones(()))


def _streams(family: str) -> bool:
    with TemporaryDirectory() as folder:
        try:
            streaming.assert_every_bit(*save_family(family, Path(folder)), family)
        except AssertionError:
            return False
        return True


def _holds(claim: Callable[[str, str], None], family: str) -> bool:
    try:
        claim(family, "full")
    except AssertionError:
        return False
    return True


def main() -> None:
    """Write the page."""
    warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")  # see the tests
    PAGE.write_text(page([measure(family) for family in SUPPORTED]), encoding="utf-8")
    print(f"{PAGE.name}: {len(SUPPORTED)} of {len(FAMILIES) + len(REMOTE_CODE)} families are supported")


if __name__ == "__main__":
    main()
