"""A model that serves several threads at once gives each what it gives one, and stays as it is."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel

from tests.families import build
from tests.families import logits as family_logits
from tests.tuner.conftest import base_state, make_config, randomise
from uoe_peft.moe import find_moe_blocks, unwrap

Logits = Callable[..., Tensor]


@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss", "granitemoe"])
def test_threads_inside_one_router_leave_it_alone(family: str, logits: Logits) -> None:
    model = get_peft_model(build(family), make_config(build(family))).eval()
    randomise(model)
    expected, before = logits(model), base_state(model)
    router = unwrap(find_moe_blocks(model)[-1].router)
    matrix = router.get_parameter(find_moe_blocks(model)[-1].gate_name)
    both_inside = threading.Barrier(2)

    def wait(module: nn.Module, args: object) -> None:
        both_inside.wait(timeout=60)

    handle = router.register_forward_pre_hook(wait)
    with ThreadPoolExecutor(2) as pool:
        outputs = list(pool.map(lambda _: logits(model), range(2)))
    handle.remove()
    assert all(torch.equal(output, expected) for output in outputs)
    assert router.get_parameter(find_moe_blocks(model)[-1].gate_name) is matrix
    assert all(torch.equal(base_state(model)[name], tensor) for name, tensor in before.items())


def test_a_mixed_batch_is_of_its_own_thread(qwen: PreTrainedModel, logits: Logits) -> None:
    model = get_peft_model(qwen, make_config(qwen)).eval()
    randomise(model)
    expected = logits(model)
    in_mixed_batch, other_is_done, mixed_thread = threading.Event(), threading.Event(), []

    def wait(module: nn.Module, args: object) -> None:
        if threading.get_ident() in mixed_thread:
            in_mixed_batch.set()
            other_is_done.wait(timeout=60)

    def run_mixed() -> Tensor:
        mixed_thread.append(threading.get_ident())
        return logits(model, adapter_names=["__base__", "default", "__base__"])

    qwen.get_input_embeddings().register_forward_pre_hook(wait)
    with ThreadPoolExecutor(1) as pool:
        mixed = pool.submit(run_mixed)
        assert in_mixed_batch.wait(timeout=60)
        assert torch.equal(logits(model), expected)  # with hooks of the other batch on its layers
        two_samples = torch.randint(3, 50, (2, 7))
        with ThreadPoolExecutor(1) as third:  # whose number is on the other side of the second's
            results = [model(two_samples).logits, third.submit(model, two_samples).result().logits]
        assert torch.equal(*results)
        other_is_done.set()
        assert not torch.equal(mixed.result()[0], expected[0])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_a_call_of_the_base_changes_no_later_output() -> None:
    base = build("switch_transformers", dtype=torch.bfloat16)  # its routers cast their matrix when they are called
    ids = torch.arange(3, 21).view(2, 9)
    model = get_peft_model(base, make_config(base)).eval()
    randomise(model, std=0.02)
    with torch.no_grad():
        before = family_logits(model, ids)
        with model.disable_adapter():
            family_logits(model, ids)
        matrix = unwrap(find_moe_blocks(model)[-1].router).get_parameter(find_moe_blocks(model)[-1].gate_name)
        assert matrix.dtype == torch.bfloat16
        assert torch.equal(family_logits(model, ids), before)
