/* Products of a few rows with a frozen matrix that is read in the form it is kept in: float32, bfloat16, NF4 or int8.

   A matrix [n, k] is packed in panels of 32 outputs: for each input, the 32 weights of a panel stand together. A panel
   is read from memory once for all rows, each weight becomes the float32 that it stands for in a register, and all sums
   are float32. In bfloat16 and NF4 panels entry 2i belongs to output i and entry 2i + 1 to output 16 + i, so that one
   shift or mask unpacks sixteen of them. */

#include "vectors.h"
#include "work.h"

#define PANEL 32
#define HALF 16
#define BLOCK 64 /* inputs that share a scale in NF4 */
#define STRIP 256 /* inputs that all rows take in turn, and that are summed before they join the total */
#define MOST 64   /* rows that share one reading of a panel */
#define GROUP 256 /* rows that stay in the second cache while all panels are read */
#define AHEAD 8192

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

/* Where the next weights lie, which are asked for while the present ones are used: without that a core waits for memory
   as often as it gets a line, since the sums of several rows keep it from looking far ahead. `step` bytes an input. */
typedef struct {
    const char *from;
    long step;
} ahead;

/* sums [rows][2] += x [rows, k] times inputs begin..end of a panel. A row is summed in the same order whatever rows are
   beside it, so that its result is the same to the last bit. */
INLINE void block(int format, int rows, const float *x, long k, long begin, long end, const char *w, const vec *scale,
                  vec table, ahead next, vec *sums) {
    vec low[8], high[8];
    for (int t = 0; t < rows; t++) low[t] = high[t] = (vec){0};
    const char *soon = next.from + begin * next.step;
    for (long i = begin; i < end; i++) {
        vec a, b;
        __builtin_prefetch(soon, 0, 2);
        soon += next.step;
        unpack(format, w, i, scale, table, &a, &b);
#pragma GCC unroll 8
        for (int t = 0; t < rows; t++) {
            float v = x[t * k + i];
            low[t] += a * v;
            high[t] += b * v;
        }
    }
    for (int t = 0; t < rows; t++) {
        sums[2 * t] += low[t];
        sums[2 * t + 1] += high[t];
    }
}

/* sums [rows][2] += x [rows, k] times inputs begin..end of a panel, block by block. */
INLINE void strip(int format, int rows, const float *x, long k, long begin, long end, const char *w,
                  const float *scales, vec table, ahead next, vec *sums) {
    vec scale[2] = {{0}, {0}};
    for (long size = format == NF4 ? BLOCK : STRIP; begin < end; begin += size) {
        if (format == NF4) memcpy(scale, scales + begin / BLOCK * PANEL, sizeof scale);
        block(format, rows, x, k, begin, begin + size < end ? begin + size : end, w, scale, table, next, sums);
    }
}

#define BY_ROWS(F)                                                                                                     \
    switch (rows) {                                                                                                    \
    case 1: strip(F, 1, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 2: strip(F, 2, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 3: strip(F, 3, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 4: strip(F, 4, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 5: strip(F, 5, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 6: strip(F, 6, x, k, begin, end, w, s, table, next, sums); break;                                             \
    case 7: strip(F, 7, x, k, begin, end, w, s, table, next, sums); break;                                             \
    default: strip(F, 8, x, k, begin, end, w, s, table, next, sums);                                                   \
    }

static void part(int format, int rows, const float *x, long k, long begin, long end, const char *w, const float *s,
                 vec table, ahead next, vec *sums) {
    switch (format) {
    case F32: BY_ROWS(F32) break;
    case BF16: BY_ROWS(BF16) break;
    case NF4: BY_ROWS(NF4) break;
    default: BY_ROWS(INT8)
    }
}

/* One panel for up to MOST rows: sums [rows][2]. A strip of STRIP inputs stays in the first cache for all rows, which
   take turns by eight, and during which the next strip is brought near. */
static void panel(int format, long rows, const float *x, long k, const char *w, const float *scales, vec table,
                  vec *sums) {
    long parts = (rows + 7) / 8, bytes = PANEL_BYTES[format];
    ahead next = {0, (bytes + parts - 1) / parts};
    for (long t = 0; t < 2 * rows; t++) sums[t] = (vec){0};
    long size = parts == 1 ? k : STRIP; /* `strip` sums in pieces of STRIP either way */
    for (long begin = 0; begin < k; begin += size) {
        long end = begin + size < k ? begin + size : k;
        for (long p = 0, row = 0; p < parts; p++) {
            long some = (rows - row + parts - p - 1) / (parts - p);
            next.from = parts == 1 ? w + AHEAD : w + end * bytes + (p * (end - begin) - begin) * next.step;
            part(format, (int)some, x + row * k, k, begin, end, w, scales, table, next, sums + 2 * row);
            row += some;
        }
    }
    if (format == INT8)
        for (long t = 0; t < 2 * rows; t++) sums[t] *= ((const vec *)scales)[t & 1];
}

static void group(const product *by, vec table, const float *x, long rows, float *y) {
    long k = by->k, n = by->n, panels = (n + PANEL - 1) / PANEL;
    int format = (int)by->format;
#pragma omp for schedule(static) nowait
    for (long p = 0; p < panels; p++) {
        const char *w = by->panels + p * k * PANEL_BYTES[format];
        const float *s = by->scales + (format == NF4 ? p * (k / BLOCK) * PANEL : format == INT8 ? p * PANEL : 0);
        const float *bias = by->bias ? by->bias + p * PANEL : 0;
        long width = n - p * PANEL < PANEL ? n - p * PANEL : PANEL;
        for (long row = 0; row < rows; row += MOST) {
            vec sums[2 * MOST];
            long some = rows - row < MOST ? rows - row : MOST;
            panel(format, some, x + row * k, k, w, s, table, sums);
            for (long t = 0; t < some; t++) {
                float *to = y + (row + t) * n + p * PANEL;
                const float *sum = (const float *)(sums + 2 * t);
                for (long j = 0; j < width; j++) to[j] = bias ? sum[j] + bias[j] : sum[j];
            }
        }
    }
}

void linear_work(const product *by, const float *x, long rows, float *y) {
    vec table = {0};
    long k = by->k, n = by->n;
    if (by->format == NF4) memcpy(&table, by->codes, sizeof table);
    for (long row = 0; row < rows; row += GROUP)
        group(by, table, x + row * k, rows - row < GROUP ? rows - row : GROUP, y + row * n);
}

/* panels: [panels, k, ...] as above; scales: NF4 [panels, k / 64, 32], int8 [panels, 32]; codes: the 16 values of a
   4-bit code. */
void ahl_linear(const float *x, long rows, long k, const char *panels, int format, const float *scales,
                const float *codes, const float *bias, long n, float *y, int threads) {
    product by = {panels, format, scales, codes, bias, k, n};
#pragma omp parallel num_threads(threads)
    linear_work(&by, x, rows, y);
}
