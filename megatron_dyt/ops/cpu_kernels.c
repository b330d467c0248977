/*
 * DyT and Derf on CPU, forward and backward in one pass over memory each; `cpu_dyt.py` calls this.
 *
 * Rows are dealt to threads in blocks whose number depends on the shape alone, so results do not depend on
 * the number of threads. Within a block, the inner loops run over TILE columns of a row, which the compiler
 * vectorizes (a tile of bf16 is widened to fp32 and back). All math is fp32; sums over rows are fp32 within
 * GROUP rows and fp64 beyond.
 */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

/* TILE: the buffers and sums of backward, eight rows of TILE fp32, are 16 KB, half of a first-level cache.
 * GROUP: an fp32 sum of 16 terms is off by 15 roundings at the most, and fp64 takes one addition in 16. */
enum { TILE = 512, GROUP = 16 };
enum { TANH, ERF };                     /* struct call: function */
enum { OF_GX, OF_VALUE, OF_DY, OF_G, SUMS }; /* rows of struct call: partials */

/* Matrices are (rows, hidden), of fp32 or bf16; *_stride is that of rows, in elements. `cpu_dyt.py` has the
 * same fields in the same order. */
struct call {
    int64_t rows, hidden, blocks, threads, function, is_bf16;
    double alpha, shift;
    const void *x, *residual, *dy, *dsum; /* residual and dsum may be NULL */
    int64_t x_stride, residual_stride, dy_stride, dsum_stride;
    const float *weight, *bias; /* (hidden,); bias may be NULL */
    void *y, *sum;              /* contiguous; sum only with residual */
    double *partials;           /* (blocks, SUMS, hidden), for backward */
    /* Gradients; NULL where not wanted. dx is contiguous, the others are (hidden,) and (1,). */
    void *dx;
    float *dweight, *dbias, *dalpha, *dshift;
};

#define INLINE static inline __attribute__((always_inline))

INLINE float as_float(uint32_t bits)
{
    float f;
    memcpy(&f, &bits, sizeof f);
    return f;
}

INLINE uint32_t as_bits(float f)
{
    uint32_t bits;
    memcpy(&bits, &f, sizeof bits);
    return bits;
}

INLINE float widen(uint16_t bf16) { return as_float((uint32_t)bf16 << 16); }

/* Rounds to nearest even. */
INLINE uint16_t narrow(float f)
{
    uint32_t bits = as_bits(f);
    int is_nan = (bits & 0x7fffffff) > 0x7f800000;
    return is_nan ? 0x7fc0 : (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

/* f at one z, and its slope there. */
struct point {
    float value, slope;
};

/*
 * 4 e^-u, and e^-u - 1 without cancellation, for u >= 0: 2^n e^r with |r| <= ln(2)/2, and a minimax polynomial
 * of our own for e^r (error 1.3e-8). Beyond 88.7, where the first leaves fp32's normal numbers, 0 and -1. NaN
 * stays NaN: comparisons are written so that it takes the other branch.
 */
struct decay {
    float exp4, expm1;
};

INLINE struct decay decay_at(float u)
{
    const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded */
    int is_over = u > 88.7f;
    float v = is_over ? 0.0f : u;
    float shifted = v * -1.44269504f + round_to_integer; /* 1 / ln(2) */
    float n = shifted - round_to_integer;
    float r = n * -0.693359375f - v; /* ln(2) in two parts, of which n times the first is exact */
    r = n * 2.12194440e-4f + r;
    float q = 0.00139464971f;
    q = q * r + 0.00836661069f;
    q = q * r + 0.0416662814f;
    q = q * r + 0.166665428f;
    q = q * r + 0.500000006f;
    float p = (r * r) * q + r;                                  /* e^r - 1 */
    float scale4 = as_float((as_bits(shifted) + 127 + 2) << 23); /* 4 * 2^n, from n in the lowest bits */
    float scale = 0.25f * scale4;
    struct decay result = {
        is_over ? 0.0f : scale4 * p + scale4,
        is_over ? -1.0f : scale * p + (scale - 1.0f),
    };
    return result;
}

INLINE struct point tanh_at(float z)
{
    struct decay d = decay_at(2.0f * __builtin_fabsf(z));
    float q = 1.0f / (2.0f + d.expm1);
    struct point p = {__builtin_copysignf(-d.expm1 * q, z), d.exp4 * q * q};
    return p;
}

/* Below 1, z p(z^2); above, 1 - e^(-z^2) p(z), with minimax polynomials of our own (errors 1e-9 and 1.4e-8). */
INLINE struct point erf_at(float z)
{
    float a = __builtin_fabsf(z), square = z * z;
    float exp = 0.25f * decay_at(square).exp4;
    float low = 7.85387383e-05f;
    low = low * square - 0.000801019785f;
    low = low * square + 0.00518832824f;
    low = low * square - 0.0268538123f;
    low = low * square + 0.112835852f;
    low = low * square - 0.376126258f;
    low = low * square + 1.12837917f;
    float c = a > 4.0f ? 4.0f : a; /* where p's fit ends: erfc(4) = 1.5e-8, so that beyond erf is 1 in fp32 */
    float high = -0.000393791031f;
    high = high * c + 0.00606581217f;
    high = high * c - 0.0413124577f;
    high = high * c + 0.165017458f;
    high = high * c - 0.43313774f;
    high = high * c + 0.794006964f;
    high = high * c - 1.04895452f;
    high = high * c + 0.986291821f;
    float value = a > 1.0f ? 1.0f - exp * high : a * low;
    struct point p = {__builtin_copysignf(value, z), 1.12837917f * exp}; /* 2 / sqrt(pi) */
    return p;
}

INLINE struct point f_at(int function, float alpha, float shift, float x)
{
    return function == TANH ? tanh_at(alpha * x) : erf_at(alpha * x + shift);
}

/* The neutral element of addition, which leaves a -0 as it is. */
static const float no_bias[TILE] = {[0 ... TILE - 1] = -0.0f};

/* n elements from index `at` on, as fp32: in place, or widened into `buffer`. */
INLINE const float *load(int is_bf16, const void *matrix, int64_t at, int n, float *buffer)
{
    if (!is_bf16)
        return (const float *)matrix + at;
    const uint16_t *from = (const uint16_t *)matrix + at;
    for (int i = 0; i < n; i++)
        buffer[i] = widen(from[i]);
    return buffer;
}

/* Where to put n fp32 elements that belong at index `at`: in place, or in `buffer`, which store() narrows. */
INLINE float *place(int is_bf16, void *matrix, int64_t at, float *buffer)
{
    return is_bf16 ? buffer : (float *)matrix + at;
}

INLINE void store(int is_bf16, void *matrix, int64_t at, int n, const float *buffer)
{
    if (!is_bf16)
        return;
    uint16_t *to = (uint16_t *)matrix + at;
    for (int i = 0; i < n; i++)
        to[i] = narrow(buffer[i]);
}

INLINE int tile_size(const struct call *call, int64_t column)
{
    int64_t left = call->hidden - column;
    return left < TILE ? (int)left : TILE;
}

/* x + residual of one tile, as rounded to the dtype of `sum`, where it is put. */
INLINE const float *add(const struct call *call, int64_t row, int64_t column, int n, const float *x, float *buffer)
{
    float other[TILE];
    int bf16 = (int)call->is_bf16;
    int64_t at = row * call->hidden + column;
    const float *residual = load(bf16, call->residual, row * call->residual_stride + column, n, other);
    float *sum = place(bf16, call->sum, at, buffer);
    for (int i = 0; i < n; i++)
        sum[i] = x[i] + residual[i];
    store(bf16, call->sum, at, n, sum);
    return load(bf16, call->sum, at, n, buffer);
}

INLINE void forward_rows(const struct call *call, int64_t first, int64_t last, int function)
{
    float x_buffer[TILE], y_buffer[TILE];
    float alpha = (float)call->alpha, shift = (float)call->shift;
    int bf16 = (int)call->is_bf16;
    for (int64_t row = first; row < last; row++)
        for (int64_t column = 0; column < call->hidden; column += TILE) {
            int n = tile_size(call, column);
            int64_t at = row * call->hidden + column;
            const float *x = load(bf16, call->x, row * call->x_stride + column, n, x_buffer);
            if (call->residual)
                x = add(call, row, column, n, x, x_buffer);
            const float *weight = call->weight + column;
            const float *bias = call->bias ? call->bias + column : no_bias;
            float *y = place(bf16, call->y, at, y_buffer);
#pragma omp simd
            for (int i = 0; i < n; i++)
                y[i] = weight[i] * f_at(function, alpha, shift, x[i]).value + bias[i];
            store(bf16, call->y, at, n, y);
        }
}

/* One tile of one row of backward: dx, and its terms added to `sums`. */
INLINE void backward_tile(
    const struct call *call, int64_t row, int64_t column, int n, int function, float sums[SUMS][TILE])
{
    float x_buffer[TILE], dy_buffer[TILE], dsum_buffer[TILE], dx_buffer[TILE];
    float alpha = (float)call->alpha, shift = (float)call->shift;
    int bf16 = (int)call->is_bf16;
    int64_t at = row * call->hidden + column;
    const float *x = load(bf16, call->x, row * call->x_stride + column, n, x_buffer);
    const float *dy = load(bf16, call->dy, row * call->dy_stride + column, n, dy_buffer);
    const float *weight = call->weight + column;
    float *dx = call->dx ? place(bf16, call->dx, at, dx_buffer) : dx_buffer;
#pragma omp simd
    for (int i = 0; i < n; i++) {
        struct point f = f_at(function, alpha, shift, x[i]);
        float g = weight[i] * dy[i] * f.slope;
        dx[i] = g * alpha;
        /* Where the slope is 0, an infinite x adds 0, the limit. */
        sums[OF_GX][i] += f.slope == 0.0f ? 0.0f : g * x[i];
        sums[OF_VALUE][i] += dy[i] * f.value;
        sums[OF_DY][i] += dy[i];
        if (function == ERF)
            sums[OF_G][i] += g;
    }
    if (call->dsum) { /* not above, where it would become one operation: fp32 is rounded as autograd does */
        const float *dsum = load(bf16, call->dsum, row * call->dsum_stride + column, n, dsum_buffer);
        for (int i = 0; i < n; i++)
            dx[i] += dsum[i];
    }
    if (call->dx)
        store(bf16, call->dx, at, n, dx);
}

INLINE void backward_rows(const struct call *call, int64_t first, int64_t last, double *partials, int function)
{
    memset(partials, 0, SUMS * call->hidden * sizeof *partials);
    for (int64_t group = first; group < last; group += GROUP) {
        int64_t end = group + GROUP < last ? group + GROUP : last;
        for (int64_t column = 0; column < call->hidden; column += TILE) {
            float sums[SUMS][TILE] = {{0}};
            int n = tile_size(call, column);
            for (int64_t row = group; row < end; row++)
                backward_tile(call, row, column, n, function, sums);
            for (int s = 0; s < SUMS; s++)
                for (int i = 0; i < n; i++)
                    partials[s * call->hidden + column + i] += sums[s][i];
        }
    }
}

/* Rows `first` to `last` of one block; partials are that block's, for backward. */
typedef void rows_kernel(const struct call *, int64_t first, int64_t last, double *partials);

/* The kernels of one instruction set. */
struct kernels {
    rows_kernel *forward[2], *backward[2]; /* by function */
};

#define KERNELS(name, attributes)                                                                              \
    attributes static void name##_tanh(const struct call *c, int64_t first, int64_t last, double *p)            \
    {                                                                                                          \
        (void)p;                                                                                               \
        forward_rows(c, first, last, TANH);                                                                    \
    }                                                                                                          \
    attributes static void name##_erf(const struct call *c, int64_t first, int64_t last, double *p)             \
    {                                                                                                          \
        (void)p;                                                                                               \
        forward_rows(c, first, last, ERF);                                                                     \
    }                                                                                                          \
    attributes static void name##_tanh_backward(const struct call *c, int64_t first, int64_t last, double *p)   \
    {                                                                                                          \
        backward_rows(c, first, last, p, TANH);                                                                \
    }                                                                                                          \
    attributes static void name##_erf_backward(const struct call *c, int64_t first, int64_t last, double *p)    \
    {                                                                                                          \
        backward_rows(c, first, last, p, ERF);                                                                 \
    }                                                                                                          \
    static const struct kernels name = {{name##_tanh, name##_erf}, {name##_tanh_backward, name##_erf_backward}};

/* -DBASELINE_ONLY is for the tests: what an old processor runs. */
#if defined __x86_64__ && !defined BASELINE_ONLY
#define HAS_AVX
#endif

KERNELS(baseline, )
#ifdef HAS_AVX
KERNELS(avx2, __attribute__((target("avx2,fma"))))
KERNELS(avx512, __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512"))))
#endif

static const struct kernels *kernels_of_this_machine(void)
{
#ifdef HAS_AVX
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
        return &avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        return &avx2;
#endif
    return &baseline;
}

/* No num_threads clause here: GNU's OpenMP would end the threads that are not wanted, and PyTorch's next operation
 * would have to start them again. */
static void run(rows_kernel *kernel, const struct call *call)
{
    int64_t share = (call->blocks + call->threads - 1) / call->threads;
#pragma omp parallel for schedule(static, share) if (call->threads > 1)
    for (int64_t block = 0; block < call->blocks; block++) {
        int64_t first = call->rows * block / call->blocks, last = call->rows * (block + 1) / call->blocks;
        double *partials = call->partials ? call->partials + block * SUMS * call->hidden : NULL;
        kernel(call, first, last, partials);
    }
}

/* Add the other blocks' sums to those of the first. */
static void add_blocks(const struct call *call)
{
    int64_t size = SUMS * call->hidden;
#pragma omp parallel for schedule(static) if (call->threads > 1)
    for (int64_t start = 0; start < size; start += TILE) {
        int64_t end = start + TILE < size ? start + TILE : size;
        for (int64_t block = 1; block < call->blocks; block++)
            for (int64_t i = start; i < end; i++)
                call->partials[i] += call->partials[block * size + i];
    }
}

/* One of the sums for each channel, or over all channels; nothing for NULL. */
static void finish(const struct call *call, int which, float *vector, float *scalar)
{
    const double *sums = call->partials + which * call->hidden;
    double total = 0;
    for (int64_t i = 0; i < call->hidden; i++) {
        if (vector)
            vector[i] = (float)sums[i];
        total += sums[i];
    }
    if (scalar)
        *scalar = (float)total;
}

/* Of this file, by which the caller knows that it has the library of the same version. */
uint32_t dyt_source_crc32(void) { return SOURCE_CRC32; }

/* y (and sum) of x (and residual). */
void dyt_forward(const struct call *call) { run(kernels_of_this_machine()->forward[call->function], call); }

/* The gradients, for the upstream gradient dy. */
void dyt_backward(const struct call *call)
{
    run(kernels_of_this_machine()->backward[call->function], call);
    add_blocks(call);
    finish(call, OF_GX, NULL, call->dalpha);
    finish(call, OF_VALUE, call->dweight, NULL);
    finish(call, OF_DY, call->dbias, NULL);
    finish(call, OF_G, NULL, call->dshift);
}
