/* Attention of packed rows: what its forward and its backward share. */

#ifndef AHL_ATTENTION_H
#define AHL_ATTENTION_H

#include <stdlib.h>

#include "training_panels.h"
#include "training.h"

#define QUERIES 48 /* of a block: eight strips of HIGH */
#define KEYS 64    /* of a block */
#define DIM 256    /* the largest of a head */

/* Lines of numbers, `stride` apart. */
typedef struct {
    float *at;
    long stride;
} lines;

/* Queries first .. first + count - 1 see own keys own .. own + count - 1 (causal: up to their own) and, before those,
   context keys context .. context + before - 1. */
typedef struct {
    int64_t first, count, own, context, before;
} span;

/* log_sum [queries, heads]: of the forward. window: how many keys a query sees at most, counted over context and own
   keys; 0: all. */
typedef struct {
    lines q, k, v, out, grad_out, grad_q, grad_k, grad_v;
    float *log_sum;
    const span *spans;
    long count, heads, kv_heads, dim, causal, window, query_lines, key_lines;
    float scaling;
    dropout drop;
} attention;

/* A block of keys of a span, counted over context and own keys from `from`; line: that of the first. */
typedef struct {
    long from, count, line;
} block;

/* Keys of a span, from .. to - 1: blocks do not cross from context to own. */
INLINE block block_at(const span *s, long from, long to) {
    long own = from >= s->before, end = own ? to : (to < s->before ? to : s->before);
    return (block){from, end - from < KEYS ? end - from : KEYS, own ? s->own + from - s->before : s->context + from};
}

/* The end of what query i sees, and its beginning. */
INLINE long end_of(const attention *a, const span *s, long i) { return s->before + (a->causal ? i + 1 : s->count); }
INLINE long begin_of(const attention *a, const span *s, long i) {
    long begin = s->before + i + 1 - a->window;
    return a->window && begin > 0 ? begin : 0;
}

/* to [dim, KEYS] = the transpose of count lines; columns up to the next sixteen are 0. */
static void turn_lines(const float *from, long stride, long count, long dim, float *to) {
    for (long line = 0; line < count; line += LANES)
        for (long i = 0; i < dim; i += LANES) {
            vec v[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) v[j] = line + j < count ? load(from + (line + j) * stride + i) : (vec){0};
            turn(v);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) store(to + (i + j) * KEYS + line, v[j]);
        }
}

/* to [count, dim]: side by side, since lines that lie a power of two apart fight for places in the cache. */
static void copy_lines(const float *from, long stride, long count, long dim, float *to) {
    for (long line = 0; line < count; line++)
        for (long i = 0; i < dim; i += LANES) store(to + line * dim + i, load(from + line * stride + i));
}

/* All bits where lane i .. i + 15 lies in begin .. end - 1. */
INLINE ints inside(long i, long begin, long end) {
    ints lane = (ints)FIRST_LANES + (int32_t)i;
    return (lane >= (int32_t)begin) & (lane < (int32_t)end);
}

/* Columns of the weights of one head over keys from `key`, times COLUMN: column = key * heads + head. */
INLINE bits steps_of(const attention *a, long key, long head) {
    uint32_t heads = (uint32_t)a->heads, first = (uint32_t)key * heads + (uint32_t)head;
    return (first + FIRST_LANES * heads) * COLUMN;
}

#endif
