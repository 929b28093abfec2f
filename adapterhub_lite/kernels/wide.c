/* Products of a few rows with a frozen matrix that is read in the form it is kept in: float32, bfloat16, NF4 or int8.

   A matrix [n, k] is packed in panels of 32 outputs: for each input, the 32 weights of a panel stand together. A panel
   is read from memory once for all rows, each weight becomes the float32 that it stands for in a register, and all sums
   are float32. In bfloat16 and NF4 panels entry 2i belongs to output i and entry 2i + 1 to output 16 + i, so that one
   shift or mask unpacks sixteen of them. */

#include "vectors.h"

#define PANEL 32
#define HALF 16
#define BLOCK 64 /* inputs that share a scale in NF4; also those that are summed before they join the total */

enum { F32, BF16, NF4, INT8 };
static const long PANEL_BYTES[] = {PANEL * 4, PANEL * 2, HALF, PANEL};

INLINE void unpack(int format, const char *w, long i, const vec *scale, vec table, vec *low, vec *high) {
    if (format == F32) {
        const vec *pair = (const vec *)(w + i * PANEL * 4);
        *low = pair[0];
        *high = pair[1];
    } else if (format == BF16) {
        bits both = *(const bits *)(w + i * PANEL * 2);
        *low = (vec)(both << 16);
        *high = (vec)(both & 0xffff0000u);
    } else if (format == NF4) {
        ints codes = widen_unsigned(w + i * HALF);
        *low = __builtin_shuffle(table, codes & 15) * scale[0];
        *high = __builtin_shuffle(table, codes >> 4) * scale[1];
    } else {
        *low = to_float(widen_signed(w + i * PANEL));
        *high = to_float(widen_signed(w + i * PANEL + HALF));
    }
}

/* sums [rows][2] += x [rows, k] times inputs begin..end of a panel. A single row keeps four sums, so that an addition
   need not wait for the one before it. */
INLINE void block(int format, int rows, const float *x, long k, long begin, long end, const char *w, const vec *scale,
                  vec table, vec *sums) {
    enum { WAYS = 4 };
    int ways = rows == 1 ? WAYS : 1;
    vec low[8], high[8];
    for (int t = 0; t < rows * ways; t++) low[t] = high[t] = (vec){0};
    long i = begin;
    for (; i + ways <= end; i += ways)
#pragma GCC unroll 4
        for (int u = 0; u < ways; u++) {
            vec a, b;
            unpack(format, w, i + u, scale, table, &a, &b);
#pragma GCC unroll 8
            for (int t = 0; t < rows; t++) {
                float v = x[t * k + i + u];
                low[t * ways + u] += a * v;
                high[t * ways + u] += b * v;
            }
        }
    for (; i < end; i++) {
        vec a, b;
        unpack(format, w, i, scale, table, &a, &b);
        low[0] += a * x[i];
        high[0] += b * x[i];
    }
    for (int t = 0; t < rows; t++)
        for (int u = 0; u < ways; u++) {
            sums[2 * t] += low[t * ways + u];
            sums[2 * t + 1] += high[t * ways + u];
        }
}

INLINE void panel(int format, int rows, const float *x, long k, const char *w, const float *scales, vec table,
                  vec *sums) {
    vec scale[2] = {{0}, {0}};
    for (int t = 0; t < 2 * rows; t++) sums[t] = (vec){0};
    for (long begin = 0; begin < k; begin += BLOCK) {
        if (format == NF4) memcpy(scale, scales + begin / BLOCK * PANEL, sizeof scale);
        block(format, rows, x, k, begin, begin + BLOCK < k ? begin + BLOCK : k, w, scale, table, sums);
    }
    if (format == INT8)
        for (int t = 0; t < 2 * rows; t++) sums[t] *= ((const vec *)scales)[t & 1];
}

#define BY_ROWS(F)                                                                                                     \
    switch (part) {                                                                                                    \
    case 1: panel(F, 1, from, k, w, s, table, sums); break;                                                            \
    case 2: panel(F, 2, from, k, w, s, table, sums); break;                                                            \
    case 3: panel(F, 3, from, k, w, s, table, sums); break;                                                            \
    case 4: panel(F, 4, from, k, w, s, table, sums); break;                                                            \
    case 5: panel(F, 5, from, k, w, s, table, sums); break;                                                            \
    case 6: panel(F, 6, from, k, w, s, table, sums); break;                                                            \
    case 7: panel(F, 7, from, k, w, s, table, sums); break;                                                            \
    default: panel(F, 8, from, k, w, s, table, sums);                                                                  \
    }

/* y [rows, n] = x [rows, k] W^T + bias (or none). weight: [panels, k, ...] as above; scales: NF4 [panels, k / 64, 32],
   int8 [panels, 32]; table: the 16 values of a 4-bit code. */
void ahl_linear(const float *x, long rows, long k, const char *weight, int format, const float *scales,
                const float *codes, const float *bias, long n, float *y, int threads) {
    vec table = {0};
    if (format == NF4) memcpy(&table, codes, sizeof table);
    long panels = (n + PANEL - 1) / PANEL;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long p = 0; p < panels; p++) {
        const char *w = weight + p * k * PANEL_BYTES[format];
        const float *s = format == NF4 ? scales + p * (k / BLOCK) * PANEL : format == INT8 ? scales + p * PANEL : 0;
        long width = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        for (long row = 0; row < rows; row += 8) {
            const float *from = x + row * k;
            int part = rows - row < 8 ? (int)(rows - row) : 8;
            vec sums[16];
            switch (format) {
            case F32: BY_ROWS(F32) break;
            case BF16: BY_ROWS(BF16) break;
            case NF4: BY_ROWS(NF4) break;
            default: BY_ROWS(INT8)
            }
            for (int t = 0; t < part; t++) {
                float *to = y + (row + t) * n + p * PANEL;
                const float *sum = (const float *)(sums + 2 * t);
                for (long j = 0; j < width; j++) to[j] = bias ? sum[j] + bias[p * PANEL + j] : sum[j];
            }
        }
    }
}
