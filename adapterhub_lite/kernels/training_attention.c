/* Attention of packed rows, forward: blocks of queries against blocks of keys, with a softmax that goes along (arXiv
   2205.14135), in float32. A block of queries is one thread's, so that results do not depend on how many there are. */

#include <math.h>

#include "training_attention.h"

#define CHUNK 8 /* heads of one group that a thread takes together */
#define LEAST -1e38f

/* Part of a span: a block of its queries for some heads of one group. */
typedef struct {
    const attention *a;
    const span *s;
    long first, count; /* queries of the span */
    long head, heads, kv;
    uint32_t words[QUERIES];
    float peak[CHUNK][QUERIES], sum[CHUNK][QUERIES];
} work;

/* Room of a thread for one block of keys. */
typedef struct {
    float turned[DIM * KEYS], values[KEYS * DIM], scores[HIGH * KEYS];
} room;

INLINE void grow(float *out, long dim, float factor) {
    for (long i = 0; i < dim; i += LANES) store(out + i, load(out + i) * factor);
}

/* Scores of a query become weights under a peak that rises with the blocks; out, the sums so far, follows. */
static void soften(work *w, long head, long row, block b, long vecs, float *score, float *out) {
    const attention *a = w->a;
    long query = w->first + row, begin = begin_of(a, w->s, query) - b.from, end = end_of(a, w->s, query) - b.from;
    if (end > b.count) end = b.count;
    vec v[KEYS / LANES], most = all(w->peak[head][row]);
    for (long i = 0; i < vecs; i++) {
        v[i] = load(score + i * LANES) * a->scaling;
        if (begin > i * LANES || end < (i + 1) * LANES) {
            ints seen = inside(i * LANES, begin, end);
            v[i] = (vec)(((ints)v[i] & seen) | ((ints)all(-INFINITY) & ~seen));
        }
        most = greater(v[i], most);
    }
    float peak = largest(most), before = w->peak[head][row];
    if (peak > before) {
        if (before > LEAST) {
            float factor = expf(before - peak);
            grow(out, a->dim, factor);
            w->sum[head][row] *= factor;
        }
        w->peak[head][row] = peak;
    }
    vec sums = {0};
    bits steps = steps_of(a, b.from, w->head + head);
    for (long i = 0; i < vecs; i++) {
        vec weight = exponential_down(v[i] - peak);
        sums += weight;
        if (a->drop.keys) {
            weight *= kept(&a->drop, w->words[row], steps);
            steps += (uint32_t)(LANES * a->heads) * COLUMN;
        }
        store(score + i * LANES, weight);
    }
    w->sum[head][row] += total(sums);
}

/* One head's queries against one block of keys. */
static void attend_head(work *w, long head, block b, int fresh, room *r) {
    const attention *a = w->a;
    long dim = a->dim, line = w->s->first + w->first, column = (w->head + head) * dim;
    for (long row = 0; row < w->count; row += HIGH) {
        long rows = w->count - row < HIGH ? w->count - row : HIGH;
        long terms = end_of(a, w->s, w->first + row + rows - 1) - b.from;
        if (terms <= 0) continue;
        if (terms > b.count) terms = b.count;
        long vecs = (terms + LANES - 1) / LANES;
        operand q = {a->q.at + (line + row) * a->q.stride + column, a->q.stride, 1};
        float *out = a->out.at + (line + row) * a->out.stride + column;
        strip_times(q, r->turned, KEYS, rows, vecs, dim, r->scores, KEYS, 1);
        for (long j = 0; j < rows; j++)
            soften(w, head, row + j, b, vecs, r->scores + j * KEYS, out + j * a->out.stride);
        strip_times((operand){r->scores, KEYS, 1}, r->values, dim, rows, dim / LANES, terms, out, a->out.stride, fresh);
    }
}

static void finish(work *w) {
    const attention *a = w->a;
    for (long head = 0; head < w->heads; head++)
        for (long row = 0; row < w->count; row++) {
            long line = w->s->first + w->first + row;
            grow(a->out.at + line * a->out.stride + (w->head + head) * a->dim, a->dim, 1 / w->sum[head][row]);
            a->log_sum[line * a->heads + w->head + head] = w->peak[head][row] + logf(w->sum[head][row]);
        }
}

static void attend_block(work *w, room *r) {
    const attention *a = w->a;
    long from = begin_of(a, w->s, w->first), to = end_of(a, w->s, w->first + w->count - 1), first = from;
    for (long head = 0; head < w->heads; head++)
        for (long row = 0; row < w->count; row++) {
            w->peak[head][row] = LEAST;
            w->sum[head][row] = 0;
        }
    for (long row = 0; a->drop.keys && row < w->count; row++)
        w->words[row] = word_of(&a->drop, w->s->first + w->first + row);
    while (from < to) {
        block b = block_at(w->s, from, to);
        turn_lines(a->k.at + b.line * a->k.stride + w->kv * a->dim, a->k.stride, b.count, a->dim, r->turned);
        copy_lines(a->v.at + b.line * a->v.stride + w->kv * a->dim, a->v.stride, b.count, a->dim, r->values);
        for (long head = 0; head < w->heads; head++) attend_head(w, head, b, from == first, r);
        from += b.count;
    }
    finish(w);
}

/* out [queries, heads * dim] and log_sum [queries, heads] of all spans. Returns whether there was room. */
int ahl_attend(const attention *a, int threads) {
    long blocks = 0, group = a->heads / a->kv_heads, chunks = (group + CHUNK - 1) / CHUNK;
    for (long i = 0; i < a->count; i++) blocks += (a->spans[i].count + QUERIES - 1) / QUERIES;
    long(*parts)[2] = malloc((blocks + 1) * sizeof *parts), count = 0;
    if (!parts) return 0;
    for (long i = 0; i < a->count; i++)
        for (long first = 0; first < a->spans[i].count; first += QUERIES) {
            parts[count][0] = i;
            parts[count++][1] = first;
        }
#pragma omp parallel num_threads(threads)
    {
        work w = {.a = a};
        room r;
#pragma omp for schedule(dynamic) collapse(3)
        for (long i = count - 1; i >= 0; i--)
            for (long kv = 0; kv < a->kv_heads; kv++)
                for (long chunk = 0; chunk < chunks; chunk++) {
                    long left = group - chunk * CHUNK;
                    w.s = a->spans + parts[i][0];
                    w.first = parts[i][1];
                    w.count = w.s->count - w.first < QUERIES ? w.s->count - w.first : QUERIES;
                    w.kv = kv;
                    w.head = kv * group + chunk * CHUNK;
                    w.heads = left < CHUNK ? left : CHUNK;
                    attend_block(&w, &r);
                }
    }
    free(parts);
    return 1;
}
