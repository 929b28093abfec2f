/* Low-rank parameters that learn: taken over for a step, and their gradients. */

#include "training_encoder.h"

/* to [columns, rows] = scale times the transpose of x [rows, columns]; or with `turned` 0, to [rows, columns]. */
static void copy_part(const float *x, long ldx, long rows, long columns, float scale, int turned, float *to, long ldt) {
    vec v[LANES];
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++) v[j] = j < rows ? load_some(x + j * ldx, columns) * scale : (vec){0};
    if (turned) turn(v);
    long count = turned ? columns : rows, width = turned ? rows : columns;
#pragma GCC unroll 16
    for (int j = 0; j < LANES; j++)
        if (j < count) store_some(to + j * ldt, v[j], width);
}

void read_work(team of, const trained_group *g, const long *outs, long in) {
    for (const trained *m = g->members; m < g->members + MEMBERS; m++) {
        if (!m->a) continue;
        long n = outs[m - g->members], parts = (in + LANES - 1) / LANES, end = share(parts, of.me + 1, of);
        for (long c = share(parts, of.me, of) * LANES; c < end * LANES && c < in; c += LANES)
            for (long r = 0; r < m->rank; r += LANES) {
                copy_part(m->a + r * in + c, in, m->rank - r, in - c, 1, 1, g->down + c * g->width + m->first + r,
                          g->width);
                copy_part(m->a + r * in + c, in, m->rank - r, in - c, m->scale, 0, g->lines + (m->first + r) * in + c,
                          in);
            }
        parts = (n + LANES - 1) / LANES;
        end = share(parts, of.me + 1, of);
        for (long c = share(parts, of.me, of) * LANES; c < end * LANES && c < n; c += LANES)
            for (long r = 0; r < m->rank; r += LANES)
                copy_part(m->b + c * m->rank + r, m->rank, n - c, m->rank - r, m->scale, 1, m->up + r * n + c, n);
    }
}

#define HIGH 8
#define VECS 3
#define EACH_LINE _Pragma("GCC unroll 8") for (int i = 0; i < high; i++)
#define EACH_VEC _Pragma("GCC unroll 3") for (int u = 0; u < vecs; u++)

/* `high` columns of left, up to `width` of right. */
INLINE void outer(int high, int vecs, lines left, lines right, long width, long rows, float scale, float *out,
                  long ldo) {
    vec sum[HIGH * VECS], some[VECS];
    EACH_LINE EACH_VEC sum[i * vecs + u] = (vec){0};
    for (long t = 0; t < rows; t++) {
        EACH_VEC some[u] = load_some(right.at + t * right.ld + u * LANES, width - u * LANES);
        EACH_LINE {
            float v = left.at[t * left.ld + i];
            EACH_VEC sum[i * vecs + u] += some[u] * v;
        }
    }
    EACH_LINE EACH_VEC {
        float *at = out + i * ldo + u * LANES;
        store_some(at, load_some(at, width - u * LANES) + sum[i * vecs + u] * scale, width - u * LANES);
    }
}

#define CASE(N)                                                                                                        \
    case N:                                                                                                            \
        if (width <= LANES) outer(N, 1, left, right, width, rows, scale, out, ldo);                                    \
        else outer(N, VECS, left, right, width, rows, scale, out, ldo);                                                \
        break;
static void outer_part(long high, lines left, lines right, long width, long rows, float scale, float *out, long ldo) {
    switch (high) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) CASE(8) }
}

void outer_work(team of, lines left, long m, lines right, long n, long rows, float scale, float *out) {
    long wide = VECS * LANES, across = (n + wide - 1) / wide, down = (m + HIGH - 1) / HIGH, parts = across * down;
    long end = share(parts, of.me + 1, of);
    for (long p = share(parts, of.me, of); p < end; p++) {
        long i = p % down * HIGH, j = p / down * wide, high = m - i < HIGH ? m - i : HIGH;
        outer_part(high, (lines){left.at + i, left.ld}, (lines){right.at + j, right.ld}, n - j < wide ? n - j : wide,
                   rows, scale, out + i * n + j, n);
    }
}
