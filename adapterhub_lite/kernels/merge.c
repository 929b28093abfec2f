/* A frozen matrix with what adapters add to it, rounded once: target = source + (left right) factor + ...

   Each sum is formed as torch's float32 product forms it, from the first rank to the last, then multiplied by its factor,
   then added: three roundings in that order, so that the bits are those of W + (B @ A) * s. Contraction of a product and a
   sum into one rounding is off in this file; the sums over the rank ask for it themselves. */

#pragma GCC optimize("fp-contract=off")

#include "vectors.h"

#define ROWS 6
#define VECS 4
#define WIDE (VECS * LANES)
#define PANEL 512 /* columns of the right matrices that stay in the caches for all rows */

#define EACH_ROW _Pragma("GCC unroll 6") for (int t = 0; t < rows; t++)
#define EACH_VEC _Pragma("GCC unroll 4") for (int u = 0; u < vecs; u++)

enum { FLOAT32, BFLOAT16, FLOAT16 };

/* left [rows, rank], right [rank, columns] */
typedef struct {
    const float *left, *right;
    long rank;
    float factor;
} addition;

/* source and target: [rows, columns], each in one of the formats; they may be the same memory if the format is the same. */
typedef struct {
    const char *source;
    char *target;
    long rows, columns, from, to;
    const addition *additions;
    long count;
} merge;

typedef uint16_t shorts __attribute__((vector_size(32), aligned(2)));

INLINE vec multiply_add(vec a, vec b, vec c) {
#ifdef __AVX512F__
    return (vec)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    for (int i = 0; i < LANES; i++) c[i] = __builtin_fmaf(a[i], b[i], c[i]);
    return c;
#else
    return a * b + c;
#endif
}

INLINE vec widened(shorts v, long format) {
#ifdef __AVX512F__
    if (format == FLOAT16) return (vec)_mm512_cvtph_ps((__m256i)v);
#endif
    return (vec)(__builtin_convertvector(v, bits) << 16);
}

/* To the nearest, ties to even. NaN may become another number: the caller looks for it before. */
INLINE shorts narrowed(vec v, long format) {
#ifdef __AVX512F__
    if (format == FLOAT16) return (shorts)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#endif
    bits b = (bits)v;
    return __builtin_convertvector((b + 0x7fff + ((b >> 16) & 1)) >> 16, shorts);
}

INLINE vec fetch(const merge *m, long place, int count) {
    if (m->from == FLOAT32) {
        const float *p = (const float *)m->source + place;
        return count == LANES ? load(p) : load_part(p, count, 0);
    }
    const uint16_t *p = (const uint16_t *)m->source + place;
    shorts v = {0};
    if (count == LANES) v = *(const shorts *)p;
    else memcpy(&v, p, count * sizeof(uint16_t));
    return widened(v, m->from);
}

/* Returns zeros, or NaN where a value is not finite, before or after it is rounded. */
INLINE vec put(const merge *m, long place, vec v, int count) {
    vec odd = v * 0.0f;
    if (m->to == FLOAT32) {
        memcpy((float *)m->target + place, &v, count * sizeof(float));
        return odd;
    }
    shorts s = narrowed(v, m->to);
    memcpy((uint16_t *)m->target + place, &s, count * sizeof(uint16_t));
    return odd + widened(s, m->to) * 0.0f;
}

/* sum = left right, at `rows` rows and `vecs` times 16 columns from (row, column) on; of the last 16 only `count`. */
INLINE void sum_up(const merge *m, const addition *a, long row, long column, const int rows, const int vecs,
                   const int count, vec sum[ROWS][VECS]) {
    const float *left = a->left + row * a->rank, *right = a->right + column;
    EACH_ROW EACH_VEC sum[t][u] = (vec){0};
    for (long k = 0; k < a->rank; k++, right += m->columns) {
        vec factors[VECS];
        EACH_VEC factors[u] = count == LANES ? load(right + u * LANES) : load_part(right, count, 0);
        EACH_ROW {
            vec one = all(left[t * a->rank + k]);
            EACH_VEC sum[t][u] = multiply_add(one, factors[u], sum[t][u]);
        }
    }
    EACH_ROW EACH_VEC sum[t][u] = sum[t][u] * a->factor;
}

/* The frozen values come after the first sum, so that one sum and no more is in registers. */
INLINE vec tile(const merge *m, long row, long column, const int rows, const int vecs, const int count) {
    vec whole[ROWS][VECS], sum[ROWS][VECS], odd = {0};
    const addition *a = m->additions, *end = a + m->count;
    if (a < end) {
        sum_up(m, a++, row, column, rows, vecs, count, sum);
        EACH_ROW EACH_VEC whole[t][u] = fetch(m, (row + t) * m->columns + column + u * LANES, count) + sum[t][u];
    } else
        EACH_ROW EACH_VEC whole[t][u] = fetch(m, (row + t) * m->columns + column + u * LANES, count);
    for (; a < end; a++) {
        sum_up(m, a, row, column, rows, vecs, count, sum);
        EACH_ROW EACH_VEC whole[t][u] = whole[t][u] + sum[t][u];
    }
    EACH_ROW EACH_VEC odd += put(m, (row + t) * m->columns + column + u * LANES, whole[t][u], count);
    return odd;
}

INLINE vec strip(const merge *m, long row, const int rows, long begin, long end) {
    vec odd = {0};
    long column = begin;
    for (; column + WIDE <= end; column += WIDE) odd += tile(m, row, column, rows, VECS, LANES);
    for (; column + LANES <= end; column += LANES) odd += tile(m, row, column, rows, 1, LANES);
    if (column < end) odd += tile(m, row, column, rows, 1, end - column);
    return odd;
}

/* 1 if all values of the target are finite, 0 if not, -1 where a format is not known here. */
int ahl_merge(const merge *m) {
#ifndef __AVX512F__
    if (m->from == FLOAT16 || m->to == FLOAT16) return -1;
#endif
    vec odd = {0};
    for (long begin = 0; begin < m->columns; begin += PANEL) {
        long end = begin + PANEL < m->columns ? begin + PANEL : m->columns, row = 0;
        for (; row + ROWS <= m->rows; row += ROWS) odd += strip(m, row, ROWS, begin, end);
        for (; row < m->rows; row++) odd += strip(m, row, 1, begin, end);
    }
    return total(odd) == 0.0f;
}
