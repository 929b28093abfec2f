/* Low-rank changes of rows that each have an adapter of their own, or none: y += (x down) up, in float32.

   Nothing is gathered or padded: a row brings the addresses of its adapter's matrices. Neighbouring rows of one adapter
   read them together. */

#include "vectors.h"

#define TILE 4
#define CHUNK 64

INLINE void shrink(const float *x, long k, int rows, const float *down, long width, float *hidden, long stride) {
    for (int t = 0; t < rows; t++) memset(hidden + t * stride, 0, width * sizeof(float));
    long j = 0;
    for (; j + 2 * LANES <= width; j += 2 * LANES) {
        vec low[TILE], high[TILE];
        for (int t = 0; t < rows; t++) low[t] = high[t] = (vec){0};
        for (long i = 0; i < k; i++) {
            vec a = load(down + i * width + j), b = load(down + i * width + j + LANES);
            for (int t = 0; t < rows; t++) {
                low[t] += a * x[t * k + i];
                high[t] += b * x[t * k + i];
            }
        }
        for (int t = 0; t < rows; t++) {
            store(hidden + t * stride + j, low[t]);
            store(hidden + t * stride + j + LANES, high[t]);
        }
    }
    for (; j + LANES <= width; j += LANES) {
        vec low[TILE], high[TILE];
        for (int t = 0; t < rows; t++) low[t] = high[t] = (vec){0};
        long i = 0;
        for (; i + 2 <= k; i += 2) {
            vec a = load(down + i * width + j), b = load(down + (i + 1) * width + j);
            for (int t = 0; t < rows; t++) {
                low[t] += a * x[t * k + i];
                high[t] += b * x[t * k + i + 1];
            }
        }
        for (; i < k; i++)
            for (int t = 0; t < rows; t++) low[t] += load(down + i * width + j) * x[t * k + i];
        for (int t = 0; t < rows; t++) store(hidden + t * stride + j, low[t] + high[t]);
    }
    if (j < width)
        for (long i = 0; i < k; i++)
            for (int t = 0; t < rows; t++)
                for (long r = j; r < width; r++) hidden[t * stride + r] += down[i * width + r] * x[t * k + i];
}

INLINE void expand(const float *hidden, long stride, int rows, const float *up, long rank, long n, long begin, long end,
                   float *y, long ldy) {
    long c = begin;
    for (; c + CHUNK <= end; c += CHUNK) {
        vec sum[TILE][4];
        for (int t = 0; t < rows; t++)
            for (int u = 0; u < 4; u++) sum[t][u] = load(y + t * ldy + c + u * LANES);
        for (long r = 0; r < rank; r++) {
            const float *from = up + r * n + c;
            for (int t = 0; t < rows; t++)
                for (int u = 0; u < 4; u++) sum[t][u] += load(from + u * LANES) * hidden[t * stride + r];
        }
        for (int t = 0; t < rows; t++)
            for (int u = 0; u < 4; u++) store(y + t * ldy + c + u * LANES, sum[t][u]);
    }
    for (; c < end; c++)
        for (int t = 0; t < rows; t++)
            for (long r = 0; r < rank; r++) y[t * ldy + c] += up[r * n + c] * hidden[t * stride + r];
}

/* y [rows, ldy] += the changes of `members` layers of one input x [rows, k].
   tiles [count][2]: first row and number of rows (at most 4, of one adapter) of each tile; down, width [count]: its
   matrix [k, width] and that matrix's columns; up, rank, first [members][count]: each layer's matrix [rank, n] (or none),
   its rank, and the column of `down` where the layer begins; offset, n [members]: the layer's columns in y.
   hidden: room for rows * stride, stride at least the largest width. */
void ahl_change(const float *x, long k, long count, const long *tiles, const float *const *down, const long *width,
                long members, const float *const *up, const long *rank, const long *first, const long *offset,
                const long *n, float *y, long ldy, float *hidden, long stride, int threads) {
#pragma omp parallel num_threads(threads)
    {
#pragma omp for schedule(static)
        for (long t = 0; t < count; t++) {
            long row = tiles[2 * t];
            const float *from = x + row * k;
            float *to = hidden + row * stride;
            switch (tiles[2 * t + 1]) {
            case 1: shrink(from, k, 1, down[t], width[t], to, stride); break;
            case 2: shrink(from, k, 2, down[t], width[t], to, stride); break;
            case 3: shrink(from, k, 3, down[t], width[t], to, stride); break;
            default: shrink(from, k, 4, down[t], width[t], to, stride);
            }
        }
#pragma omp for schedule(static) collapse(2)
        for (long t = 0; t < count; t++)
            for (long half = 0; half < 2; half++)
                for (long m = 0; m < members; m++) {
                    const float *matrix = up[m * count + t];
                    if (!matrix) continue;
                    long row = tiles[2 * t], r = rank[m * count + t], middle = n[m] / 2 / CHUNK * CHUNK;
                    long begin = half ? middle : 0, end = half ? n[m] : middle;
                    const float *from = hidden + row * stride + first[m * count + t];
                    float *to = y + row * ldy + offset[m];
                    switch (tiles[2 * t + 1]) {
                    case 1: expand(from, stride, 1, matrix, r, n[m], begin, end, to, ldy); break;
                    case 2: expand(from, stride, 2, matrix, r, n[m], begin, end, to, ldy); break;
                    case 3: expand(from, stride, 3, matrix, r, n[m], begin, end, to, ldy); break;
                    default: expand(from, stride, 4, matrix, r, n[m], begin, end, to, ldy);
                    }
                }
    }
}
