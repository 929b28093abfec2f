/* What a new adapter goes through: transposed copies of float32 matrices, and whether every value is a number. */

#include "vectors.h"
#ifdef __linux__
#include <sys/mman.h>
#endif

#define PIECE (1 << 20)

/* Gives the next piece of new memory its pages at once, where the system can: one by one, when they are first written,
   they take half as long again. Returns where the rest begins. Pages that are there stay as they are. */
static char *fault_in(char *from, char *end) {
    char *next = (char *)(((uintptr_t)from + PIECE) & ~(uintptr_t)(PIECE - 1));
    if (next > end) next = end;
#ifdef MADV_POPULATE_WRITE
    char *page = (char *)((uintptr_t)from & ~(uintptr_t)4095);
    if (madvise(page, next - page, MADV_POPULATE_WRITE)) return end; /* they come when they are written, as ever */
#endif
    return next;
}

typedef struct {
    const float *from;
    long rows, columns;
    float *to;
    long stride;
    double factor;
} copy;

/* to [columns, stride] = factor times the transpose of from [rows, columns], for each of some copies. room: `bytes` of
   memory, or none, that may be new and in which they lie one after another. Returns whether no value that was written
   is NaN or infinite. */
int ahl_transpose(const copy *copies, long count, char *room, long bytes) {
    vec odd = {0};
    float rest = 0;
    char *new = room, *end = room + bytes;
    for (const copy *c = copies; c < copies + count; c++) {
        while (new < end && new < (char *)(c->to + (c->columns - 1) * c->stride + c->rows)) new = fault_in(new, end);
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
