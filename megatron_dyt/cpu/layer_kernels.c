/*
 * Parts of a transformer layer for CPUs, each in one or two passes over its tensors; `kernels.py` calls this.
 *
 * All tensors are fp32. Work is dealt to threads by row, and sums over rows go through a number of blocks that
 * the shape alone decides, so results do not depend on the number of threads.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

/* Each processor runs the version that its instructions allow. -DBASELINE_ONLY is for the tests. */
#if defined __x86_64__ && defined __gnu_linux__ && !defined BASELINE_ONLY
#define VERSIONS __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define VERSIONS
#endif
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

/*
 * e^x for x <= 0, as 2^n e^r with |r| <= ln(2)/2 and a minimax polynomial for e^r. Below -87.3, where it leaves
 * fp32's normal numbers, 0. NaN stays NaN: the comparison is written so that it takes the other branch.
 */
INLINE float exp_of_negative(float x)
{
    const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: what is added to it is rounded */
    int is_under = x < -87.3f;
    float v = is_under ? 0.0f : x;
    float shifted = v * 1.44269504f + round_to_integer; /* 1 / ln(2) */
    float n = shifted - round_to_integer;
    float r = n * -0.693359375f + v; /* ln(2) in two parts, of which n times the first is exact */
    r = n * 2.12194440e-4f + r;
    float q = 0.00139464971f;
    q = q * r + 0.00836661069f;
    q = q * r + 0.0416662814f;
    q = q * r + 0.166665428f;
    q = q * r + 0.500000006f;
    float p = (r * r) * q + r;                           /* e^r - 1 */
    float scale = as_float((as_bits(shifted) + 127) << 23); /* 2^n, from n in the lowest bits */
    return is_under ? 0.0f : scale * p + scale;
}

/* --- cross-entropy ------------------------------------------------------------------------------------- */

VERSIONS static void cross_entropy_row(const float *logits, int64_t n, float *max_of_row, float *sum_of_row)
{
    float max = logits[0];
    int64_t nans = 0;
#pragma omp simd reduction(max : max) reduction(+ : nans)
    for (int64_t i = 0; i < n; i++) {
        max = logits[i] > max ? logits[i] : max;
        nans += logits[i] != logits[i];
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += exp_of_negative(logits[i] - max);
    *max_of_row = max;
    *sum_of_row = nans ? NAN : sum;
}

/*
 * loss, max and sum of exp(logit - max), all (rows,), of logits (rows, n) and targets (rows,). The logit of a
 * target that is none of 0 to n - 1 counts as the max, as in Megatron.
 */
void cross_entropy(
    int64_t rows, int64_t n, int64_t threads, const float *logits, const int64_t *targets, float *loss,
    float *max, float *sum)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        const float *of_row = logits + row * n;
        cross_entropy_row(of_row, n, max + row, sum + row);
        int64_t target = targets[row];
        loss[row] = logf(sum[row]) - (target >= 0 && target < n ? of_row[target] - max[row] : 0.0f);
    }
}

VERSIONS static void cross_entropy_backward_row(float *logits, int64_t n, float max, float scale)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        logits[i] = scale * exp_of_negative(logits[i] - max);
}

/* The gradient of the logits, in their place. */
void cross_entropy_backward(
    int64_t rows, int64_t n, int64_t threads, const float *dloss, const int64_t *targets, const float *max,
    const float *sum, float *logits)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        cross_entropy_backward_row(logits + row * n, n, max[row], dloss[row] / sum[row]);
        if (targets[row] >= 0 && targets[row] < n)
            logits[row * n + targets[row]] -= dloss[row];
    }
}

/* --- SwiGLU -------------------------------------------------------------------------------------------- */

INLINE float sigmoid(float x)
{
    float e = exp_of_negative(-__builtin_fabsf(x)), q = 1.0f / (1.0f + e);
    return x < 0 ? e * q : q;
}

VERSIONS static void swiglu_row(const float *gate, const float *linear, int64_t n, float *out)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = gate[i] * sigmoid(gate[i]) * linear[i];
}

/* out (rows, n): silu of the first half of each row of x (rows, 2 n), times the second. */
void swiglu(int64_t rows, int64_t n, int64_t threads, const float *x, float *out)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        swiglu_row(x + 2 * row * n, x + (2 * row + 1) * n, n, out + row * n);
}

VERSIONS static void swiglu_backward_row(
    const float *dout, const float *gate, const float *linear, int64_t n, float *dgate, float *dlinear)
{
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        float s = sigmoid(gate[i]), silu = gate[i] * s;
        dgate[i] = dout[i] * linear[i] * (s + silu * (1.0f - s));
        dlinear[i] = dout[i] * silu;
    }
}

/* dx (rows, 2 n) for the gradient dout (rows, n). */
void swiglu_backward(int64_t rows, int64_t n, int64_t threads, const float *dout, const float *x, float *dx)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++) {
        int64_t gate = 2 * row * n, linear = gate + n;
        swiglu_backward_row(dout + row * n, x + gate, x + linear, n, dx + gate, dx + linear);
    }
}

/* --- rotary position embedding --------------------------------------------------------------------------- */

/* Where `turn` is -1, the transpose: the gradient. */
VERSIONS static void rotate_head(
    const float *x, int64_t half, int64_t n, const float *cos, const float *sin, float turn, float *out)
{
    const float *second = x + half, *cos2 = cos + half;
    /* Of the transpose, the sine that stood with the other half. */
    const float *sin1 = turn < 0 ? sin + half : sin, *sin2 = turn < 0 ? sin : sin + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        float a = x[i], b = second[i];
        out[i] = a * cos[i] - turn * b * sin1[i];
        out[half + i] = b * cos2[i] + turn * a * sin2[i];
    }
    for (int64_t i = 2 * half; i < n; i++)
        out[i] = x[i];
}

/*
 * out, contiguous (tokens, batch, heads, n), of x, whose channels alone must be adjacent. The first 2 * half
 * channels of a head are rotated: out = x cos + (-second half, first half) sin, with cos and sin
 * (tokens, 2 * half).
 */
void rotary(
    int64_t tokens, int64_t batch, int64_t heads, int64_t n, int64_t half, int64_t threads, int64_t token_stride,
    int64_t batch_stride, int64_t head_stride, int64_t is_backward, const float *x, const float *cos,
    const float *sin, float *out)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t token = 0; token < tokens; token++)
        for (int64_t b = 0; b < batch; b++)
            for (int64_t head = 0; head < heads; head++)
                rotate_head(
                    x + token * token_stride + b * batch_stride + head * head_stride, half, n,
                    cos + 2 * token * half, sin + 2 * token * half, is_backward ? -1.0f : 1.0f,
                    out + ((token * batch + b) * heads + head) * n);
}

/* --- RMSNorm --------------------------------------------------------------------------------------------- */

INLINE float sum_of_squares(const float *x, int64_t n)
{
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++)
        sum += x[i] * x[i];
    return sum;
}

INLINE float inverse_rms(const float *x, int64_t n, float eps)
{
    return 1.0f / sqrtf(sum_of_squares(x, n) / (float)n + eps);
}

VERSIONS static void rms_norm_row(const float *x, const float *weight, int64_t n, float eps, float *out)
{
    float scale = inverse_rms(x, n, eps);
#pragma omp simd
    for (int64_t i = 0; i < n; i++)
        out[i] = x[i] * scale * weight[i];
}

/* out of x, both (rows, n). */
void rms_norm(
    int64_t rows, int64_t n, int64_t threads, double eps, const float *x, const float *weight, float *out)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t row = 0; row < rows; row++)
        rms_norm_row(x + row * n, weight, n, (float)eps, out + row * n);
}

VERSIONS static void rms_norm_backward_row(
    const float *dout, const float *x, const float *weight, int64_t n, float eps, float *dx, double *dweight)
{
    float scale = inverse_rms(x, n, eps), along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t i = 0; i < n; i++)
        along += dout[i] * weight[i] * x[i];
    along *= scale * scale / (float)n;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) {
        dx[i] = scale * (dout[i] * weight[i] - along * x[i]);
        dweight[i] += dout[i] * x[i] * scale;
    }
}

/* dx (rows, n), and the gradient of the weight as sums of each block of rows (blocks, n). */
void rms_norm_backward(
    int64_t rows, int64_t n, int64_t blocks, int64_t threads, double eps, const float *dout, const float *x,
    const float *weight, float *dx, double *dweight)
{
#pragma omp parallel for schedule(static) if (threads > 1)
    for (int64_t block = 0; block < blocks; block++) {
        double *sums = dweight + block * n;
        memset(sums, 0, n * sizeof *sums);
        for (int64_t row = rows * block / blocks; row < rows * (block + 1) / blocks; row++)
            rms_norm_backward_row(dout + row * n, x + row * n, weight, n, (float)eps, dx + row * n, sums);
    }
}

/* Of this file, by which the caller knows that it has the library of the same version. */
uint32_t source_crc32(void) { return SOURCE_CRC32; }
