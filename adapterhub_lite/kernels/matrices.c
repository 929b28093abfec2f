/* What a new adapter goes through: transposed copies of float32 matrices, and whether every value is a number. */

#include "vectors.h"

/* v becomes its transpose: in four rounds, blocks of 8, 4, 2 and 1 change places. */
INLINE void turn(vec *v) {
#pragma GCC unroll 4
    for (int d = 8; d; d /= 2) {
        ints low, high;
        for (int p = 0; p < LANES; p++) {
            low[p] = p & d ? LANES + p - d : p;
            high[p] = p & d ? LANES + p : p + d;
        }
#pragma GCC unroll 16
        for (int i = 0; i < LANES; i++)
            if (!(i & d)) {
                vec a = v[i], b = v[i + d];
                v[i] = __builtin_shuffle(a, b, low);
                v[i + d] = __builtin_shuffle(a, b, high);
            }
    }
}

typedef struct {
    const float *from;
    long rows, columns;
    float *to;
    long stride;
    double factor;
} copy;

/* to [columns, stride] = factor times the transpose of from [rows, columns], for each of some copies. Returns whether no
   value that was written is NaN or infinite. */
int ahl_transpose(const copy *copies, long count) {
    vec odd = {0};
    float rest = 0;
    for (const copy *c = copies; c < copies + count; c++) {
        float factor = (float)c->factor;
        long whole_rows = c->rows / LANES * LANES, whole = c->columns / LANES * LANES;
        for (long row = 0; row < whole_rows; row += LANES)
            for (long column = 0; column < whole; column += LANES) {
                vec v[LANES];
                for (int i = 0; i < LANES; i++) v[i] = load(c->from + (row + i) * c->columns + column) * factor;
                turn(v);
                for (int i = 0; i < LANES; i++) {
                    odd += v[i] * 0.0f;
                    store(c->to + (column + i) * c->stride + row, v[i]);
                }
            }
        for (long row = 0; row < c->rows; row++)
            for (long column = row < whole_rows ? whole : 0; column < c->columns; column++) {
                float value = c->from[row * c->columns + column] * factor;
                rest += value * 0.0f;
                c->to[column * c->stride + row] = value;
            }
    }
    return total(odd) + rest == 0.0f;
}

typedef struct {
    const float *from;
    long count;
} stretch;

/* Whether no value of some stretches is NaN or infinite. */
int ahl_all_finite(const stretch *stretches, long count) {
    vec odd = {0};
    float rest = 0;
    for (const stretch *s = stretches; s < stretches + count; s++) {
        long i = 0;
        for (; i + LANES <= s->count; i += LANES) odd += load(s->from + i) * 0.0f;
        for (; i < s->count; i++) rest += s->from[i] * 0.0f;
    }
    return total(odd) + rest == 0.0f;
}
