"""Whether training starts at the lowest edited layer, and where its states are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from uoe_peft.training.config import UnlearningConfig
from uoe_peft.training.reuse.prefix_cache import PrefixCache, temporary_folder
from uoe_peft.training.reuse.store import NothingToCache, PrefixCacheUnavailable, StateFolder

logger = logging.getLogger(__name__)


@contextmanager
def cache_or_none(
    args: UnlearningConfig,
    make: Callable[[], AbstractContextManager[PrefixCache]],
    *,
    num_epochs: float,
    sharded: bool = False,
) -> Iterator[PrefixCache | None]:
    """The cache that `prefix_cache` asks for, or None where training runs the whole model; the log says why.

    Args:
        args: `prefix_cache` and the settings that it depends on.
        make: Makes the cache.
        num_epochs: How often training goes through the forget set.
        sharded: Whether a launcher splits the weights (FSDP, DeepSpeed).

    Raises:
        PrefixCacheUnavailable: `prefix_cache=True` or `offload_prefix=True`, and there can be none.
    """
    with ExitStack() as stack:
        cache = None
        if args.prefix_cache is not False:
            try:
                check_settings(args, num_epochs=num_epochs, sharded=sharded)
                cache = stack.enter_context(make())
            except PrefixCacheUnavailable as error:
                if args.offload_prefix:
                    raise PrefixCacheUnavailable(f"offload_prefix=True needs a prefix cache: {error}") from error
                if args.prefix_cache is True:
                    raise
                level = logging.INFO if isinstance(error, NothingToCache) else logging.WARNING
                logger.log(level, "no prefix cache, training runs the whole model: %s", error)
        yield cache


@contextmanager
def state_folder(args: UnlearningConfig, accelerator: Accelerator) -> Iterator[StateFolder | None]:
    """The folder for the states of a training run, one for all processes of a machine; None under `prefix_cache=False`.

    Args:
        args: `prefix_cache_dir` is where it is. None: a temporary folder that the machine's first process makes, and
            removes at the end.
        accelerator: Knows the processes; all of them must come here together.
    """
    turns = accelerator.local_main_process_first
    if args.prefix_cache is False:
        yield None
    elif args.prefix_cache_dir is not None:
        yield StateFolder(Path(args.prefix_cache_dir), turns=turns)
    else:
        with temporary_folder() if accelerator.is_local_main_process else nullcontext() as own:
            # The processes of a machine are numbered in a row.
            folder = gather_object([own])[accelerator.process_index - accelerator.local_process_index]
            yield replace(folder, turns=turns)


def reference_folder(
    folder: StateFolder | None, *, from_cache: bool, num_epochs: float, sharded: bool
) -> StateFolder | None:
    """Where what the base model says is kept: in `prefix_cache_dir`, or beside a temporary cache that is used again.

    Args:
        folder: That of this training.
        from_cache: Whether training runs from a prefix cache.
        num_epochs: How often training goes through the forget set.
        sharded: Whether a launcher splits the weights: then no process sees what its states depend on.

    Returns:
        The folder; None where states are best asked for when they are needed, or kept in memory.
    """
    if folder is None or sharded:
        return None
    return folder if not folder.is_fresh or (from_cache and num_epochs > 1) else None


def check_settings(args: UnlearningConfig, *, num_epochs: float, sharded: bool = False) -> None:
    """Refuse a cache where training could not use it.

    Raises:
        NothingToCache: Under "auto", no example comes up twice; or every layer is moved.
        PrefixCacheUnavailable: The weights are sharded, the model is compiled, embeddings get noise, or gradient
            checkpointing is reentrant.
    """
    if args.prefix_cache == "auto" and not args.offload_prefix and num_epochs <= 1:
        raise NothingToCache(f"no example comes up twice in {num_epochs:g} epochs")
    if args.relearner_steps:
        raise NothingToCache(f"relearner_steps={args.relearner_steps} moves every layer at every step")
    if sharded or args.torch_compile:
        raise PrefixCacheUnavailable("fsdp, deepspeed and torch_compile need every layer to run")
    if args.neftune_noise_alpha is not None:
        raise PrefixCacheUnavailable("neftune_noise_alpha adds other noise to the embeddings at every step")
    checkpointing = cast(dict[str, Any], args.gradient_checkpointing_kwargs or {})
    if args.gradient_checkpointing and checkpointing.get("use_reentrant"):
        raise PrefixCacheUnavailable(
            "reentrant gradient checkpointing trains no layer whose input has no gradient; pass "
            "gradient_checkpointing_kwargs={'use_reentrant': False}"
        )
