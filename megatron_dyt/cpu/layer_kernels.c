/*
 * Parts of a transformer layer for CPUs, each in one or two passes over its tensors; `kernels.py` calls this.
 *
 * All tensors are fp32. Work is dealt to threads by row, and sums over rows go through a number of blocks that
 * the shape alone decides, so results do not depend on the number of threads.
 */
#include <math.h>
#include <omp.h>
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

/* --- attention ------------------------------------------------------------------------------------------- */

/*
 * Softmax(scale Q K^T) V, for QUERIES rows of Q at a time, whose scores stay in the cache; with the causal mask
 * only keys up to the last of these rows are read. The keys that heads share are prepared once.
 *
 * Matrices are copied to scratch, their rows and columns padded with zeros to a multiple of WIDE, so that the
 * product has no rest to care for. Registers hold TALL x WIDE of its result: 16 of AVX-512's 32.
 */
enum { QUERIES = 32, WIDE = 32, TALL = 8 };

#if defined __x86_64__ && defined __gnu_linux__ && !defined BASELINE_ONLY
#define WIDE_VECTORS __attribute__((target("arch=x86-64-v4")))
/* Sixteen floats; "aligned" as rows of other widths are. */
typedef float vector __attribute__((vector_size(64), aligned(4), may_alias));

/* Whether this machine can run what follows: attention with narrower vectors is left to PyTorch. */
int64_t has_attention(void) { return __builtin_cpu_supports("x86-64-v4") != 0; }

/*
 * c (rows, columns) = or += a (rows, inner) b (inner, columns), where a's elements lie a_row and a_inner apart.
 * rows are a multiple of TALL, columns of WIDE.
 */
WIDE_VECTORS static void multiply(
    int64_t rows, int64_t inner, int64_t columns, const float *a, int64_t a_row, int64_t a_inner, const float *b,
    int64_t b_row, float *c, int64_t c_row, int is_added)
{
    for (int64_t column = 0; column < columns; column += WIDE)
        for (int64_t row = 0; row < rows; row += TALL) {
            vector sums[TALL][2] = {{{0}}};
            const float *from_a = a + row * a_row, *from_b = b + column;
            float *to = c + row * c_row + column;
            for (int64_t k = 0; k < inner; k++) {
                vector left = *(const vector *)(from_b + k * b_row);
                vector right = *(const vector *)(from_b + k * b_row + 16);
#pragma GCC unroll 8
                for (int r = 0; r < TALL; r++) {
                    float factor = from_a[r * a_row + k * a_inner];
                    sums[r][0] += factor * left;
                    sums[r][1] += factor * right;
                }
            }
#pragma GCC unroll 8
            for (int r = 0; r < TALL; r++) {
                vector *left = (vector *)(to + r * c_row), *right = (vector *)(to + r * c_row + 16);
                if (is_added) {
                    sums[r][0] += *left;
                    sums[r][1] += *right;
                }
                *left = sums[r][0];
                *right = sums[r][1];
            }
        }
}

/* Where the heads of a tensor (tokens, batch, heads, channels) are; channels are adjacent. */
struct heads {
    float *data;
    int64_t token, batch, head; /* strides */
};

struct attention {
    int64_t tokens, keys, batch, heads, groups, channels, is_causal, threads, scratch_size;
    double scale;
    struct heads query, key, value, out, dout, dquery, dkey, dvalue;
    float *log_sums; /* (batch, heads, tokens): of exp(score) */
    float *scratch;  /* (threads, scratch_size) */
};

INLINE int64_t padded(int64_t n) { return (n + WIDE - 1) / WIDE * WIDE; }

INLINE float *head_of(const struct heads *from, int64_t b, int64_t head)
{
    return from->data + b * from->batch + head * from->head;
}

/* `n` tokens from `first` on into rows of `to`, or with `columns` into columns; the rest of it is zero. */
WIDE_VECTORS static void gather(
    const struct heads *from, int64_t b, int64_t head, int64_t first, int64_t n, int64_t channels, float *to,
    int64_t rows, int64_t columns, int as_columns)
{
    const float *data = head_of(from, b, head) + first * from->token;
    memset(to, 0, rows * columns * sizeof *to);
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < channels; d++)
            to[as_columns ? d * columns + i : i * columns + d] = data[i * from->token + d];
}

WIDE_VECTORS static void scatter(
    const struct heads *into, int64_t b, int64_t head, int64_t first, int64_t n, int64_t channels, const float *from,
    int64_t columns)
{
    float *data = head_of(into, b, head) + first * into->token;
    for (int64_t i = 0; i < n; i++)
        for (int64_t d = 0; d < channels; d++)
            data[i * into->token + d] = from[i * columns + d];
}

/* Keys that the query sees, and those that any of the block from `first` on sees, padded. */
INLINE int64_t seen(const struct attention *a, int64_t query) { return a->is_causal ? query + 1 : a->keys; }

INLINE int64_t seen_by_block(const struct attention *a, int64_t first)
{
    int64_t last = first + QUERIES < a->tokens ? first + QUERIES : a->tokens;
    return padded(seen(a, last - 1));
}

/* Scores become exp(score - max); the sum is returned, and the max put at `max`. */
WIDE_VECTORS static float exponentials(float *scores, int64_t seen, int64_t all, float scale, float *max)
{
    float most = -INFINITY, sum = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < seen; j++)
        most = scores[j] > most ? scores[j] : most;
    most *= scale;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < seen; j++) {
        scores[j] = exp_of_negative(scores[j] * scale - most);
        sum += scores[j];
    }
    memset(scores + seen, 0, (all - seen) * sizeof *scores);
    *max = most;
    return sum;
}

/* All queries of the heads that share the keys of one group. */
WIDE_VECTORS static void attend_group(const struct attention *a, int64_t b, int64_t group, float *scratch)
{
    int64_t wide = padded(a->channels), keys = padded(a->keys), shared = a->heads / a->groups;
    float *key = scratch, *value = key + wide * keys, *query = value + wide * keys;
    float *out = query + QUERIES * wide, *scores = out + QUERIES * wide;
    gather(&a->key, b, group, 0, a->keys, a->channels, key, wide, keys, 1);
    gather(&a->value, b, group, 0, a->keys, a->channels, value, keys, wide, 0);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t first = 0; first < a->tokens; first += QUERIES) {
            int64_t n = a->tokens - first < QUERIES ? a->tokens - first : QUERIES, all = seen_by_block(a, first);
            float *log_sums = a->log_sums + (b * a->heads + head) * a->tokens + first, over_sum[QUERIES];
            gather(&a->query, b, head, first, n, a->channels, query, QUERIES, wide, 0);
            multiply(QUERIES, a->channels, all, query, wide, 1, key, keys, scores, keys, 0);
            for (int64_t i = 0; i < n; i++) {
                float max, sum = exponentials(scores + i * keys, seen(a, first + i), all, (float)a->scale, &max);
                log_sums[i] = logf(sum) + max;
                over_sum[i] = 1.0f / sum;
            }
            multiply(QUERIES, all, wide, scores, keys, 1, value, wide, out, wide, 0);
            for (int64_t i = 0; i < n; i++)
                for (int64_t d = 0; d < wide; d++)
                    out[i * wide + d] *= over_sum[i];
            scatter(&a->out, b, head, first, n, a->channels, out, wide);
        }
}

/* Row i of scores becomes probabilities, that of their gradients the gradient of the scores. */
WIDE_VECTORS static void backward_row(
    const float *dout, const float *out, int64_t wide, int64_t seen, int64_t all, float scale, float log_sum,
    float *p, float *ds)
{
    float along = 0;
#pragma omp simd reduction(+ : along)
    for (int64_t d = 0; d < wide; d++)
        along += dout[d] * out[d];
#pragma omp simd
    for (int64_t j = 0; j < seen; j++) {
        float exponent = p[j] * scale - log_sum; /* rounded, it may be a little above 0 */
        p[j] = exp_of_negative(exponent > 0 ? 0.0f : exponent);
        ds[j] = p[j] * (ds[j] - along) * scale;
    }
    memset(p + seen, 0, (all - seen) * sizeof *p);
    memset(ds + seen, 0, (all - seen) * sizeof *ds);
}

WIDE_VECTORS static void attend_group_backward(const struct attention *a, int64_t b, int64_t group, float *scratch)
{
    int64_t wide = padded(a->channels), keys = padded(a->keys), shared = a->heads / a->groups, size = wide * keys;
    float *key = scratch, *key_columns = key + size, *value_columns = key_columns + size;
    float *dkey = value_columns + size, *dvalue = dkey + size, *query = dvalue + size;
    float *dout = query + QUERIES * wide, *dquery = dout + QUERIES * wide, *p = dquery + QUERIES * wide;
    float *ds = p + QUERIES * keys;
    gather(&a->key, b, group, 0, a->keys, a->channels, key, keys, wide, 0);
    gather(&a->key, b, group, 0, a->keys, a->channels, key_columns, wide, keys, 1);
    gather(&a->value, b, group, 0, a->keys, a->channels, value_columns, wide, keys, 1);
    memset(dkey, 0, 2 * size * sizeof *dkey);
    for (int64_t head = group * shared; head < (group + 1) * shared; head++)
        for (int64_t first = 0; first < a->tokens; first += QUERIES) {
            int64_t n = a->tokens - first < QUERIES ? a->tokens - first : QUERIES, all = seen_by_block(a, first);
            const float *log_sums = a->log_sums + (b * a->heads + head) * a->tokens + first;
            float *out = dquery; /* until dquery is computed */
            gather(&a->query, b, head, first, n, a->channels, query, QUERIES, wide, 0);
            gather(&a->out, b, head, first, n, a->channels, out, QUERIES, wide, 0);
            gather(&a->dout, b, head, first, n, a->channels, dout, QUERIES, wide, 0);
            multiply(QUERIES, a->channels, all, query, wide, 1, key_columns, keys, p, keys, 0);
            multiply(QUERIES, a->channels, all, dout, wide, 1, value_columns, keys, ds, keys, 0);
            for (int64_t i = 0; i < n; i++)
                backward_row(
                    dout + i * wide, out + i * wide, wide, seen(a, first + i), all, (float)a->scale,
                    log_sums[i], p + i * keys, ds + i * keys);
            multiply(QUERIES, all, wide, ds, keys, 1, key, wide, dquery, wide, 0);
            scatter(&a->dquery, b, head, first, n, a->channels, dquery, wide);
            multiply(all, n, wide, ds, 1, keys, query, wide, dkey, wide, 1);
            multiply(all, n, wide, p, 1, keys, dout, wide, dvalue, wide, 1);
        }
    scatter(&a->dkey, b, group, 0, a->keys, a->channels, dkey, wide);
    scatter(&a->dvalue, b, group, 0, a->keys, a->channels, dvalue, wide);
}

/* Floats of scratch that a thread needs. */
int64_t attention_scratch(int64_t keys, int64_t channels)
{
    int64_t wide = padded(channels), rows = padded(keys);
    return 5 * wide * rows + 3 * QUERIES * wide + 2 * QUERIES * rows;
}

/* Every thread takes groups of one sequence each. `dout.data` is NULL in forward. */
void attention(const struct attention *a)
{
#pragma omp parallel for schedule(static) num_threads(a->threads)
    for (int64_t i = 0; i < a->batch * a->groups; i++) {
        float *scratch = a->scratch + omp_get_thread_num() * a->scratch_size;
        (a->dout.data ? attend_group_backward : attend_group)(a, i / a->groups, i % a->groups, scratch);
    }
}
#else
int64_t has_attention(void) { return 0; }
int64_t attention_scratch(int64_t keys, int64_t channels) { return 0 * (keys + channels); }
#endif

/* Of this file, by which the caller knows that it has the library of the same version. */
uint32_t source_crc32(void) { return SOURCE_CRC32; }
