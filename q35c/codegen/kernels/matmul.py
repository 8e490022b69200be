"""The product that a weight's format calls for."""

from __future__ import annotations

from q35c.codegen.isa.x86 import Isa
from q35c.codegen.kernels.product import Product
from q35c.codegen.kernels.quantized_tile import IntegerProduct
from q35c.codegen.kernels.tile import FloatProduct
from q35c.ir.formats import integer_format


def make_product(N: int, K: int, dtype: str, epilogue: str, isa: Isa) -> Product:
    """Return the product with weights of this format: integers have their own tiles."""
    kind = IntegerProduct if integer_format(dtype) else FloatProduct
    return kind(N, K, dtype, epilogue, isa)
