/* Low-rank changes of tokens that each have an adapter of their own, or none: y += (x down) up, in float32.

   Nothing is gathered or padded: an adapter brings the addresses of its matrices. Neighbouring tokens of one adapter read
   them together. */

#include "vectors.h"
#include "work.h"

#define CHUNK 64
#define AHEAD 4096

/* hidden [rows, ld] columns 0 .. 16 vecs - 1 = x times as many columns of down. */
INLINE void columns(const float *x, long k, int rows, int vecs, const float *down, long width, float *hidden, long ld) {
    vec sum[TILE * 4];
    for (int j = 0; j < rows * vecs; j++) sum[j] = (vec){0};
    for (long i = 0; i < k; i++) {
        const float *from = down + i * width;
        for (int v = 0; v < vecs; v++) {
            __builtin_prefetch(from + v * LANES + AHEAD / 4, 0, 2);
            vec a = load(from + v * LANES);
            for (int t = 0; t < rows; t++) sum[t * vecs + v] += a * x[t * k + i];
        }
    }
    for (int t = 0; t < rows; t++)
        for (int v = 0; v < vecs; v++) store(hidden + t * ld + v * LANES, sum[t * vecs + v]);
}

INLINE void shrink(const float *x, long k, int rows, const float *down, long width, float *hidden, long ld) {
    long j = 0;
    for (; j + 4 * LANES <= width; j += 4 * LANES) columns(x, k, rows, 4, down + j, width, hidden + j, ld);
    switch ((width - j) / LANES) {
    case 3: columns(x, k, rows, 3, down + j, width, hidden + j, ld); j += 3 * LANES; break;
    case 2: columns(x, k, rows, 2, down + j, width, hidden + j, ld); j += 2 * LANES; break;
    case 1: columns(x, k, rows, 1, down + j, width, hidden + j, ld); j += LANES;
    }
    for (; j < width; j++)
        for (int t = 0; t < rows; t++) {
            float sum = 0;
            for (long i = 0; i < k; i++) sum += down[i * width + j] * x[t * k + i];
            hidden[t * ld + j] = sum;
        }
}

INLINE void expand(const float *hidden, long ld, int rows, const float *up, long rank, long n, long begin, long end,
                   float *y, long ldy) {
    long c = begin;
    for (; c + CHUNK <= end; c += CHUNK) {
        vec sum[TILE][4];
        for (int t = 0; t < rows; t++)
            for (int u = 0; u < 4; u++) sum[t][u] = load(y + t * ldy + c + u * LANES);
        for (long r = 0; r < rank; r++) {
            const float *from = up + r * n + c;
            for (int u = 0; u < 4; u++) {
                vec a = load(from + u * LANES);
                __builtin_prefetch(from + 2 * CHUNK + u * LANES, 0, 2);
                for (int t = 0; t < rows; t++) sum[t][u] += a * hidden[t * ld + r];
            }
        }
        for (int t = 0; t < rows; t++)
            for (int u = 0; u < 4; u++) store(y + t * ldy + c + u * LANES, sum[t][u]);
    }
    for (; c < end; c++)
        for (int t = 0; t < rows; t++)
            for (long r = 0; r < rank; r++) y[t * ldy + c] += up[r * n + c] * hidden[t * ld + r];
}

void shrink_work(const tile *tiles, long count, const change *changes, long stride, const float *x, long k,
                 float *hidden, long ld) {
#pragma omp for schedule(static) nowait
    for (long t = 0; t < count; t++) {
        const change *by = changes + tiles[t].owner * stride;
        if (!by->down) continue;
        const float *from = x + tiles[t].first * k;
        float *to = hidden + tiles[t].first * ld;
        switch (tiles[t].count) {
        case 1: shrink(from, k, 1, by->down, by->width, to, ld); break;
        case 2: shrink(from, k, 2, by->down, by->width, to, ld); break;
        case 3: shrink(from, k, 3, by->down, by->width, to, ld); break;
        default: shrink(from, k, 4, by->down, by->width, to, ld);
        }
    }
}

static void apply(const member *by, long rows, long begin, long end, long n, const float *own, const float *hidden,
                  long ld, float *y, long ldy) {
    for (long t = 0; t < rows; t++)
        for (long c = begin; c < end; c++) {
            float *to = y + t * ldy + c;
            if (by->gain) *to += by->gain[c] * (own ? *to - own[c] : *to);
            if (by->bias) *to += by->bias[c];
        }
    if (!by->up) return;
    const float *from = hidden + by->first;
    switch (rows) {
    case 1: expand(from, ld, 1, by->up, by->rank, n, begin, end, y, ldy); break;
    case 2: expand(from, ld, 2, by->up, by->rank, n, begin, end, y, ldy); break;
    case 3: expand(from, ld, 3, by->up, by->rank, n, begin, end, y, ldy); break;
    default: expand(from, ld, 4, by->up, by->rank, n, begin, end, y, ldy);
    }
}

void expand_work(const tile *tiles, long count, const change *changes, long stride, long members, const long *widths,
                 const float *own, const float *hidden, long ld, float *y, long ldy) {
#pragma omp for schedule(static) collapse(2)
    for (long t = 0; t < count; t++)
        for (long half = 0; half < 2; half++) {
            const change *by = changes + tiles[t].owner * stride;
            for (long m = 0, offset = 0; m < members; offset += widths[m++]) {
                long middle = widths[m] / 2 / CHUNK * CHUNK;
                apply(by->members + m, tiles[t].count, half ? middle : 0, half ? widths[m] : middle, widths[m],
                      own ? own + offset : 0, hidden + tiles[t].first * ld, ld, y + tiles[t].first * ldy + offset, ldy);
            }
        }
}

/* y [tokens, ldy] += the changes of `members` layers of one input x [tokens, k], as `expand_work` says; the tiles
   [count] say which tokens. hidden: room for tokens * ld floats, ld at least the largest width. */
void ahl_change(const float *x, long k, long count, const tile *tiles, const change *changes, long members,
                const long *widths, const float *own, float *y, long ldy, float *hidden, long ld, int threads) {
#pragma omp parallel num_threads(threads)
    {
        shrink_work(tiles, count, changes, 1, x, k, hidden, ld);
#pragma omp barrier
        expand_work(tiles, count, changes, 1, members, widths, own, hidden, ld, y, ldy);
    }
}
