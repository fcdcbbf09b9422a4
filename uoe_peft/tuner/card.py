"""The model card of a UOE adapter, the same for every way of saving one.

It is written from the adapters' configurations alone. Of these only numbers, choices and the user's own words are
shown: no text of a data set, no name of a data set and no path of this machine.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Iterator, Mapping
from functools import wraps
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import peft
import torch
import transformers
from peft import PeftModel
from torch import nn

from uoe_peft.tuner.config import UOEConfig

PAPER_ID = "2411.18797"
CITATION = """@inproceedings{zhuang2025seuf,
    title     = {{SEUF: Is Unlearning One Expert Enough for Mixture-of-Experts LLMs?}},
    author    = {Zhuang, Haomin and Zhang, Yihua and Guo, Kehan and Jia, Jinghan and Liu, Gaowen and Liu, Sijia and
                 Zhang, Xiangliang},
    booktitle = {Proceedings of the 63rd Annual Meeting of the Association for Computational Linguistics},
    year      = 2025,
    url       = {https://arxiv.org/abs/2411.18797},
}"""

_KEPT_BELOW = "<!-- What stands below this line is kept when the adapter is saved again. -->"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_WORD = re.compile(r"[\w.:+-]{1,40}")  # a choice such as "npo": no spaces, so no sentence

# Files that a folder may hold, and what they show; no text of the data is in them.
_PICTURES = MappingProxyType({"report.png": "Scores before and after", "training.png": "Accuracy in training"})
_NO_PICTURES: Mapping[str, str] = MappingProxyType({})
FORGET_MOMENTS_FILE = "forget_moments.safetensors"

_USE = """```python
import uoe_peft  # pip install uoe-peft; registers the method, without it PEFT raises KeyError: 'UOE'
from peft import AutoPeftModelForCausalLM

model = AutoPeftModelForCausalLM.from_pretrained("<this folder or repository>")
with model.disable_adapter():  # remembers
    ...
model.merge_adapter()  # forgets in the weights; unmerge_adapter() restores every bit
merged = model.merge_and_unload()  # an ordinary model
```"""

_MOMENTS = f"""\
`{FORGET_MOMENTS_FILE}` ({{kilobytes:.0f}} kB) holds the first and second moments of what the forget set's tokens put
into the edited matrices, for combining adapters and for later requests. No text and no token ids are in it, but the
directions that the set uses are: treat it like the set, and leave it out of what is published."""

_USE_IN_GROUPS = """```python
import uoe_peft  # pip install uoe-peft
from peft import PeftModel
from uoe_peft.dense import load_factorized, to_dense

base = load_factorized("<folder of the dense model with its neuron_groups.safetensors>")
model = PeftModel.from_pretrained(base, "<this folder or repository>")
with model.disable_adapter():  # remembers
    ...
dense = to_dense(model.merge_and_unload())  # an ordinary dense model, which has forgotten
```

The experts are groups of a dense model's neurons. Whoever loads the adapter needs the file that says which neuron is in
which group; on other groups it is refused."""

_LIMITS = """\
- Whoever holds the base model holds the knowledge: switching the adapter off brings it back. Give untrusted
  parties merged weights, never the base and the adapter.
- Unlearning mostly hides: training on related text can bring back what was forgotten. Test that before relying on it.
- Quantising a merged model can bring back a part, too: evaluate the weights that are served."""


def write_card(folder: Path, configs: Mapping[str, UOEConfig]) -> None:
    """Write `README.md` for the adapters in a folder.

    What a user has written below the line that says so is kept; anything else there is replaced.

    Args:
        folder: Where the adapters are saved.
        configs: Of the adapters, by name.
    """
    readme = folder / "README.md"
    old = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    _, line, below = old.partition(_KEPT_BELOW)
    text = card(configs, pictures=_pictures(folder), moments_size=_moments_size(folder))
    readme.write_text(text + (below if line else "\n"), encoding="utf-8")


def write_cards_on_saving(tuner: type[nn.Module]) -> None:
    """Let PEFT write this card where it would write its own, when a model is saved and when it is pushed.

    PEFT has no hook for it: `PeftModel.save_pretrained` writes a blank card with one method, and `push_to_hub` puts
    transformers' card in its place just before the upload. Both methods stay as they are for adapters of other kinds.

    Args:
        tuner: Class of the models whose adapters get this card.
    """
    create, upload = PeftModel.create_or_update_model_card, PeftModel._upload_modified_files
    if hasattr(create, "__wrapped__"):
        return

    @wraps(create)
    def create_or_update_model_card(self: PeftModel, output_dir: str) -> None:
        if isinstance(self.base_model, tuner):
            write_card(Path(output_dir), cast(dict[str, UOEConfig], self.peft_config))
        else:
            create(self, output_dir)

    @wraps(upload)
    def upload_modified_files(self: PeftModel, working_dir: str, *args: Any, **kwargs: Any) -> Any:
        if isinstance(self.base_model, tuner):
            write_card(Path(working_dir), cast(dict[str, UOEConfig], self.peft_config))
        return upload(self, working_dir, *args, **kwargs)

    PeftModel.create_or_update_model_card = create_or_update_model_card  # type: ignore[method-assign]
    PeftModel._upload_modified_files = upload_modified_files  # type: ignore[method-assign, assignment]


def card(configs: Mapping[str, UOEConfig], *, pictures: Mapping[str, str] = _NO_PICTURES, moments_size: int = 0) -> str:
    """The card's text, up to and with the line below which a user may write.

    Args:
        configs: Of the adapters, by name.
        pictures: Files beside the card to show, and what each shows.
        moments_size: Bytes of the moments of forget sets that lie beside the adapters; 0 where there are none.
    """
    base = next((config.base_model_name_or_path for config in configs.values()), None)
    use = _USE_IN_GROUPS if any(_in_groups(config) for config in configs.values()) else _USE
    sections = [_head(base if _is_hub_name(base) else None), "# UOE adapter", _INTRODUCTION, "## Use", use]
    for name, config in configs.items():
        of = f" (adapter `{name}`)" if len(configs) > 1 else ""
        record = config.provenance or {}
        sections += [f"## What it forgets{of}", _words(record.get("forgets"))]
        sections += [f"## What it edits{of}", "\n".join(_edits(config))]
        for title, key in (("Training", "training"), ("Figures", "figures")):
            lines = list(_entries(record.get(key)))
            sections += [f"## {title}{of}", "\n".join(lines)] if lines else []
    sections += ["## Moments", _MOMENTS.format(kilobytes=moments_size / 1000)] if moments_size else []
    sections += [f"![{what}]({file})" for file, what in pictures.items()]
    sections += ["## Limits", _LIMITS, "## Versions", _versions(), "## Citation", f"```bibtex\n{CITATION}\n```"]
    return "\n\n".join([*sections, _KEPT_BELOW])


_INTRODUCTION = (
    "This adapter makes a Mixture-of-Experts language model forget something, by deltas of single experts and of the "
    f"routers of their layers ([UOE](https://arxiv.org/abs/{PAPER_ID}), as a PEFT method)."
)


def _head(base: str | None) -> str:
    lines = [f"base_model: {base}", "base_model_relation: adapter"] if base else []
    lines += ["library_name: peft", "pipeline_tag: text-generation", "tags:"]
    tags = ["uoe", "machine-unlearning", "mixture-of-experts", f"arxiv:{PAPER_ID}"]
    return "\n".join(
        ["---", *lines, *(f"- {tag}" for tag in [*([f"base_model:adapter:{base}"] if base else []), *tags]), "---"]
    )


def _is_hub_name(name: str | None) -> bool:
    """Whether a base model's name is one on the Hub, and no path of this machine."""
    return name is not None and _HUB_NAME.fullmatch(name) is not None and not Path(name).exists()


def _in_groups(config: UOEConfig) -> bool:
    """Whether the experts are groups of a dense model's neurons."""
    return any("neurons" in layer for layer in (config.base_experts or {}).values())


def _words(forgets: object) -> str:
    """What the user said, as a quotation on lines of its own."""
    if not isinstance(forgets, str) or not forgets.strip():
        return "Not stated."
    return "\n".join(f"> {line}".rstrip() for line in forgets.strip().splitlines())


def _edits(config: UOEConfig) -> Iterator[str]:
    if config.target_experts == "auto":
        yield "The expert that the forget set engages most; not chosen yet."
        return
    yield "| layer | expert |\n|---|---|"
    yield from (f"| {layer_idx} | {expert_idx} |" for layer_idx, expert_idx in config.target_experts)
    rank = f", rank {config.r}, scale {config.uoe_alpha:g} / {'√' if config.use_rslora else ''}{config.r}"
    yield f"\n- deltas: {config.delta_type}{rank if config.delta_type == 'low_rank' else ''}"
    projections = config.target_projections
    yield f"- matrices: {', '.join(sorted(projections)) if projections else 'all of the expert'}"
    yield f"- routers of these layers: {config.router_delta_type if config.train_router else 'unchanged'}"
    yield f"- strength: {config.strength:g}"
    chosen = config.attribution or {}
    named = [f"{key} {chosen[key]}" for key in ("score", "gate") if _is_plain(chosen.get(key))]
    if named:
        yield f"- chosen by attribution: {', '.join(named)}"


def _entries(record: object) -> Iterator[str]:
    """Numbers and choices of a record; anything that could be a sentence is left out."""
    if not isinstance(record, Mapping):
        return
    for key, value in sorted(record.items()):
        if _WORD.fullmatch(str(key)) and _is_plain(value):
            yield f"- {key}: {value if isinstance(value, str) else json.dumps(value)}"


def _is_plain(value: object) -> bool:
    return isinstance(value, bool | int | float) or (isinstance(value, str) and _WORD.fullmatch(value) is not None)


def _pictures(folder: Path) -> dict[str, str]:
    return {file: what for file, what in _PICTURES.items() if (folder / file).is_file()}


def _moments_size(folder: Path) -> int:
    """Bytes of moments in a folder and in those of adapters with names of their own, checkpoints left out."""
    found = [*folder.glob(FORGET_MOMENTS_FILE), *folder.glob(f"*/{FORGET_MOMENTS_FILE}")]
    return sum(path.stat().st_size for path in found if not path.parent.name.startswith("checkpoint-"))


def _versions() -> str:
    versions = {"peft": peft.__version__, "transformers": transformers.__version__, "torch": torch.__version__}
    return "\n".join(
        f"- {name} {version}" for name, version in {**versions, "python": platform.python_version()}.items()
    )
