"""The product that the formats of weight and rows call for."""

from __future__ import annotations

from q35c.codegen.cpu.isa.base import Isa
from q35c.codegen.cpu.kernels.products.float_tile import FloatProduct
from q35c.codegen.cpu.kernels.products.integer_tile import IntegerProduct
from q35c.codegen.cpu.kernels.products.pair_tile import PairProduct
from q35c.codegen.cpu.kernels.products.product import Product
from q35c.formats.registry import integer_format


def make_product(
    N: int, K: int, dtype: str, epilogue: str, isa: Isa, rows: str = "f32", is_rounded: bool = False
) -> Product:
    """Return the product of weights and rows of these formats.

    Integer weights have one kind of rows, floating ones meet f32 or bf16 `rows`. Without an instruction for bf16
    pairs, bf16 rows come in f32 (rows/round_bf16.py).
    """
    if integer_format(dtype):
        return IntegerProduct(N, K, dtype, epilogue, isa, is_rounded)
    kind = PairProduct if rows == "bf16" and isa.offers("dot2_bf16") else FloatProduct
    return kind(N, K, dtype, epilogue, isa, is_rounded)
