"""bfloat16 in Triton's interpreter as the tests change it; on a GPU, the same kernels compiled."""

import math

import pytest
import torch

from tests.kernels.support import DEVICE, normal
from uctrans.kernels.backend import is_interpreting

triton = pytest.importorskip("triton")
tl = triton.language

SIZE = 16  # rows and columns, the least that a GPU multiplies
# Numbers, and the bits of the bfloat16 nearest to each.
ROUNDED = {
    1.0: 0x3F80,
    -0.0: 0x8000,
    1 + 2**-8: 0x3F80,  # ties go to even
    1 + 3 * 2**-8: 0x3F82,
    -1 - 3 * 2**-8: 0xBF82,
    1 + 2**-8 + 2**-20: 0x3F81,
    1 + 2**-8 - 2**-20: 0x3F80,
    3.3895314e38: 0x7F7F,  # the largest
    3.4028235e38: 0x7F80,  # the largest of float32
    -3.4028235e38: 0xFF80,
    math.inf: 0x7F80,
    -math.inf: 0xFF80,
    2**-133: 0x0001,  # the smallest
    2**-134: 0x0000,
    3 * 2**-134: 0x0002,
}


@triton.jit
def cast_kernel(source, destination, count, BLOCK: tl.constexpr):
    places = tl.arange(0, BLOCK)
    is_there = places < count
    numbers = tl.load(source + places, mask=is_there, other=0.0)
    tl.store(destination + places, numbers.to(destination.dtype.element_ty), mask=is_there)


def cast(numbers, dtype):
    result = torch.empty_like(numbers, dtype=dtype)
    cast_kernel[(1,)](numbers, result, numbers.numel(), triton.next_power_of_2(numbers.numel()))
    return result


def test_casts_to_bfloat16():
    numbers = torch.tensor(list(ROUNDED), dtype=torch.float32, device=DEVICE)
    bits = cast(numbers, torch.bfloat16).view(torch.int16).int() & 0xFFFF
    assert bits.tolist() == list(ROUNDED.values())
    assert cast(numbers * math.nan, torch.bfloat16).isnan().all()
    for dtype in (torch.float16, torch.int32):
        assert cast(torch.tensor([257, -2, 0], dtype=dtype, device=DEVICE), torch.bfloat16).tolist() == [256, -2, 0]


def test_casts_from_bfloat16():
    """All bit patterns to float32, which holds them, and some to others."""
    every = torch.arange(2**16, dtype=torch.int32, device=DEVICE).short().view(torch.bfloat16)
    found = cast(every, torch.float32)
    is_number = ~every.isnan()
    assert torch.equal(found.isnan(), ~is_number)
    bits = found[is_number].view(torch.int32)
    assert torch.equal(bits, every[is_number].view(torch.int16).int() << 16)
    some = torch.tensor([-2.75, 0.0, 50000], dtype=torch.bfloat16, device=DEVICE)
    assert cast(some, torch.float16).tolist() == [-2.75, 0.0, 49920]
    assert cast(some, torch.int32).tolist() == [-2, 0, 49920]


@triton.jit
def product_kernel(left, right, product, SIZE: tl.constexpr):
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    places = rows * SIZE + columns
    start = tl.full((SIZE, SIZE), 0.5, tl.float32)
    result = tl.dot(tl.load(left + places), tl.trans(tl.load(right + places)), start)
    tl.store(product + places, result)


def test_products():
    """In float32: an exact product of whole numbers, whose sums bfloat16 cannot hold, and a random one."""
    whole = torch.arange(SIZE * SIZE)
    for left, right in ((whole % 7, whole % 11), (normal(SIZE * SIZE), normal(SIZE * SIZE, seed=8))):
        left, right = (matrix.view(SIZE, SIZE).to(DEVICE, torch.bfloat16) for matrix in (left, right))
        product = torch.empty(SIZE, SIZE, device=DEVICE)
        product_kernel[(1,)](left, right, product, SIZE)
        exact = left.double() @ right.double().T + 0.5
        torch.testing.assert_close(product.double(), exact, rtol=1e-6, atol=1e-5)
        assert not torch.equal(product.bfloat16().float(), product)


@triton.jit
def move_kernel(numbers, results, count, SIZE: tl.constexpr):
    """Store: a transpose, rows past ``count`` as -1.5; what is positive, else a row; absolute numbers."""
    rows = tl.arange(0, SIZE)[:, None]
    columns = tl.arange(0, SIZE)[None, :]
    places = rows * SIZE + columns
    block = tl.load(numbers + places, mask=rows < count, other=-1.5)
    tl.store(results + places, tl.reshape(tl.trans(block), (SIZE, SIZE)))
    row = tl.load(numbers + columns)
    tl.store(results + SIZE * SIZE + places, tl.where(block.to(tl.float32) > 0, block, row))
    tl.store(results + 2 * SIZE * SIZE + places, tl.abs(block))
    tl.store(results + 3 * SIZE * SIZE + places, tl.full((SIZE, SIZE), 0.1, tl.bfloat16))


def test_moves_and_constants():
    numbers = normal(SIZE, SIZE, dtype=torch.bfloat16)
    results = torch.empty(4, SIZE, SIZE, dtype=torch.bfloat16, device=DEVICE)
    move_kernel[(1,)](numbers, results, 9, SIZE)
    block = numbers.clone()
    block[9:] = -1.5
    expected = [block.T, torch.where(block > 0, block, numbers[:1]), block.abs(), torch.full_like(block, 0.1)]
    assert torch.equal(results, torch.stack(expected))


@triton.jit
def extremes_kernel(numbers, results, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    block = tl.load(numbers + places)
    flipped = tl.load(numbers + SIZE - 1 - places)
    tl.store(results + places, tl.maximum(block, flipped))
    tl.store(results + SIZE + places, tl.minimum(block, flipped))
    tl.store(results + 2 * SIZE + places, tl.max(block, axis=0) + tl.zeros((SIZE,), tl.float32))
    tl.store(results + 3 * SIZE + places, tl.min(block, axis=0) + tl.zeros((SIZE,), tl.float32))


def test_extremes():
    """``tl`` widens what it compares; that of Triton 3.9 does not, and is refused."""
    numbers = normal(SIZE, dtype=torch.bfloat16)
    results = torch.empty(4, SIZE, dtype=torch.bfloat16, device=DEVICE)
    if is_interpreting() and tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 9):
        with pytest.raises(Exception, match="UFuncTypeError"):
            extremes_kernel[(1,)](numbers, results, SIZE)
        return
    extremes_kernel[(1,)](numbers, results, SIZE)
    flipped = numbers.flip(0)
    expected = [torch.maximum(numbers, flipped), torch.minimum(numbers, flipped)]
    expected += [extreme.expand(SIZE) for extreme in (numbers.max(), numbers.min())]
    assert torch.equal(results, torch.stack(expected))


@triton.jit
def arithmetic_kernel(numbers, results, OPERATION: tl.constexpr, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    block = tl.load(numbers + places)
    if OPERATION == "sum":
        result = block + block
    elif OPERATION == "difference":
        result = -block
    elif OPERATION == "product":
        result = block * block
    elif OPERATION == "sum of a product":
        result = tl.fma(block, block, block)
    elif OPERATION == "order":
        result = block > block
    elif OPERATION == "equality":
        result = block == block
    elif OPERATION == "reduction":
        result = tl.sum(block, axis=0)
    elif OPERATION == "scan":
        result = tl.associative_scan(block, 0, tl.standard._sum_combine)
    elif OPERATION == "atomic sum":
        result = tl.atomic_add(numbers + places, block)
    tl.store(results + places, result)


@pytest.mark.skipif(not is_interpreting(), reason="a GPU computes them")
@pytest.mark.parametrize(
    "operation",
    [
        "sum",
        "difference",
        "product",
        "sum of a product",
        "order",
        "equality",
        "reduction",
        "scan",
        "atomic sum",
    ],
)
def test_arithmetic_in_bfloat16_is_refused(operation):
    numbers = normal(SIZE, dtype=torch.bfloat16)
    with pytest.raises(Exception, match=r"UFuncTypeError|Unsupported data type|bad_cast"):
        arithmetic_kernel[(1,)](numbers, torch.empty_like(numbers), operation, SIZE)


@triton.jit
def scalar_mask_kernel(results, SIZE: tl.constexpr):
    places = tl.arange(0, SIZE)
    tl.store(results + places, 1.0, mask=(places < SIZE) & (tl.program_id(0) == 0))


@pytest.mark.skipif(not is_interpreting(), reason="a GPU takes any mask")
def test_masks_that_the_newest_interpreter_refuses_are_refused_by_all():
    """There, the comparison of a scalar is an integer where it meets a block."""
    with pytest.raises(Exception, match="mask has unsupported dtype"):
        scalar_mask_kernel[(1,)](torch.zeros(SIZE, device=DEVICE), SIZE)
