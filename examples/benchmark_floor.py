"""What cannot be left out of a step: its matrix products, each at the rate that the machine reaches for its sizes.

A step is run once, and every product of matrices in it is noted: of linear layers, attention, the patch embedding, and
of the gradients that are really computed. What only saves memory, the second forward pass of all chunks of sentences
but one, is left out. Then each size of product is timed by itself, and the times are added up as often as it occurs.
Norms, softmax, activations, copies and the optimizer are free in this sum, and attention counts its two products with
four more in the backward pass, over all places of a row, masked or not.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer


@dataclass(frozen=True)
class Product:
    """`count` products of an (m, k) and a (k, n) matrix, and whether each lies in memory as its transpose."""

    count: int
    m: int
    k: int
    n: int
    dtype: torch.dtype
    left_transposed: bool = False
    right_transposed: bool = False

    @property
    def multiply_adds(self) -> int:
        return self.count * self.m * self.k * self.n


class Products(TorchDispatchMode):
    """Notes the matrix products of what runs inside: {product: how often}.

    During the backward pass (`backward` is set), those of a forward pass are `again`, and not among `needed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.needed: Counter[Product] = Counter()
        self.again: Counter[Product] = Counter()
        self.backward = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        answer = func(*args, **kwargs or {})
        # The backward pass itself runs without grad mode; who computes activations again turns it on.
        kept = self.again if self.backward and torch.is_grad_enabled() else self.needed
        kept.update(products_of(func.overloadpacket.__name__, args, answer))
        return answer


def products_of(name: str, args: tuple[Any, ...], answer: Any) -> Iterator[Product]:
    """Yields the matrix products of an operation of torch's, `name` without its namespace."""
    if name in ("mm", "bmm"):
        yield product(args[0], args[1])
    elif name in ("addmm", "baddbmm"):
        yield product(args[1], args[2])
    elif name == "convolution":
        weight = args[1]
        places = answer.numel() // answer.shape[1]
        yield Product(1, places, weight[0].numel(), len(weight), weight.dtype, right_transposed=True)
    elif name == "convolution_backward":
        raise NotImplementedError("The floor knows no gradient of a convolution, since no method trains one.")
    elif name.startswith(("_scaled_dot_product", "_flash_attention", "_efficient_attention")):
        queries, keys, values = args[1:4] if "backward" in name else args[:3]  # (b, h, places, width)
        mixed = queries.shape[:-1] + values.shape[-1:]
        scores = queries.new_empty(()).expand(queries.shape[:-1] + keys.shape[-2:-1])
        gradient = queries.new_empty(()).expand(mixed)
        if "backward" in name:
            pairs = [(scores.mT, gradient), (gradient, values.mT), (scores, keys), (scores.mT, queries)]
        else:
            pairs = [(queries, keys.mT), (scores, values)]
        yield from (product(*pair) for pair in pairs)


def product(left: Tensor, right: Tensor) -> Product:
    """The product of left (..., m, k) and right (..., k, n)."""
    transposed = (part.stride(-1) != 1 and part.stride(-2) == 1 for part in (left, right))
    (m, k), n = left.shape[-2:], right.shape[-1]
    return Product(left.shape[:-2].numel(), m, k, n, left.dtype, *transposed)


def record(forward: Callable[[], Tensor | None]) -> Products:
    """The matrix products of a step: `forward` gives the loss whose gradients the backward pass computes, or None."""
    with Products() as products:
        loss = forward()
        products.backward = True
        if loss is not None:
            loss.backward()
    return products


def seconds_of(product: Product, device: torch.device, clock: Callable[[], float], least: float) -> float:
    """The median time of a product of random matrices, repeated for `least` seconds; on a GPU until it is done."""

    def matrices(rows: int, columns: int, transposed: bool = False) -> Tensor:
        shape = (columns, rows) if transposed else (rows, columns)
        matrix = torch.randn(product.count, *shape, device=device).to(product.dtype)
        matrix = matrix.mT if transposed else matrix
        return matrix[0] if product.count == 1 else matrix

    left = matrices(product.m, product.k, product.left_transposed)
    right = matrices(product.k, product.n, product.right_transposed)
    parts = {"left": left, "right": right, "out": matrices(product.m, product.n)}
    options: dict[str, Any] = {"timer": clock} if device.type == "cpu" else {}  # its own timer waits for a GPU
    timer = Timer("torch.matmul(left, right, out=out)", "import torch", globals=parts,
                  num_threads=torch.get_num_threads(), **options)  # fmt: skip
    return timer.blocked_autorange(min_run_time=least).median


def floor(
    products: Products, device: torch.device, clock: Callable[[], float] = time.perf_counter, least: float = 0.1
) -> dict[str, Any]:
    """Seconds of all needed products, each kind repeated for `least` seconds, and what they multiply and add."""
    with torch.no_grad():
        seconds = sum(often * seconds_of(each, device, clock, least) for each, often in products.needed.items())
    count, again = (
        sum(often * each.multiply_adds for each, often in part.items()) for part in (products.needed, products.again)
    )
    return {"seconds_per_step": seconds, "multiply_adds": count, "multiply_adds_again": again}
