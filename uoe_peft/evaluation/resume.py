"""Answers that were generated once, in a file, so that an evaluation that was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor, nn


class AnswerStore:
    """Answers by prompt, of one model under one setting; every batch is appended to a file as it is done.

    The file is named after all that the answers depend on: weights, adapters and their scales, the length limit. Other
    weights never find these answers. A line that was cut short when the process ended is left out.

    Args:
        folder: Where the files are; it is made. None: nothing is stored.
        key: What the answers depend on, from `model_key` and the settings.
    """

    def __init__(self, folder: str | PathLike[str] | None, key: str) -> None:
        self._path = None if folder is None else Path(folder) / f"answers-{key}.jsonl"
        self._answers: dict[str, str] = {}
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._read(self._path)

    def get(self, prompt: Sequence[int]) -> str | None:
        """The answer to a prompt, given as token ids; None where there is none yet."""
        return self._answers.get(_prompt_key(prompt))

    def add(self, prompts: Sequence[Sequence[int]], answers: Sequence[str]) -> None:
        """Keep the answers to prompts."""
        new = {_prompt_key(prompt): answer for prompt, answer in zip(prompts, answers, strict=True)}
        self._answers |= new
        if self._path is not None:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([key, answer]) + "\n" for key, answer in new.items())

    def _read(self, path: Path) -> None:
        if not path.exists():
            return
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            path.write_bytes(whole)
        for line in whole.decode("utf-8").splitlines():
            key, answer = json.loads(line)
            self._answers[key] = answer


def model_key(model: nn.Module) -> str:
    """A digest of every bit that a model's answers depend on: weights, buffers, adapters and their scales.

    Reads all weights once: about a second a gigabyte.
    """
    digest = hashlib.blake2b(digest_size=16)
    digest.update(repr(type(model)).encode())
    if isinstance(model, PeftModel):
        digest.update(repr((model.active_adapters, model.get_model_status().enabled)).encode())
    for name, module in model.named_modules():
        scaling = getattr(module, "scaling", None)
        if isinstance(scaling, dict):
            digest.update(repr((name, sorted(scaling.items()))).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, Tensor):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _prompt_key(prompt: Sequence[int]) -> str:
    return hashlib.blake2b(repr(list(prompt)).encode(), digest_size=12).hexdigest()
