/* Attention within short rows, forward and backward: all keys of a row and a head at once, each by one thread. Weights
   are computed again in the backward from the logarithms of their sums. */

#include <math.h>

#include "training_encoder.h"
#include "training_panels.h"

/* One head of one row. */
typedef struct {
    const short_attention *a;
    lines q, k, v;
    long query, queries, key, keys, head, column, ld;
} part;

static part part_at(const short_attention *a, long number) {
    long text = number / a->heads, head = number % a->heads, column = head * a->dim;
    long query = a->queries[text], key = a->keys[text], keys = a->keys[text + 1] - key;
    part p = {a, from(a->q, query), from(a->k, key), from(a->v, key)};
    p.q.at += column;
    p.k.at += column;
    p.v.at += column;
    p.query = query;
    p.queries = a->queries[text + 1] - query;
    p.key = key;
    p.keys = keys;
    p.head = head;
    p.column = column;
    p.ld = (keys + LANES - 1) / LANES * LANES;
    return p;
}

/* turned [dim][ld] = lines [count][dim] transposed, zeros behind. */
static void turn_lines(lines x, long count, long dim, long ld, float *turned) {
    for (long c = 0; c < ld; c += LANES)
        for (long i = 0; i < dim; i += LANES) {
            vec v[LANES];
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) v[j] = c + j < count ? load(x.at + (c + j) * x.ld + i) : (vec){0};
            turn(v);
#pragma GCC unroll 16
            for (int j = 0; j < LANES; j++) store(turned + (i + j) * ld + c, v[j]);
        }
}

INLINE ints seen(long i, long count) { return (ints)FIRST_LANES + (int32_t)i < (int32_t)count; }

INLINE bits steps_of(const part *p) {
    return ((uint32_t)p->head + FIRST_LANES * (uint32_t)p->a->heads) * COLUMN;
}

/* The scores of a query become its weights, as dropout leaves them; returns the logarithm of their sum. */
static float soften(const part *p, long query, float *s) {
    const short_attention *a = p->a;
    vec most = all(-INFINITY), sum = {0};
    for (long i = 0; i < p->ld; i += LANES) {
        ints in = seen(i, p->keys);
        vec v = load(s + i) * a->scaling;
        v = (vec)(((ints)v & in) | ((ints)all(-INFINITY) & ~in));
        store(s + i, v);
        most = greater(v, most);
    }
    float peak = largest(most);
    for (long i = 0; i < p->ld; i += LANES) {
        vec weight = exponential_down(load(s + i) - peak);
        sum += weight;
        store(s + i, weight);
    }
    float whole = total(sum), factor = 1 / whole;
    uint32_t word = a->drop.keys ? word_of(&a->drop, query) : 0;
    bits steps = steps_of(p);
    for (long i = 0; i < p->ld; i += LANES) {
        vec weight = load(s + i) * factor;
        if (a->drop.keys) {
            weight *= kept(&a->drop, word, steps);
            steps += (uint32_t)(LANES * a->heads) * COLUMN;
        }
        store(s + i, weight);
    }
    return peak + logf(whole);
}

static void attend(const part *p, float *room) {
    const short_attention *a = p->a;
    long dim = a->dim, ld = p->ld;
    float *scores = room + dim * ld;
    turn_lines(p->k, p->keys, dim, ld, room);
    for (long row = 0; row < p->queries; row += HIGH) {
        long rows = p->queries - row < HIGH ? p->queries - row : HIGH, line = p->query + row;
        strip_times((operand){p->q.at + row * p->q.ld, p->q.ld, 1}, room, ld, rows, ld / LANES, dim, scores, ld, 1);
        for (long j = 0; j < rows; j++)
            a->log_sum.at[(line + j) * a->log_sum.ld + p->head] = soften(p, line + j, scores + j * ld);
        strip_times((operand){scores, ld, 1}, p->v.at, p->v.ld, rows, dim / LANES, p->keys,
                    a->out.at + line * a->out.ld + p->column, a->out.ld, 1);
    }
}

void short_work(team of, const short_attention *a, float *room) {
    for (long i = of.me; i < a->texts * a->heads; i += of.size) {
        part p = part_at(a, i);
        attend(&p, room);
    }
}

/* weight: scores, become weights as they met the values; slope: gradients of weights, become those of scores. */
static void soften_back(const part *p, long query, float *weight, float *slope) {
    const short_attention *a = p->a;
    const float *out = a->out.at + query * a->out.ld + p->column, *grad = a->grad.at + query * a->grad.ld + p->column;
    vec sum = {0};
    for (long i = 0; i < a->dim; i += LANES) sum += load(out + i) * load(grad + i);
    float common = total(sum), log_sum = a->log_sum.at[query * a->log_sum.ld + p->head];
    uint32_t word = a->drop.keys ? word_of(&a->drop, query) : 0;
    bits steps = steps_of(p);
    for (long i = 0; i < p->ld; i += LANES) {
        vec v = exponential_down(load(weight + i) * a->scaling - log_sum), keep = all(1);
        v = (vec)((ints)v & seen(i, p->keys));
        if (a->drop.keys) {
            keep = kept(&a->drop, word, steps);
            steps += (uint32_t)(LANES * a->heads) * COLUMN;
        }
        store(slope + i, v * (keep * load(slope + i) - common) * a->scaling);
        store(weight + i, v * keep);
    }
}

/* Queries first .. first + count - 1 of a part: their gradients, and what they add to those of keys and values. */
static void attend_back(const part *p, long first, long count, float *room) {
    const short_attention *a = p->a;
    long dim = a->dim, ld = p->ld, vecs = dim / LANES, begin = p->query + first;
    float *weights = room + 2 * dim * ld, *slopes = weights + SHORT_QUERIES * ld;
    const float *q = p->q.at + first * p->q.ld, *grad = a->grad.at + begin * a->grad.ld + p->column;
    float *grad_q = a->grad_q.at + begin * a->grad_q.ld + p->column;
    for (long row = 0; row < count; row += HIGH) {
        long rows = count - row < HIGH ? count - row : HIGH;
        float *weight = weights + row * ld, *slope = slopes + row * ld;
        strip_times((operand){q + row * p->q.ld, p->q.ld, 1}, room, ld, rows, ld / LANES, dim, weight, ld, 1);
        strip_times((operand){grad + row * a->grad.ld, a->grad.ld, 1}, room + dim * ld, ld, rows, ld / LANES, dim,
                    slope, ld, 1);
        for (long j = 0; j < rows; j++) soften_back(p, begin + row + j, weight + j * ld, slope + j * ld);
        strip_times((operand){slope, ld, 1}, p->k.at, p->k.ld, rows, vecs, p->keys, grad_q + row * a->grad_q.ld,
                    a->grad_q.ld, 1);
    }
    for (long row = 0; row < p->keys; row += HIGH) {
        long rows = p->keys - row < HIGH ? p->keys - row : HIGH, line = p->key + row;
        strip_times((operand){slopes + row, 1, ld}, q, p->q.ld, rows, vecs, count,
                    a->grad_k.at + line * a->grad_k.ld + p->column, a->grad_k.ld, !first);
        strip_times((operand){weights + row, 1, ld}, grad, a->grad.ld, rows, vecs, count,
                    a->grad_v.at + line * a->grad_v.ld + p->column, a->grad_v.ld, !first);
    }
}

void short_back_work(team of, const short_attention *a, float *room) {
    for (long i = of.me; i < a->texts * a->heads; i += of.size) {
        part p = part_at(a, i);
        turn_lines(p.k, p.keys, a->dim, p.ld, room);
        turn_lines(p.v, p.keys, a->dim, p.ld, room + a->dim * p.ld);
        for (long first = 0; first < p.queries; first += SHORT_QUERIES) {
            long left = p.queries - first;
            attend_back(&p, first, left < SHORT_QUERIES ? left : SHORT_QUERIES, room);
        }
    }
}
