"""What a router's matrix is multiplied with.

A router may normalise, scale, cast or map hidden states before its matrix sees them. How is not guessed from a family's
name: the code of the router is watched while it runs, and what meets the matrix in a product is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from uoe_peft.errors import UnsupportedModelError
from uoe_peft.moe.blocks import MoEBlock
from uoe_peft.moe.experts import unwrap

# As torch reports them.
_PRODUCTS = ("linear", "matmul", "__matmul__", "mm")


class ProductSpy(TorchFunctionMode):
    """Watches which tensor a matrix is multiplied with, in whatever dtype and turned whichever way."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__()
        self._forms = [matrix]
        self.factor: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        operands = [arg for arg in (*args, *(kwargs or {}).values()) if isinstance(arg, Tensor)]
        others = [operand for operand in operands if not any(operand is form for form in self._forms)]
        if len(others) == len(operands):
            return out
        if getattr(func, "__name__", "") in _PRODUCTS:
            self.factor = others[0]
        elif isinstance(out, Tensor) and out.numel() == self._forms[0].numel():
            self._forms.append(out)
        return out


@contextmanager
def record_router_input(block: MoEBlock) -> Iterator[Callable[[], Tensor]]:
    """What the router's matrix was multiplied with, in the latest forward pass inside the context.

    Args:
        block: The router's block, as `find_moe_blocks` gives it. An adapter on the router takes part as it is.

    Yields:
        A function without arguments; it returns the matrix' input of every token, padding included, without gradient.
        Shape `(T, H)`. It raises `UnsupportedModelError` where no product with the matrix was seen.
    """
    router, gate_name = unwrap(block.router), block.gate_name
    if gate_name is None:
        raise UnsupportedModelError(
            f"{block.router_name}, a {type(router).__name__}, has no matrix: every token uses all experts; measure "
            "without routers (routers=False)"
        )
    spies: list[ProductSpy] = []

    def watch(router: nn.Module, args: tuple[Any, ...]) -> None:
        # The matrix that this very call uses: an adapter puts an edited one in the place of the module's own.
        spies[:] = [ProductSpy(attrgetter(gate_name)(router))]
        spies[0].__enter__()

    def end_watch(router: nn.Module, args: tuple[Any, ...], output: object) -> None:
        spies[0].__exit__(None, None, None)

    def recorded() -> Tensor:
        if not spies or spies[0].factor is None:
            raise UnsupportedModelError(
                f"cannot see the input of {gate_name} of {block.router_name}, a {type(router).__name__}: "
                "expected a forward pass in which torch multiplies hidden states with it; the model must not be "
                "compiled, nor its routers quantised"
            )
        return spies[0].factor.detach().flatten(0, -2)

    handles = [router.register_forward_pre_hook(watch), router.register_forward_hook(end_watch, always_call=True)]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
