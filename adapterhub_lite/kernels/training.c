/* The element-wise parts of a training step, forward and backward, in float32. Each line is one thread's, so that
   results do not depend on how many threads there are. */

#include "training_rows.h"

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
    long at = t * n->width;
    if (!n->delta) return n->x + at;
    add_row(n->x + at, n->delta + at, &n->drop, t, n->width, n->sum + at);
    return n->sum + at;
}

/* out = (x - mean) * inverse * weight + bias of x + delta (arXiv 1607.06450, 1910.07467). */
void ahl_norm(const norm *n, int threads) {
    long width = n->width;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < n->tokens; t++)
        norm_row(summed(n, t), n->weight, n->bias, width, n->eps, n->mean ? n->mean + t : 0, n->inverse + t,
                 n->out + t * width);
}

/* With g = grad_out * weight and y the normed row: grad_x (+)= inverse * (g - mean(g) - y * mean(g * y)), where mean(g)
   is left out if the norm subtracts no mean. grad_x may be grad_out. */
void ahl_norm_back(const float *grad_out, const float *x, const float *weight, const float *mean, const float *inverse,
                   float *grad_x, long tokens, long width, int add, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long t = 0; t < tokens; t++) {
        long at = t * width;
        norm_row_back(grad_out + at, x + at, weight, mean ? mean + t : 0, inverse[t], width, add, grad_x + at);
    }
}

#define BY_KIND(CALL)                                                                                                  \
    switch (kind) {                                                                                                    \
    case IS_SILU: CALL(IS_SILU); break;                                                                                \
    case IS_GELU: CALL(IS_GELU); break;                                                                                \
    case IS_GELU_TANH: CALL(IS_GELU_TANH); break;                                                                      \
    default: CALL(IS_RELU);                                                                                            \
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
    for (long t = 0; t < tokens; t++) drop_row(by, t, x + t * width, width, out + t * width);
}
