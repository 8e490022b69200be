"""RMS norm over whole rows.

    y[t, d] = x[t, d] / sqrt(mean_d x[t, d]^2 + eps) * (offset + w[d])

One block a row, its threads side by side in d. A row stays in the L2 cache: the limit is the launch.
"""

from __future__ import annotations

from tvm.tirx import PrimFunc

from q35c.codegen.cuda.kernels.family import ONE, WARP, Family, elementwise, per_row
from q35c.codegen.cuda.kernels.make import T, add, array, let, local, make_kernel, shared, store
from q35c.codegen.cuda.kernels.threads import block_sum, columns, threads

WARPS = 8
ARGUMENTS = "x w y tokens ld_x ld_y"


def rms_norm(D: int, eps: float, offset: float) -> PrimFunc:
    """Make the kernel (X, W f32 [D], Y, T, ld_x, ld_y) for X and Y f32 [T, D], which share nothing."""
    width = WARPS * WARP

    def body(x, w, y, tokens, ld_x, ld_y) -> None:  # type: ignore[no-untyped-def]
        x, y = (array(rows, (tokens, ld), "float32") for rows, ld in ((x, ld_x), (y, ld_y)))
        w = array(w, (D,), "float32")
        with threads((tokens, 1, 1), (width, 1, 1)) as (row, t):
            total, parts = local("total", (1,)), shared("parts", (WARPS,))
            store(total, T.float32(0), 0)
            with columns(D, t, width) as d:
                add(total, x[row, d] * x[row, d], 0)
            block_sum(total, parts, t, WARPS)
            mean = total[0] * T.float32(1.0 / D)
            scale = let("scale", T.rsqrt(mean + T.float32(eps)))
            with columns(D, t, width) as d:
                store(y, x[row, d] * scale * (w[d] + T.float32(offset)), row, d)

    return make_kernel(ARGUMENTS, dict.fromkeys(("x", "w", "y"), "float32"), body)


RMS_NORM = Family(
    rms_norm,
    ARGUMENTS,
    writes="y",
    cost=lambda p: elementwise(2 * p["D"], 4 * p["D"]),
    grid=lambda p: (per_row(), ONE, ONE),
)
