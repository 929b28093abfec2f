/* What is done to one row of tokens: norms and their backward, dropout, activations and their slopes. */

#ifndef AHL_TRAINING_ROWS_H
#define AHL_TRAINING_ROWS_H

#include <math.h>

#include "training.h"

/* sum = x + delta, of which dropout (of this line) leaves a part. */
INLINE void add_row(const float *x, const float *delta, const dropout *by, long line, long width, float *sum) {
    uint32_t word = by->keys ? word_of(by, line) : 0;
    for (long i = 0; i < width; i += LANES) {
        vec v = take(delta, i, width);
        if (by->keys) v *= kept_columns(by, word, i);
        put(sum, i, width, take(x, i, width) + v);
    }
}

/* out = x times what dropout leaves of this line. */
INLINE void drop_row(const dropout *by, long line, const float *x, long width, float *out) {
    uint32_t word = word_of(by, line);
    for (long i = 0; i < width; i += LANES) put(out, i, width, take(x, i, width) * kept_columns(by, word, i));
}

INLINE float mean_of(const float *x, long width) {
    vec sum = {0};
    for (long i = 0; i < width; i += LANES) sum += take(x, i, width);
    return total(sum) / width;
}

INLINE float inverse_of(const float *x, float mean, long width, float eps) {
    vec squares = {0};
    long i = 0;
    for (; i + LANES <= width; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float rest = 0;
    for (; i < width; i++) rest += (x[i] - mean) * (x[i] - mean);
    return 1 / sqrtf((total(squares) + rest) / width + eps);
}

/* out = (x - mean) * inverse * weight + bias; mean none: 0; bias may be none. */
INLINE void norm_row(const float *x, const float *weight, const float *bias, long width, float eps, float *mean,
                     float *inverse, float *out) {
    float shift = mean ? mean_of(x, width) : 0, scale = inverse_of(x, shift, width, eps);
    if (mean) *mean = shift;
    *inverse = scale;
    for (long i = 0; i < width; i += LANES) {
        vec v = (take(x, i, width) - shift) * scale * take(weight, i, width);
        if (bias) v += take(bias, i, width);
        put(out, i, width, v);
    }
}

/* grad_x (+)= scale * (g - mean(g) - y * mean(g * y)), g = grad * weight, y the normed row; mean none: without mean(g).
   grad_x may be grad. */
INLINE void norm_row_back(const float *grad, const float *x, const float *weight, const float *mean, float scale,
                          long width, int add, float *grad_x) {
    float shift = mean ? *mean : 0;
    vec sums = {0}, products = {0};
    for (long i = 0; i < width; i += LANES) {
        vec v = take(grad, i, width) * take(weight, i, width);
        sums += v;
        products += v * ((take(x, i, width) - shift) * scale);
    }
    float sum = mean ? total(sums) / width : 0, product = total(products) / width;
    for (long i = 0; i < width; i += LANES) {
        vec y = (take(x, i, width) - shift) * scale;
        vec v = scale * (take(grad, i, width) * take(weight, i, width) - sum - y * product);
        if (add) v += take(grad_x, i, width);
        put(grad_x, i, width, v);
    }
}

enum { IS_SILU, IS_GELU, IS_GELU_TANH, IS_RELU };

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
    if (kind == IS_RELU) {
        ints above = x > 0, odd = x != x;
        *value = (vec)((ints)x & (above | odd));
        *slope = (vec)((ints)all(1) & above);
    } else if (kind == IS_GELU) {
        vec bell = exponential_down(-0.5f * x * x), below = normal_below(x, bell);
        *value = x * below;
        *slope = below + x * bell * 0.39894228f;
    } else {
        vec inner = kind == IS_SILU ? x : x * (1.59576912f + 0.0713548163f * x * x);
        vec steep = kind == IS_SILU ? all(1) : 1.59576912f + 0.214064449f * x * x;
        vec sigmoid = 1 / (1 + exponential(-inner));
        *value = x * sigmoid;
        *slope = sigmoid + *value * (1 - sigmoid) * steep;
    }
}

/* out = activation(x), or with grad: grad times the activation's slope at x. out may be x or grad. */
INLINE void activate_row(int kind, const float *x, const float *grad, long n, float *out) {
    for (long i = 0; i < n; i += LANES) {
        vec value, slope;
        activate(kind, take(x, i, n), &value, &slope);
        put(out, i, n, grad ? take(grad, i, n) * slope : value);
    }
}

#endif
