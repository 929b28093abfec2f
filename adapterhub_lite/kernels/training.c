/* The element-wise parts of a training step, forward and backward, in float32. Each line is one thread's, so that
   results do not depend on how many threads there are. */

#include <math.h>

#include "training.h"

/* x, delta, sum, out, grad_out, grad_x: [tokens, width]; mean none: the norm is by the root of the mean square. */
typedef struct {
    const float *x, *delta, *weight, *bias;
    float *sum, *out, *mean, *inverse;
    long tokens, width;
    float eps;
    dropout drop;
} norm;

/* sum = x + delta, dropped where the norm says so; returns the row that is to be normed. */
INLINE const float *summed(const norm *n, long t) {
    long width = n->width, at = t * width;
    if (!n->delta) return n->x + at;
    uint32_t word = n->drop.keys ? word_of(&n->drop, t) : 0;
    for (long i = 0; i < width; i += LANES) {
        vec delta = take(n->delta + at, i, width);
        if (n->drop.keys) delta *= kept_columns(&n->drop, word, i);
        put(n->sum + at, i, width, take(n->x + at, i, width) + delta);
    }
    return n->sum + at;
}

static float mean_of(const float *x, long width) {
    vec sum = {0};
    for (long i = 0; i < width; i += LANES) sum += take(x, i, width);
    return total(sum) / width;
}

static float inverse_of(const float *x, float mean, long width, float eps) {
    vec squares = {0};
    long i = 0;
    for (; i + LANES <= width; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float rest = 0;
    for (; i < width; i++) rest += (x[i] - mean) * (x[i] - mean);
    return 1 / sqrtf((total(squares) + rest) / width + eps);
}

/* out = (x - mean) * inverse * weight + bias of x + delta (arXiv 1607.06450, 1910.07467). */
void ahl_norm(const norm *n, int threads) {
    long width = n->width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < n->tokens; t++) {
        const float *x = summed(n, t);
        float mean = n->mean ? mean_of(x, width) : 0, inverse = inverse_of(x, mean, width, n->eps);
        if (n->mean) n->mean[t] = mean;
        n->inverse[t] = inverse;
        for (long i = 0; i < width; i += LANES) {
            vec v = (take(x, i, width) - mean) * inverse * take(n->weight, i, width);
            if (n->bias) v += take(n->bias, i, width);
            put(n->out + t * width, i, width, v);
        }
    }
}

/* With g = grad_out * weight and y the normed row: grad_x (+)= inverse * (g - mean(g) - y * mean(g * y)), where mean(g)
   is left out if the norm subtracts no mean. grad_x may be grad_out. */
void ahl_norm_back(const float *grad_out, const float *x, const float *weight, const float *mean, const float *inverse,
                   float *grad_x, long tokens, long width, int add, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        const float *g = grad_out + t * width, *from = x + t * width;
        float shift = mean ? mean[t] : 0, scale = inverse[t];
        vec sums = {0}, products = {0};
        for (long i = 0; i < width; i += LANES) {
            vec v = take(g, i, width) * take(weight, i, width);
            sums += v;
            products += v * ((take(from, i, width) - shift) * scale);
        }
        float sum = mean ? total(sums) / width : 0, product = total(products) / width;
        for (long i = 0; i < width; i += LANES) {
            vec y = (take(from, i, width) - shift) * scale;
            vec v = scale * (take(g, i, width) * take(weight, i, width) - sum - y * product);
            if (add) v += take(grad_x + t * width, i, width);
            put(grad_x + t * width, i, width, v);
        }
    }
}

enum { SILU, GELU, GELU_TANH, RELU };

/* The probability that a normal value is below x (Abramowitz and Stegun 7.1.26, within 0.8e-7); bell: e^(-x^2 / 2). */
INLINE vec normal_below(vec x, vec bell) {
    vec size = (vec)((ints)x & 0x7fffffff), below = 1 + 0.2316418965f * size, t;
#ifdef __AVX512F__ /* twice as fast as a division */
    t = (vec)_mm512_rcp14_ps((__m512)below);
    t = t * (2 - below * t);
#else
    t = 1 / below;
#endif
    vec sum = t * 0.5307027145f - 0.7265760135f;
    sum = sum * t + 0.7107068705f;
    sum = sum * t - 0.142248368f;
    sum = sum * t + 0.127414796f;
    vec tail = sum * t * bell;
    ints above = x > 0;
    return (vec)(((ints)(1 - tail) & above) | ((ints)tail & ~above));
}

/* The activation's value and its slope. */
INLINE void activate(int kind, vec x, vec *value, vec *slope) {
    if (kind == RELU) {
        ints above = x > 0, odd = x != x;
        *value = (vec)((ints)x & (above | odd));
        *slope = (vec)((ints)all(1) & above);
    } else if (kind == GELU) {
        vec bell = exponential_down(-0.5f * x * x), below = normal_below(x, bell);
        *value = x * below;
        *slope = below + x * bell * 0.39894228f;
    } else {
        vec inner = kind == SILU ? x : x * (1.59576912f + 0.0713548163f * x * x);
        vec steep = kind == SILU ? all(1) : 1.59576912f + 0.214064449f * x * x;
        vec sigmoid = 1 / (1 + exponential(-inner));
        *value = x * sigmoid;
        *slope = sigmoid + *value * (1 - sigmoid) * steep;
    }
}

#define BY_KIND(CALL)                                                                                                  \
    switch (kind) {                                                                                                    \
    case SILU: CALL(SILU); break;                                                                                      \
    case GELU: CALL(GELU); break;                                                                                      \
    case GELU_TANH: CALL(GELU_TANH); break;                                                                            \
    default: CALL(RELU);                                                                                               \
    }

INLINE void gate_row(int kind, const float *both, long n, float *out) {
    for (long i = 0; i < n; i += LANES) {
        vec value, slope;
        activate(kind, take(both, i, n), &value, &slope);
        put(out, i, n, value * take(both + n, i, n));
    }
}

/* grad may be value, and grad_both may be both: all of a column is read before it is written. */
INLINE void gate_row_back(int kind, const float *both, const float *grad, long n, float *out, float *grad_both) {
    for (long i = 0; i < n; i += LANES) {
        vec value, slope, g = take(grad, i, n), up = take(both + n, i, n);
        activate(kind, take(both, i, n), &value, &slope);
        if (out) put(out, i, n, value * up);
        put(grad_both, i, n, g * up * slope);
        put(grad_both + n, i, n, g * value);
    }
}

/* out [tokens, n] = activation(gate) * up, where both [tokens, 2n] holds gate and then up (arXiv 2002.05202). */
void ahl_gated(int kind, const float *both, long tokens, long n, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
#define CALL(KIND) gate_row(KIND, both + t * 2 * n, n, out + t * n)
        BY_KIND(CALL)
#undef CALL
    }
}

/* out (or none): the forward's result again. */
void ahl_gated_back(int kind, const float *both, const float *grad, long tokens, long n, float *out, float *grad_both,
                    int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
#define CALL(KIND)                                                                                                     \
    gate_row_back(KIND, both + t * 2 * n, grad + t * n, n, out ? out + t * n : 0, grad_both + t * 2 * n)
        BY_KIND(CALL)
#undef CALL
    }
}

#define STRETCH 4096

INLINE void activate_row(int kind, const float *x, const float *grad, long n, float *out) {
    for (long i = 0; i < n; i += LANES) {
        vec value, slope;
        activate(kind, take(x, i, n), &value, &slope);
        put(out, i, n, grad ? take(grad, i, n) * slope : value);
    }
}

/* out [count] = activation(x), or with grad: grad times the activation's slope at x. out may be x or grad. */
void ahl_activate(int kind, const float *x, const float *grad, long count, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long at = 0; at < count; at += STRETCH) {
        long n = count - at < STRETCH ? count - at : STRETCH;
#define CALL(KIND) activate_row(KIND, x + at, grad ? grad + at : 0, n, out + at)
        BY_KIND(CALL)
#undef CALL
    }
}

/* Turn heads of x [tokens, heads, dim] in place, or back (arXiv 2104.09864, halves as Llama pairs them). cos, sin:
   [tokens, dim / 2]. */
void ahl_rotate(float *x, long row_stride, long head_stride, const float *cos, const float *sin, long tokens,
                long heads, long dim, int back, int threads) {
    long half = dim / 2;
    float sign = back ? -1 : 1;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++)
        for (long head = 0; head < heads; head++) {
            float *low = x + t * row_stride + head * head_stride, *high = low + half;
            for (long i = 0; i < half; i += LANES) {
                vec a = take(low, i, half), b = take(high, i, half);
                vec c = take(cos + t * half, i, half), s = take(sin + t * half, i, half) * sign;
                put(low, i, half, a * c - b * s);
                put(high, i, half, b * c + a * s);
            }
        }
}

/* out [tokens, width] = x times what dropout leaves of it; out may be x. */
void ahl_drop(const dropout *by, const float *x, long tokens, long width, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        uint32_t word = word_of(by, t);
        for (long i = 0; i < width; i += LANES)
            put(out + t * width, i, width, take(x + t * width, i, width) * kept_columns(by, word, i));
    }
}
