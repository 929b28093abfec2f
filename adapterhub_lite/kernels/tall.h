/* Products of many rows with a frozen matrix, and what follows each: for the blocks of an encoder (see tall.c). */

#ifndef AHL_TALL_H
#define AHL_TALL_H

#include "vectors.h"
#include "work.h"

/* The threads that compute one block together, all those of a parallel region or one alone; `me` of `size`. */
typedef struct {
    long me, size;
} team;

INLINE void meet(team of) {
    if (of.size > 1) {
#pragma omp barrier
    }
}

/* Of `count` things, those of one member of the team begin here and end where those of the next begin. */
INLINE long share(long count, long me, team of) { return count * me / of.size; }

/* Neighbouring rows of one adapter that are computed together, at most PIECE of them; owner -1: none. */
#define PIECE 8
typedef struct {
    const tile *all;
    long count;
} pieces;

/* What the adapters do at one site: changes [owner * stride]. */
typedef struct {
    const change *changes;
    long stride;
} site;

/* Rows that stand `ld` floats apart. */
typedef struct {
    float *at;
    long ld;
} lines;

INLINE lines from(lines of, long row) { return (lines){of.at + row * of.ld, of.ld}; }

enum { NO_ACT, GELU, RELU };

/* How a product's weights lie: in panels (see tall.c), or as a module has them, a line an output or an input. */
enum { LAID, OUTPUT_LINES, INPUT_LINES };

/* low [rows, R] = x times the down matrices of each row's adapter. */
void low_work(team of, pieces rows, site at, lines x, long k, lines low);

/* y [rows, n] = act(x W^T + bias and what each row's adapter changes of it, as member `number` of the site). */
void tall_work(team of, const product *w, pieces rows, site at, long number, lines x, lines low, int act, lines y);

/* y = or, with `add`, += x W^T + bias and what member 0 changes of it; nothing where the site has no changes. */
void tall_sum(team of, const product *w, pieces rows, site at, lines x, lines low, int add, lines y);

/* The larger, the smaller of v and a number; NaN stays NaN. */
#ifdef __AVX512F__
INLINE vec at_least(vec v, float low) { return (vec)_mm512_max_ps((__m512)all(low), (__m512)v); }
INLINE vec at_most(vec v, float high) { return (vec)_mm512_min_ps((__m512)all(high), (__m512)v); }
#else
INLINE vec at_least(vec v, float low) { return greater(all(low), v); }
INLINE vec at_most(vec v, float high) { return -greater(all(-high), -v); }
#endif

/* 2^v of v <= 0, of the precision of v; below -126 it is 2^-126. 2^r with |r| <= 1/2 by its series to the 7th power. */
INLINE vec power_of_two(vec v) {
    v = at_least(v, -126.0f);
    vec n = rounded(v), r = v - n, sum = all(1.52527338e-5f);
    sum = sum * r + 1.54035304e-4f;
    sum = sum * r + 1.33335581e-3f;
    sum = sum * r + 9.61812911e-3f;
    sum = sum * r + 5.55041087e-2f;
    sum = sum * r + 2.40226507e-1f;
    sum = sum * r + 6.93147181e-1f;
    sum = sum * r + 1.0f;
#ifdef __AVX512F__
    return (vec)_mm512_scalef_ps((__m512)sum, (__m512)n);
#else
    return sum * (vec)((__builtin_convertvector(at_least(n, -126.0f), ints) + 127) << 23);
#endif
}

/* Attention of the rows' heads: out [queries, heads * dim]; q, k, v lie side by side in qkv. `room` is this thread's own,
   (dim + QUERIES) * (count + LANES) floats. */
#define QUERIES 8
typedef struct {
    long heads, dim;
    float scaling;
} attention;
void ragged_work(team of, const attention *how, lines q, lines k, lines v, long queries, long count, float *room,
                 lines out);

/* The first `count` of 16 floats, zeros behind; nothing is read or written where count is 0 or less. */
#ifdef __AVX512F__
INLINE __mmask16 first(long count) { return count >= LANES ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }
INLINE vec load_some(const float *p, long count) { return (vec)_mm512_maskz_loadu_ps(first(count), p); }
INLINE void store_some(float *p, vec v, long count) { _mm512_mask_storeu_ps(p, first(count), (__m512)v); }
#else
INLINE vec load_some(const float *p, long count) {
    return count >= LANES ? load(p) : load_part(p, count > 0 ? count : 0, 0);
}
INLINE void store_some(float *p, vec v, long count) {
    if (count > 0) memcpy(p, &v, (count < LANES ? count : LANES) * sizeof(float));
}
#endif

#endif
