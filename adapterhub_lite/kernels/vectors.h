/* Sixteen floats at a time, in gcc's vector extension: any processor, one instruction where it has AVX-512. */

#ifndef AHL_VECTORS_H
#define AHL_VECTORS_H

#include <stdint.h>
#include <string.h>

#define INLINE static inline __attribute__((always_inline))
#define LANES 16

typedef float vec __attribute__((vector_size(64), aligned(4)));
typedef uint32_t bits __attribute__((vector_size(64), aligned(4)));
typedef int32_t ints __attribute__((vector_size(64), aligned(4)));

#ifdef __AVX512F__ /* gcc takes the general forms of these apart into single numbers */
#include <immintrin.h>
INLINE ints widen_unsigned(const char *p) { return (ints)_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE ints widen_signed(const char *p) { return (ints)_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)); }
INLINE vec to_float(ints v) { return (vec)_mm512_cvtepi32_ps((__m512i)v); }
INLINE float total(vec v) { return _mm512_reduce_add_ps((__m512)v); }
INLINE float largest(vec v) { return _mm512_reduce_max_ps((__m512)v); }
INLINE vec rounded(vec v) { return (vec)_mm512_roundscale_ps((__m512)v, 8); }
#else
#include <math.h>
typedef int8_t signed16 __attribute__((vector_size(16), aligned(1)));
typedef uint8_t unsigned16 __attribute__((vector_size(16), aligned(1)));
INLINE ints widen_unsigned(const char *p) { return __builtin_convertvector(*(const unsigned16 *)p, ints); }
INLINE ints widen_signed(const char *p) { return __builtin_convertvector(*(const signed16 *)p, ints); }
INLINE vec to_float(ints v) { return __builtin_convertvector(v, vec); }
INLINE float total(vec v) {
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += v[i];
    return sum;
}
INLINE float largest(vec v) {
    float most = v[0];
    for (int i = 1; i < LANES; i++) most = v[i] > most ? v[i] : most;
    return most;
}
INLINE vec rounded(vec v) {
    for (int i = 0; i < LANES; i++) v[i] = rintf(v[i]);
    return v;
}
#endif

INLINE vec load(const float *p) { return *(const vec *)p; }
INLINE void store(float *p, vec v) { *(vec *)p = v; }
INLINE vec all(float v) { return (vec){v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v}; }

INLINE vec greater(vec a, vec b) {
    ints first = a > b;
    return (vec)(((ints)a & first) | ((ints)b & ~first));
}

/* The first `count` of 16 values, the others `rest`. */
INLINE vec load_part(const float *p, long count, float rest) {
    vec v = all(rest);
    memcpy(&v, p, count * sizeof(float));
    return v;
}

/* Where each number of a round's two lines comes from: those of the first line, then of the second. In memory, since
   compilers build such constants anew, number by number. */
static const ints TURNS[4][2] = {
    {{0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23},
     {8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31}},
    {{0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27},
     {4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31}},
    {{0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29},
     {2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31}},
    {{0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30},
     {1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31}},
};

/* v becomes its transpose: in four rounds, blocks of 8, 4, 2 and 1 change places. */
INLINE void turn(vec *v) {
#pragma GCC unroll 4
    for (int round = 0, d = 8; round < 4; round++, d /= 2) {
        ints low = TURNS[round][0], high = TURNS[round][1];
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & d)) {
                vec a = v[i], b = v[i + d];
                v[i] = __builtin_shuffle(a, b, low);
                v[i + d] = __builtin_shuffle(a, b, high);
            }
    }
}

/* e^v, to within 2 units in the last place; below -87 it is 0, above 88 infinity, and NaN stays NaN.
   v = n ln 2 + r with |r| <= ln 2 / 2; e^r by its series to the 7th power (Cody and Waite's reduction). */
INLINE vec exponential(vec v) {
    vec n = rounded(v * 1.44269504f);
    vec r = v - n * 0.693145752f - n * 1.42860677e-6f;
    vec sum = all(1.0f / 5040);
    sum = sum * r + 1.0f / 720;
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    ints small = v < -87.0f, large = v > 88.0f, odd = v != v;
    n = (vec)((ints)n & ~(small | large | odd));
    ints power = __builtin_convertvector(n, ints);
    vec result = sum * (vec)((power + 127) << 23);
    result = (vec)((ints)result & ~small);
    result = (vec)(((ints)result & ~large) | ((ints)all(__builtin_inff()) & large));
    return (vec)(((ints)result & ~odd) | ((ints)v & odd));
}

#endif
