/* Small dense products out of the first caches, for attention: c [rows, 16 vecs] (+)= a b.

   The sums of 6 rows and 64 columns stay in registers while b is read sixteen numbers at a time and a number by number,
   so that a may lie in any order, also transposed. A sum has one order, that of its terms, wherever blocks begin. */

#ifndef AHL_PANELS_H
#define AHL_PANELS_H

#include "vectors.h"

#define HIGH 6
#ifdef __AVX512F__
#define ACROSS 4
#else
#define ACROSS 1 /* as many sums as smaller registers hold */
#endif

/* a: term i of row r lies at r * row + i * term. */
typedef struct {
    const float *at;
    long row, term;
} operand;

INLINE void panel(operand a, const float *b, long ldb, long terms, float *c, long ldc, int fresh, int rows, int vecs) {
    vec sum[HIGH * ACROSS];
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) sum[r * vecs + v] = fresh ? (vec){0} : load(c + r * ldc + v * LANES);
    for (long i = 0; i < terms; i++, b += ldb, a.at += a.term) {
        vec line[ACROSS];
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) line[v] = load(b + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < rows; r++) {
            vec factor = all(a.at[r * a.row]);
#pragma GCC unroll 4
            for (int v = 0; v < vecs; v++) sum[r * vecs + v] += line[v] * factor;
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; r++)
#pragma GCC unroll 4
        for (int v = 0; v < vecs; v++) store(c + r * ldc + v * LANES, sum[r * vecs + v]);
}

#define PANEL(R, V)                                                                                                    \
    static void panel_##R##_##V(operand a, const float *b, long ldb, long terms, float *c, long ldc, int fresh) {      \
        if (fresh)                                                                                                     \
            panel(a, b, ldb, terms, c, ldc, 1, R, V);                                                                  \
        else                                                                                                           \
            panel(a, b, ldb, terms, c, ldc, 0, R, V);                                                                  \
    }
#define PANELS(V) PANEL(1, V) PANEL(2, V) PANEL(3, V) PANEL(4, V) PANEL(5, V) PANEL(6, V)
#define NAMES(V) {panel_1_##V, panel_2_##V, panel_3_##V, panel_4_##V, panel_5_##V, panel_6_##V}

typedef void (*panel_of)(operand, const float *, long, long, float *, long, int);
PANELS(1)
#if ACROSS == 4
PANELS(2)
PANELS(3)
PANELS(4)
static const panel_of PANEL_OF[ACROSS][HIGH] = {NAMES(1), NAMES(2), NAMES(3), NAMES(4)};
#else
static const panel_of PANEL_OF[ACROSS][HIGH] = {NAMES(1)};
#endif

/* At most HIGH rows, any number of columns. */
INLINE void strip_times(operand a, const float *b, long ldb, long rows, long vecs, long terms, float *c, long ldc,
                        int fresh) {
    for (long v = 0; v < vecs; v += ACROSS) {
        long across = vecs - v < ACROSS ? vecs - v : ACROSS;
        PANEL_OF[across - 1][rows - 1](a, b + v * LANES, ldb, terms, c + v * LANES, ldc, fresh);
    }
}

#endif
