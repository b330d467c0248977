"""The Triton kernels of DyT: forward, backward, and the sum of the backward's partial results.

They see rows of HIDDEN contiguous elements; only the distance between rows is free. All math is fp32.
`triton_dyt.py` launches them with the sizes of `triton_launch.py`; docs/kernels.md says why they look as
they do.

Inline PTX is behind the constexpr PTX, so that the kernels compile for ROCm and run in Triton's
interpreter. A pointer that is None is an operand that the call does not have.
"""

import triton
import triton.language as tl

_LOG2_E = tl.constexpr(1.4426950408889634)
_TWO_OVER_SQRT_PI = tl.constexpr(1.1283791670955126)


@triton.jit
def _reciprocal(v: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """1 / v to 2 ulp, for v in [1, 2]; `/` takes more instructions, as it handles every float."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], tl.float32, True, 1)
    else:
        root = tl.rsqrt(v)
        return root * root


@triton.jit
def _with_sign_of(magnitude: tl.tensor, z: tl.tensor) -> tl.tensor:
    """magnitude, which must not be negative, with the sign bit of z."""
    sign = z.to(tl.uint32, bitcast=True) & 0x80000000
    return (magnitude.to(tl.uint32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _widened(v: tl.tensor, PTX: tl.constexpr) -> tl.tensor:
    """v in fp32. For bf16 the compiler takes three instructions to widen a pair; these are two."""
    if PTX and v.dtype == tl.bfloat16:
        # Out as floats: of a bit pattern, |x| would be an instruction of its own.
        asm: tl.constexpr = """
        { .reg .b32 low, high;
          shl.b32 low, $2, 16; and.b32 high, $2, 0xffff0000;
          mov.b32 $0, low; mov.b32 $1, high; }"""
        return tl.inline_asm_elementwise(asm, "=f,=f,r", [v], tl.float32, True, 2)
    else:
        return v.to(tl.float32)


@triton.jit
def _finite(v: tl.tensor) -> tl.tensor:
    """bf16 v with the largest numbers in place of infinities, two elements at a time; NaN stays."""
    asm: tl.constexpr = """
    { .reg .b32 least, most, v;
      mov.b32 least, 0xff7fff7f; mov.b32 most, 0x7f7f7f7f;
      max.NaN.bf16x2 v, $1, least; min.NaN.bf16x2 $0, v, most; }"""
    return tl.inline_asm_elementwise(asm, "=r,r", [v], tl.bfloat16, True, 2)


@triton.jit
def _tanh(z: tl.tensor, PRECISION: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    """tanh(z) with a relative error, for small z too, of 3e-7 (PRECISION 24), 2e-5 (11) or 2^-11 (8)."""
    if PTX and PRECISION == 8:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [z], tl.float32, True, 1)
    else:
        u = tl.exp2(tl.abs(z) * (-2 * _LOG2_E))
        far = _with_sign_of((1.0 - u) * _reciprocal(1.0 + u, PTX), z)
        # 1 - u cancels near 0: u's error counts u / (1 - u) times, which is 0.6 at z = 0.5, and 4.5 at 0.1,
        # where 16-bit results still bear it. Below: minimax fits to (tanh(z) - z) / z^3, or Taylor's -1/3.
        z2 = z * z
        if PRECISION == 24:
            p = 0.017241583 * z2 - 0.05304554
            p = p * z2 + 0.1332588
            p = p * z2 - 0.33333144
            return tl.where(tl.abs(z) < 0.5, z * z2 * p + z, far)
        else:
            return tl.where(tl.abs(z) < 0.1, z * z2 * -0.33333333 + z, far)


@triton.jit
def _erf(z: tl.tensor, PRECISION: tl.constexpr) -> tl.tensor:
    """erf(z) to 2 ulp (PRECISION 24), else with a relative error of 1e-5, for small z too."""
    if PRECISION == 24:
        return tl.erf(z)
    else:
        # erfc(a) = 2^(-a p(a)), with p a minimax fit in erf's relative error over [0.1, 3.2]; beyond, 16-bit
        # results are 1. Below 0.1, where 1 - erfc cancels, two terms of erf's series.
        a = tl.abs(z)
        p = 0.0029956965 * a - 0.029795589
        p = p * a + 0.14893462
        p = p * a + 0.91837774
        p = p * a + 1.627908
        far = _with_sign_of(1.0 - tl.exp2(-a * p), z)
        near = z * (_TWO_OVER_SQRT_PI - (_TWO_OVER_SQRT_PI / 3) * z * z)
        return tl.where(a < 0.1, near, far)


@triton.jit
def _value(z: tl.tensor, FUNCTION: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr) -> tl.tensor:
    if FUNCTION == "tanh":
        return _tanh(z, PRECISION, PTX)
    else:
        return _erf(z, PRECISION)


@triton.jit
def _value_and_slope(
    z: tl.tensor, FUNCTION: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr
) -> tuple[tl.tensor, tl.tensor]:
    """f(z), and f'(z) without the constant of `_slope_factor`, each to a few ulp of fp32.

    f'(z) has that accuracy relative to itself out to where it underflows: 1 - tanh(z)^2 would have
    none left at z = 9. tanh has it relative to 1: it is summed for dweight, where the sum's own
    error is not smaller.
    """
    if FUNCTION == "tanh":
        u = tl.exp2(tl.abs(z) * (-2 * _LOG2_E))
        q = _reciprocal(1.0 + u, PTX)
        return _with_sign_of((1.0 - u) * q, z), u * q * q
    else:
        return _erf(z, PRECISION), tl.exp2(z * z * -_LOG2_E)


@triton.jit
def _slope_factor(FUNCTION: tl.constexpr) -> tl.constexpr:
    if FUNCTION == "tanh":
        return 4.0
    else:
        return _TWO_OVER_SQRT_PI


@triton.jit
def _sum_of_slices(v: tl.tensor, UNROLL: tl.constexpr) -> tl.tensor:
    """(UNROLL * BLOCK_M, BLOCK_N) -> (BLOCK_M, BLOCK_N), the sum of the UNROLL slices.

    A tile of two dimensions, whose slices each thread has in its registers: of a tile of three, releases of
    Triton differ in which of the outer dimensions they spread over the threads of a warp.
    """
    return tl.sum(v.reshape(UNROLL, v.shape[0] // UNROLL, v.shape[1]), 0)


# One compiled kernel serves any number of rows.
@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    x_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    alpha_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    y_ptr: tl.tensor,
    sum_ptr: tl.tensor,
    rows: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    HIDDEN: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """y = weight * f(alpha * (x + residual) + shift) + bias, and x + residual.

    Grid: (row blocks * column tiles,). Strides are those between rows, in STRIDE_UNIT elements: the
    compiler then knows their alignment and uses 16-byte accesses. y and the sum are contiguous.
    """
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    columns = (pid % TILES) * BLOCK_N + tl.arange(0, BLOCK_N)
    row = tl.cast(pid // TILES, tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    in_row = columns < HIDDEN
    inside = (row < rows)[:, None]
    if HIDDEN % BLOCK_N != 0:
        inside = inside & in_row[None, :]

    # Before any store: the compiler does not move a load over a store that might overlap it.
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_row, other=0.0)
    x_offsets = (row * (x_stride * STRIDE_UNIT))[:, None] + columns[None, :]
    z = tl.load(x_ptr + x_offsets, mask=inside, other=0.0).to(tl.float32)
    out_offsets = (row * HIDDEN)[:, None] + columns[None, :]
    if residual_ptr is not None:
        residual_offsets = (row * (residual_stride * STRIDE_UNIT))[:, None] + columns[None, :]
        residual = tl.load(residual_ptr + residual_offsets, mask=inside, other=0.0)
        total = (z + residual.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + out_offsets, total, mask=inside)
        # As rounded for storage: it is what backward will see.
        z = total.to(tl.float32)

    z = z * alpha
    if shift_ptr is not None:
        z = z + tl.load(shift_ptr).to(tl.float32)
    y = _value(z, FUNCTION, PRECISION, PTX) * weight.to(tl.float32)[None, :]
    if bias_ptr is not None:
        y = y + bias.to(tl.float32)[None, :]
    tl.store(y_ptr + out_offsets, y, mask=inside)


@triton.jit(do_not_specialize=["rows", "row_blocks", "row_programs"])
def backward_kernel(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    dsum_ptr: tl.tensor,
    alpha_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    shift_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    rows: tl.tensor,
    row_blocks: tl.tensor,
    row_programs: tl.tensor,
    dy_stride: tl.tensor,
    x_stride: tl.tensor,
    dsum_stride: tl.tensor,
    HIDDEN: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
    FUNCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    PTX: tl.constexpr,
    NEEDS_ALPHA: tl.constexpr,
    NEEDS_WEIGHT: tl.constexpr,
    NEEDS_BIAS: tl.constexpr,
    NEEDS_SHIFT: tl.constexpr,
    PARTIAL_WIDTH: tl.constexpr,
    UNROLL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> None:
    """dx = dsum + dy * weight * alpha * f'(z), and this program's share of the parameters' gradients.

    Grid: (row_programs * column tiles,). A program owns a column tile and every row_programs-th block of
    UNROLL * BLOCK_M rows. Its sums stay in registers, one for each of the BLOCK_M * BLOCK_N positions of
    the tile, so that the loop exchanges nothing between threads; the UNROLL slices of a block are in
    flight together. Partial sums: see `finalize_kernel`.
    """
    TILES: tl.constexpr = (HIDDEN + BLOCK_N - 1) // BLOCK_N
    pid = tl.program_id(0)
    tile = pid % TILES
    program = pid // TILES
    columns = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    in_row = columns < HIDDEN
    alpha = tl.load(alpha_ptr).to(tl.float32)
    weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
    scale = (weight * (alpha * _slope_factor(FUNCTION)))[None, :]
    if shift_ptr is not None:
        shift = tl.load(shift_ptr).to(tl.float32)
    IS_FINITE: tl.constexpr = NEEDS_ALPHA and PTX and x_ptr.dtype.element_ty == tl.bfloat16

    position = tl.arange(0, UNROLL * BLOCK_M)
    d_alpha = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    d_weight = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    d_bias = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    d_shift = tl.full((BLOCK_M, BLOCK_N), 0.0, tl.float32)
    for block in range(program, row_blocks, row_programs):
        row = (tl.cast(block, tl.int64) * (UNROLL * BLOCK_M) + position)[:, None]
        inside = row < rows
        if HIDDEN % BLOCK_N != 0:
            inside = inside & in_row[None, :]
        column = columns[None, :]
        # Rows beyond the end are zeros, which add nothing to any sum.
        dy = tl.load(dy_ptr + row * (dy_stride * STRIDE_UNIT) + column, mask=inside, other=0.0)
        x = tl.load(x_ptr + row * (x_stride * STRIDE_UNIT) + column, mask=inside, other=0.0)
        if dsum_ptr is not None:
            dsum = tl.load(dsum_ptr + row * (dsum_stride * STRIDE_UNIT) + column, mask=inside, other=0.0)
        if IS_FINITE:
            x = _finite(x)
        dy = _widened(dy, PTX)
        x = _widened(x, PTX)
        z = x * alpha
        if shift_ptr is not None:
            z = z + shift
        value, slope = _value_and_slope(z, FUNCTION, PRECISION, PTX)
        g = dy * slope
        if dx_ptr is not None:
            dx = g * scale
            if dsum_ptr is not None:
                dx = dx + _widened(dsum, PTX)
            tl.store(dx_ptr + row * HIDDEN + column, dx, mask=inside)
        if NEEDS_ALPHA:
            # Where f is flat, an infinite x adds 0, which is the limit, and not 0 * inf.
            gx = g * x if IS_FINITE else dy * tl.where(slope == 0.0, 0.0, slope * x)
            d_alpha += _sum_of_slices(gx, UNROLL)
        if NEEDS_WEIGHT:
            d_weight += _sum_of_slices(dy * value, UNROLL)
        if NEEDS_BIAS:
            d_bias += _sum_of_slices(dy, UNROLL)
        if NEEDS_SHIFT:
            d_shift += _sum_of_slices(g, UNROLL)

    if partial_ptr is not None:
        out = partial_ptr + tl.cast(program, tl.int64) * PARTIAL_WIDTH
        if NEEDS_WEIGHT:
            tl.store(out + columns, tl.sum(d_weight, 0), mask=in_row)
            out += HIDDEN
        if NEEDS_BIAS:
            tl.store(out + columns, tl.sum(d_bias, 0), mask=in_row)
            out += HIDDEN
        # Read again rather than kept in registers over the loop.
        weight = tl.load(weight_ptr + columns, mask=in_row, other=0.0).to(tl.float32)
        factor = weight * _slope_factor(FUNCTION)
        if NEEDS_ALPHA:
            tl.store(out + tile, tl.sum(tl.sum(d_alpha, 0) * factor, 0))
            out += TILES
        if NEEDS_SHIFT:
            tl.store(out + tile, tl.sum(tl.sum(d_shift, 0) * factor, 0))


@triton.jit
def _sum_of_columns(
    partial_ptr: tl.tensor,
    column: tl.tensor,
    inside: tl.tensor,
    programs: tl.tensor,
    PARTIAL_WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
) -> tl.tensor:
    total = tl.full((BLOCK_P, BLOCK_N), 0.0, tl.float32)
    for start in range(0, programs, BLOCK_P):
        program = start + tl.arange(0, BLOCK_P)
        offsets = tl.cast(program, tl.int64)[:, None] * PARTIAL_WIDTH + column[None, :]
        total += tl.load(
            partial_ptr + offsets, mask=(program < programs)[:, None] & inside[None, :], other=0.0
        )
    return tl.sum(total, 0)


@triton.jit(do_not_specialize=["programs"])
def finalize_kernel(
    partial_ptr: tl.tensor,
    d_alpha_ptr: tl.tensor,
    d_weight_ptr: tl.tensor,
    d_bias_ptr: tl.tensor,
    d_shift_ptr: tl.tensor,
    programs: tl.tensor,
    HIDDEN: tl.constexpr,
    TILES: tl.constexpr,
    PARTIAL_WIDTH: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
) -> None:
    """The parameters' gradients from `programs` rows of partial sums, always added in the same order.

    A row holds, of those gradients whose pointer is not None: HIDDEN sums for weight, HIDDEN for bias,
    TILES for alpha, TILES for shift; PARTIAL_WIDTH in all. Grid: (ceil(HIDDEN / BLOCK_N),); program 0
    also does the two scalars, BLOCK_T >= TILES values per row.
    """
    pid = tl.program_id(0)
    column = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = column < HIDDEN
    if d_weight_ptr is not None:
        d_weight = _sum_of_columns(partial_ptr, column, inside, programs, PARTIAL_WIDTH, BLOCK_P, BLOCK_N)
        tl.store(d_weight_ptr + column, d_weight, mask=inside)
        partial_ptr += HIDDEN
    if d_bias_ptr is not None:
        d_bias = _sum_of_columns(partial_ptr, column, inside, programs, PARTIAL_WIDTH, BLOCK_P, BLOCK_N)
        tl.store(d_bias_ptr + column, d_bias, mask=inside)
        partial_ptr += HIDDEN
    if pid == 0:
        tile = tl.arange(0, BLOCK_T)
        in_tiles = tile < TILES
        if d_alpha_ptr is not None:
            d_alpha = _sum_of_columns(partial_ptr, tile, in_tiles, programs, PARTIAL_WIDTH, BLOCK_P, BLOCK_T)
            tl.store(d_alpha_ptr, tl.sum(d_alpha, 0))
        if d_shift_ptr is not None:
            if d_alpha_ptr is not None:
                tile += TILES
            d_shift = _sum_of_columns(partial_ptr, tile, in_tiles, programs, PARTIAL_WIDTH, BLOCK_P, BLOCK_T)
            tl.store(d_shift_ptr, tl.sum(d_shift, 0))
