/* Attention of packed rows, backward (arXiv 2307.08691): weights are computed again from the logarithms of their sums.

   First each span's queries get their gradients and, where one thread has all of a span, so do its own keys; then keys
   are taken in fixed blocks of lines, each by one thread, for what a span that was shared out or a common context still
   lacks. Every sum thus has one order: results do not depend on how many threads there are. */

#include "training_attention.h"

enum { OF_QUERIES = 1, OF_KEYS = 2 };

/* Room of a thread for a block of queries against a block of keys. */
typedef struct {
    float turned_keys[DIM * KEYS], turned_values[DIM * KEYS], keys[KEYS * DIM];
    float queries[QUERIES * DIM], grads[QUERIES * DIM];
    float weights[QUERIES * KEYS], slopes[QUERIES * KEYS];
    uint32_t words[QUERIES];
} room;

/* Queries first .. first + count - 1 of a span and one head. */
typedef struct {
    const attention *a;
    const span *s;
    long first, count, head, kv;
} tile;

INLINE float dot(const float *x, const float *y, long n) {
    vec sum = {0};
    for (long i = 0; i < n; i += LANES) sum += load(x + i) * load(y + i);
    return total(sum);
}

/* weight: scores, become weights as they met the values; slope: gradients of weights, become those of scores. */
static void soften_back(const tile *t, const room *r, long row, block b, long vecs, float *weight, float *slope) {
    const attention *a = t->a;
    long query = t->first + row, line = t->s->first + query;
    long begin = begin_of(a, t->s, query) - b.from, end = end_of(a, t->s, query) - b.from;
    if (end > b.count) end = b.count;
    float log_sum = a->log_sum[line * a->heads + t->head];
    float common = dot(r->grads + row * a->dim, a->out.at + line * a->out.stride + t->head * a->dim, a->dim);
    bits steps = steps_of(a, b.from, t->head);
    for (long i = 0; i < vecs; i++) {
        vec p = exponential_down(load(weight + i * LANES) * a->scaling - log_sum), keep = all(1);
        if (begin > i * LANES || end < (i + 1) * LANES) p = (vec)((ints)p & inside(i * LANES, begin, end));
        if (a->drop.keys) {
            keep = kept(&a->drop, r->words[row], steps);
            steps += (uint32_t)(LANES * a->heads) * COLUMN;
        }
        store(slope + i * LANES, p * (keep * load(slope + i * LANES) - common) * a->scaling);
        store(weight + i * LANES, p * keep);
    }
    for (long i = vecs; i < KEYS / LANES; i++) {
        store(slope + i * LANES, (vec){0});
        store(weight + i * LANES, (vec){0});
    }
}

/* Weights and slopes of all queries of a tile that see any key of the block; returns the first such row. */
static long weigh_tile(const tile *t, block b, int what, room *r) {
    const attention *a = t->a;
    long dim = a->dim, line = t->s->first + t->first, column = t->head * dim, seeing = t->count;
    copy_lines(a->q.at + line * a->q.stride + column, a->q.stride, t->count, dim, r->queries);
    copy_lines(a->grad_out.at + line * a->grad_out.stride + column, a->grad_out.stride, t->count, dim, r->grads);
    for (long row = 0; row < t->count; row += HIGH) {
        long rows = t->count - row < HIGH ? t->count - row : HIGH;
        long terms = end_of(a, t->s, t->first + row + rows - 1) - b.from;
        if (terms <= 0) continue;
        if (seeing == t->count) seeing = row;
        if (terms > b.count) terms = b.count;
        long vecs = (terms + LANES - 1) / LANES;
        float *weight = r->weights + row * KEYS, *slope = r->slopes + row * KEYS;
        strip_times((operand){r->queries + row * dim, dim, 1}, r->turned_keys, KEYS, rows, vecs, dim, weight, KEYS, 1);
        strip_times((operand){r->grads + row * dim, dim, 1}, r->turned_values, KEYS, rows, vecs, dim, slope, KEYS, 1);
        for (long j = 0; j < rows; j++) soften_back(t, r, row + j, b, vecs, weight + j * KEYS, slope + j * KEYS);
        if (what & OF_QUERIES)
            strip_times((operand){slope, KEYS, 1}, r->keys, dim, rows, dim / LANES, terms,
                        a->grad_q.at + (line + row) * a->grad_q.stride + column, a->grad_q.stride, 0);
    }
    return seeing;
}

static void add_to_keys(const tile *t, block b, long seeing, const room *r) {
    const attention *a = t->a;
    long dim = a->dim, last = end_of(a, t->s, t->first + t->count - 1) - b.from;
    if (last > b.count) last = b.count;
    for (long key = 0; key < last; key += HIGH) {
        long rows = last - key < HIGH ? last - key : HIGH, row = seeing;
        long own = b.from + key - t->s->before - t->first; /* first row that sees this key, if it is own */
        if (a->causal && b.from >= t->s->before && own > row) row = own;
        operand slopes = {r->slopes + row * KEYS + key, 1, KEYS}, weights = {r->weights + row * KEYS + key, 1, KEYS};
        float *grad_k = a->grad_k.at + (b.line + key) * a->grad_k.stride + t->kv * dim;
        float *grad_v = a->grad_v.at + (b.line + key) * a->grad_v.stride + t->kv * dim;
        long vecs = dim / LANES, terms = t->count - row;
        strip_times(slopes, r->queries + row * dim, dim, rows, vecs, terms, grad_k, a->grad_k.stride, 0);
        strip_times(weights, r->grads + row * dim, dim, rows, vecs, terms, grad_v, a->grad_v.stride, 0);
    }
}

/* Keys from .. to - 1 of a span (counted over context and own keys) and its queries first .. last - 1, for one group of
   heads. Blocks of queries begin at multiples of QUERIES, whoever asks. keys_what: what own keys take part in. */
static void sweep(const attention *a, const span *s, long kv, long first, long last, long from, long to, int of_context,
                  int of_own, room *r) {
    long dim = a->dim, group = a->heads / a->kv_heads;
    while (from < to) {
        block b = block_at(s, from, to);
        int what = from < s->before ? of_context : of_own;
        from += b.count;
        if (!what) continue;
        const float *keys = a->k.at + b.line * a->k.stride + kv * dim;
        turn_lines(keys, a->k.stride, b.count, dim, r->turned_keys);
        turn_lines(a->v.at + b.line * a->v.stride + kv * dim, a->v.stride, b.count, dim, r->turned_values);
        copy_lines(keys, a->k.stride, b.count, dim, r->keys);
        for (long query = first; query < last; query += QUERIES) {
            tile t = {a, s, query, last - query < QUERIES ? last - query : QUERIES, kv * group, kv};
            if (end_of(a, s, query + t.count - 1) <= b.from) continue;
            if (begin_of(a, s, query) >= b.from + b.count) break;
            for (long row = 0; a->drop.keys && row < t.count; row++)
                r->words[row] = word_of(&a->drop, s->first + query + row);
            for (; t.head < (kv + 1) * group; t.head++) {
                long seeing = weigh_tile(&t, b, what, r);
                if (what & OF_KEYS) add_to_keys(&t, b, seeing, r);
            }
        }
    }
}

/* What one thread takes in the first round: all queries of a span, or a block of them. */
typedef struct {
    long cost, span, first, last;
} share;

static int by_cost(const void *one, const void *other) {
    const share *x = one, *y = other;
    if (x->cost != y->cost) return x->cost < y->cost ? 1 : -1;
    if (x->span != y->span) return x->span > y->span ? 1 : -1;
    return (x->first > y->first) - (x->first < y->first);
}

static long cost_of(const attention *a, const span *s) {
    return s->count * (s->before + (a->causal ? s->count / 2 + 1 : s->count));
}

/* A span goes to one thread unless the others would wait for it longer than seven products instead of five take. */
static int is_shared_out(const attention *a, const span *s, long all, int threads) {
    return 5 * cost_of(a, s) * threads > 7 * all;
}

static long share_out(const attention *a, long all, int threads, share *shares) {
    long count = 0;
    for (long i = 0; i < a->count; i++) {
        const span *s = a->spans + i;
        if (!is_shared_out(a, s, all, threads)) {
            shares[count++] = (share){cost_of(a, s), i, 0, s->count};
            continue;
        }
        for (long first = 0; first < s->count; first += QUERIES) {
            long last = s->count - first < QUERIES ? s->count : first + QUERIES;
            shares[count++] = (share){(last - first) * (end_of(a, s, last - 1)), i, first, last};
        }
    }
    qsort(shares, count, sizeof *shares, by_cost);
    return count;
}

static void take_share(const attention *a, const share *part, long all, int threads, long kv, room *r) {
    const span *s = a->spans + part->span;
    long group = a->heads / a->kv_heads, width = group * a->dim;
    for (long query = part->first; query < part->last; query++)
        memset(a->grad_q.at + (s->first + query) * a->grad_q.stride + kv * width, 0, width * sizeof(float));
    int of_own = is_shared_out(a, s, all, threads) ? OF_QUERIES : OF_QUERIES | OF_KEYS;
    sweep(a, s, kv, part->first, part->last, begin_of(a, s, part->first), end_of(a, s, part->last - 1), OF_QUERIES,
          of_own, r);
}

/* Gradients of key lines first .. last - 1 that the first round left out: own keys of spans that were shared out, then
   those of contexts, each in the order of the spans. */
static void take_lines(const attention *a, long first, long last, long all, int threads, long kv, room *r) {
    for (long i = 0; i < a->count; i++) {
        const span *s = a->spans + i;
        if (!is_shared_out(a, s, all, threads)) continue;
        long from = (s->own > first ? s->own : first) - s->own + s->before;
        long to = (s->own + s->count < last ? s->own + s->count : last) - s->own + s->before;
        sweep(a, s, kv, 0, s->count, from, to, 0, OF_KEYS, r);
    }
    for (long i = 0; i < a->count; i++) {
        const span *s = a->spans + i;
        long from = (s->context > first ? s->context : first) - s->context;
        long to = (s->context + s->before < last ? s->context + s->before : last) - s->context;
        sweep(a, s, kv, 0, s->count, from, to, OF_KEYS, 0, r);
    }
}

/* grad_q = the gradients of the queries; grad_k, grad_v += those of keys and values. Returns whether there was room. */
int ahl_attend_back(const attention *a, int threads) {
    long most = 1, all = 0;
    for (long i = 0; i < a->count; i++) {
        most += (a->spans[i].count + QUERIES - 1) / QUERIES;
        all += cost_of(a, a->spans + i) * a->kv_heads;
    }
    share *shares = malloc(most * sizeof *shares);
    if (!shares) return 0;
    long count = share_out(a, all, threads, shares);
#pragma omp parallel num_threads(threads)
    {
        room r;
#pragma omp for schedule(dynamic) collapse(2)
        for (long i = 0; i < count; i++)
            for (long kv = 0; kv < a->kv_heads; kv++) take_share(a, shares + i, all, threads, kv, &r);
#pragma omp for schedule(dynamic) collapse(2)
        for (long line = 0; line < a->key_lines; line += KEYS)
            for (long kv = 0; kv < a->kv_heads; kv++) take_lines(a, line, line + KEYS, all, threads, kv, &r);
    }
    free(shares);
    return 1;
}

/* Whether all lines that spans name are there, and no query or own key belongs to two of them. */
int ahl_are_spans(const span *spans, long count, long query_lines, long key_lines) {
    char *taken = calloc(query_lines + key_lines + 1, 1);
    int good = taken != 0;
    for (const span *s = spans; good && s < spans + count; s++) {
        good = s->count > 0 && s->first >= 0 && s->count <= query_lines - s->first && s->own >= 0 &&
               s->count <= key_lines - s->own && s->before >= 0 && s->context >= 0 &&
               s->before <= key_lines - s->context;
        good = good && !memchr(taken + s->first, 1, s->count) && !memchr(taken + query_lines + s->own, 1, s->count);
        if (!good) break;
        memset(taken + s->first, 1, s->count);
        memset(taken + query_lines + s->own, 1, s->count);
    }
    free(taken);
    return good;
}
