/* Attention within one text: every query sees all of its tokens; texts lie one after another, without padding. */

#include <math.h>

#include "tall.h"

/* turned [dim][ld] = k [count][dim] transposed, zeros behind; dim and ld are multiples of 16. */
INLINE void turn_keys(lines k, long count, long ld, long dim, float *turned) {
    for (long c = 0; c < ld; c += LANES)
        for (long i = 0; i < dim; i += LANES) {
            vec v[LANES];
            for (int j = 0; j < LANES; j++) v[j] = c + j < count ? load(k.at + (c + j) * k.ld + i) : (vec){0};
            turn(v);
            for (int j = 0; j < LANES; j++) store(turned + (i + j) * ld + c, v[j]);
        }
}

#define EACH_QUERY _Pragma("GCC unroll 8") for (int t = 0; t < n; t++)
#define EACH_VEC _Pragma("GCC unroll 2") for (int u = 0; u < vecs; u++)

/* y [n, ...] columns c .. c + 16 vecs - 1 = x [n, count] times so many columns of w [count, ldw]. */
INLINE void times(int n, int vecs, const float *x, long ldx, const float *w, long ldw, long count, const float *factor,
                  float *y, long ldy) {
    vec sum[QUERIES * 2], some[2];
    EACH_QUERY EACH_VEC sum[t * vecs + u] = (vec){0};
    for (long i = 0; i < count; i++) {
        EACH_VEC some[u] = load(w + i * ldw + u * LANES);
        EACH_QUERY {
            float v = x[t * ldx + i];
            EACH_VEC sum[t * vecs + u] += some[u] * v;
        }
    }
    EACH_QUERY EACH_VEC store(y + t * ldy + u * LANES, sum[t * vecs + u] * factor[t]);
}

INLINE void all_times(int n, const float *x, long ldx, const float *w, long ldw, long count, long columns,
                      const float *factor, float *y, long ldy) {
    long c = 0;
    for (; c + 2 * LANES <= columns; c += 2 * LANES) times(n, 2, x, ldx, w + c, ldw, count, factor, y + c, ldy);
    if (c < columns) times(n, 1, x, ldx, w + c, ldw, count, factor, y + c, ldy);
}

/* s [ld] becomes e^(s - its largest), of the first `count`; returns one over the sum. */
INLINE float soften(float *s, long count, long ld) {
    for (long c = count; c < ld; c++) s[c] = -INFINITY;
    vec most = load(s), sum = {0};
    for (long c = LANES; c < ld; c += LANES) most = greater(load(s + c), most);
    float peak = largest(most);
    for (long c = 0; c < ld; c += LANES) {
        vec weight = power_of_two((load(s + c) - peak) * 1.44269504f);
        store(s + c, weight);
        sum += weight;
    }
    return 1 / total(sum);
}

INLINE void attend(int n, const attention *how, lines q, const float *turned, long ld, lines v, long count, float *s,
                   lines out) {
    float factor[QUERIES];
    for (int t = 0; t < n; t++) factor[t] = how->scaling;
    all_times(n, q.at, q.ld, turned, ld, how->dim, ld, factor, s, ld);
    for (int t = 0; t < n; t++) factor[t] = soften(s + t * ld, count, ld);
    all_times(n, s, ld, v.at, v.ld, count, how->dim, factor, out.at, out.ld);
}

#define CASE(N) case N: attend(N, how, q, turned, ld, v, count, s, out); break;
static void some_queries(long n, const attention *how, lines q, const float *turned, long ld, lines v, long count,
                         float *s, lines out) {
    switch (n) {
        CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7)
    default: attend(8, how, q, turned, ld, v, count, s, out);
    }
}

void ragged_work(team of, const attention *how, lines q, lines k, lines v, long queries, long count, float *room,
                 lines out) {
    long ld = (count + LANES - 1) / LANES * LANES, parts = (queries + QUERIES - 1) / QUERIES;
    for (long head = of.me; head < how->heads; head += of.size) {
        long at = head * how->dim;
        turn_keys((lines){k.at + at, k.ld}, count, ld, how->dim, room);
        for (long i = 0; i < parts; i++) {
            long begin = queries * i / parts, end = queries * (i + 1) / parts;
            some_queries(end - begin, how, (lines){q.at + begin * q.ld + at, q.ld}, room, ld, (lines){v.at + at, v.ld},
                         count, room + how->dim * ld, (lines){out.at + begin * out.ld + at, out.ld});
        }
    }
}
