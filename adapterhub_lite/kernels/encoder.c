/* The layers of an encoder built as BERT is, all in float32: texts one after another, without padding, each with an
   adapter of its own or none. A block of whole texts goes through all layers while it stays in the second cache; threads
   take blocks of their own, or, where there are too few, share each. */

#include <math.h>

#include "tall.h"

#define SPARE LANES /* floats between lines, so that equal columns do not share places of the first cache */

/* The parts of one layer; a norm is its weight, then its bias. */
typedef struct {
    product q, k, v, out, up, down;
    const float *attended[2], *norm[2];
} layer;

/* What tokens begin as: the norm of word + kind + position; without words they are given. */
typedef struct {
    const float *words, *kind, *positions, *norm[2];
} embedding;

typedef struct {
    long layers, hidden, heads, dim, inner;
    float eps, scaling;
    long act;
    const layer *stack;
    embedding first;
} encoder;

/* Blocks: the texts at[i] .. at[i + 1] - 1 of each; together: whether the threads share each. */
typedef struct {
    long count;
    const long *at;
    long together;
} cuts;

/* begin, read_begin [texts + 1]: where the tokens of each text begin, and those of them that are read, whose numbers
   are read [...]; owner [texts]: its adapter, or -1. word, position: of each token. whole: blocks up to the last
   attention; ends: of the tokens that are read, from there on. */
typedef struct {
    const long *begin, *read_begin, *read, *owner, *word, *position;
    cuts whole, ends;
} texts;

/* changes [adapter][4 * layers]: of q k v, out, up, down of each layer. width: the largest of any adapter. */
typedef struct {
    const change *changes;
    long width;
} adapters;

/* For each block that is computed at once `each` floats and 2 * tokens tiles; for each thread `scores` floats.
   tokens: those of the largest block. */
typedef struct {
    float *lines, *own;
    tile *tiles;
    long tokens, each, scores;
} room;

/* x [tokens, hidden]: the embeddings, where they are given; out [read, hidden], seen [read, heads * dim]. */
typedef struct {
    const encoder *e;
    const texts *in;
    const adapters *by;
    const room *r;
    const float *x;
    float *out, *seen;
} job;

/* What lies in the room of a block, a line a token. */
typedef struct {
    lines x, added, qkv, seen, inner, low;
    pieces rows, read;
    float *scores;
} block;

/* Cut texts first .. end - 1 into pieces of neighbouring rows of one adapter. */
static pieces cut(const long *begin, const long *owner, long first, long end, tile *to) {
    long count = 0, base = begin[first];
    for (long text = first; text < end;) {
        long from = begin[text], by = owner[text];
        while (text < end && owner[text] == by) text++;
        long rows = begin[text] - from, parts = (rows + PIECE - 1) / PIECE;
        for (long i = 0; i < parts; i++) {
            long at = rows * i / parts;
            to[count++] = (tile){from - base + at, rows * (i + 1) / parts - at, by};
        }
    }
    return (pieces){to, count};
}

static block block_at(const job *j, long number, long thread) {
    const encoder *e = j->e;
    block b = {.scores = j->r->own + thread * j->r->scores};
    float *at = j->r->lines + number * j->r->each;
    long widths[] = {e->hidden, e->hidden, 3 * e->heads * e->dim, e->heads * e->dim, e->inner, j->by->width};
    lines *parts[] = {&b.x, &b.added, &b.qkv, &b.seen, &b.inner, &b.low};
    for (int i = 0; i < 6; i++) {
        *parts[i] = (lines){at, widths[i] + SPARE};
        at += j->r->tokens * (widths[i] + SPARE);
    }
    return b;
}

/* x = the norm of x + added (arXiv 1607.06450). */
INLINE void norm(const float *const *weights, float eps, float *x, const float *added, long n) {
    vec sum = {0}, squares = {0};
    for (long i = 0; i < n; i += LANES) {
        vec v = load(x + i) + load(added + i);
        store(x + i, v);
        sum += v;
    }
    float mean = total(sum) / n;
    for (long i = 0; i < n; i += LANES) squares += (load(x + i) - mean) * (load(x + i) - mean);
    float scale = 1 / sqrtf(total(squares) / n + eps);
    for (long i = 0; i < n; i += LANES)
        store(x + i, (load(x + i) - mean) * scale * load(weights[0] + i) + load(weights[1] + i));
}

static void norm_work(team of, const float *const *weights, float eps, lines x, lines added, long rows, long n) {
    for (long t = share(rows, of.me, of); t < share(rows, of.me + 1, of); t++)
        norm(weights, eps, x.at + t * x.ld, added.at + t * added.ld, n);
    meet(of);
}

/* x = the embeddings of tokens begin, ... */
static void embed_work(team of, const job *j, long begin, long rows, lines x) {
    const embedding *by = &j->e->first;
    long n = j->e->hidden;
    for (long t = share(rows, of.me, of); t < share(rows, of.me + 1, of); t++) {
        float *to = x.at + t * x.ld;
        if (!by->words) {
            memcpy(to, j->x + (begin + t) * n, n * sizeof(float));
            continue;
        }
        const float *word = by->words + j->in->word[begin + t] * n;
        for (long i = 0; i < n; i += LANES) store(to + i, by->kind ? load(word + i) + load(by->kind + i) : load(word + i));
        norm(by->norm, j->e->eps, to, by->positions + j->in->position[begin + t] * n, n);
    }
    meet(of);
}

/* x times the factors that adapters have for it. */
static void scale_work(team of, pieces rows, site at, lines x, long n) {
    for (long i = of.me; i < rows.count; i += of.size) {
        const tile *some = rows.all + i;
        const float *scale = some->owner < 0 ? 0 : at.changes[some->owner * at.stride].scale;
        for (long t = some->first; scale && t < some->first + some->count; t++)
            for (long j = 0; j < n; j++) x.at[t * x.ld + j] *= scale[j];
    }
    meet(of);
}

/* y = act(x W^T) and what the adapters change of it. */
static void site_work(team of, const product *w, pieces rows, site at, lines x, lines low, int act, lines y) {
    low_work(of, rows, at, x, w->k, low);
    meet(of);
    tall_work(of, w, rows, at, 0, x, low, act, y);
    meet(of);
}

/* seen = the attention of the queries in b->qkv, those of all tokens of texts first .. end - 1 or of those read. */
static void attend_work(team of, const job *j, long first, long end, const long *queries, const block *b, lines seen) {
    const encoder *e = j->e;
    const long *begin = j->in->begin;
    attention how = {e->heads, e->dim, e->scaling};
    lines q = b->qkv, k = {q.at + e->heads * e->dim, q.ld}, v = {k.at + e->heads * e->dim, q.ld};
    for (long text = first; text < end; text++) {
        long row = begin[text] - begin[first], query = queries[text] - queries[first];
        ragged_work(of, &how, from(q, query), from(k, row), from(v, row), queries[text + 1] - queries[text],
                    begin[text + 1] - begin[text], b->scores, from(seen, query));
    }
    meet(of);
}

/* x becomes what follows from it and from what was seen: the rest of a layer. */
static void rest_work(team of, const encoder *e, const layer *l, const site *at, pieces rows, long count, lines seen,
                      const block *b, lines x) {
    scale_work(of, rows, at[1], seen, e->heads * e->dim);
    site_work(of, &l->out, rows, at[1], seen, b->low, NO_ACT, b->added);
    norm_work(of, l->attended, e->eps, x, b->added, count, e->hidden);
    site_work(of, &l->up, rows, at[2], x, b->low, (int)e->act, b->inner);
    scale_work(of, rows, at[3], b->inner, e->inner);
    site_work(of, &l->down, rows, at[3], b->inner, b->low, NO_ACT, b->added);
    norm_work(of, l->norm, e->eps, x, b->added, count, e->hidden);
}

/* One layer of a block; the last one up to its attention, of the tokens that are read, which go to `out` and `seen`. */
static void layer_work(team of, const job *j, long i, long first, long end, const block *b) {
    const encoder *e = j->e;
    const texts *in = j->in;
    const layer *l = e->stack + i;
    int last = i == e->layers - 1;
    long width = e->heads * e->dim, begin = in->begin[first], read = in->read_begin[first];
    pieces some = last ? b->read : b->rows;
    lines x = b->x, seen = b->seen;
    site at[4];
    for (int s = 0; s < 4; s++) at[s] = (site){j->by->changes + 4 * i + s, 4 * e->layers};
    low_work(of, b->rows, at[0], b->x, e->hidden, b->low);
    meet(of);
    tall_work(of, &l->k, b->rows, at[0], 1, b->x, b->low, NO_ACT, (lines){b->qkv.at + width, b->qkv.ld});
    tall_work(of, &l->v, b->rows, at[0], 2, b->x, b->low, NO_ACT, (lines){b->qkv.at + 2 * width, b->qkv.ld});
    if (last) {
        x = (lines){j->out + read * e->hidden, e->hidden};
        seen = (lines){j->seen + read * width, width};
        long count = in->read_begin[end] - read;
        for (long t = share(count, of.me, of); t < share(count, of.me + 1, of); t++)
            memcpy(x.at + t * x.ld, b->x.at + (in->read[read + t] - begin) * b->x.ld, e->hidden * sizeof(float));
        meet(of);
        low_work(of, some, at[0], x, e->hidden, b->low);
        meet(of);
    }
    tall_work(of, &l->q, some, at[0], 0, x, b->low, NO_ACT, b->qkv);
    meet(of);
    attend_work(of, j, first, end, last ? in->read_begin : in->begin, b, seen);
    if (!last) rest_work(of, e, l, at, some, in->begin[end] - begin, seen, b, x);
}

static void whole_work(team of, const job *j, long first, long end, block *b, tile *tiles) {
    const texts *in = j->in;
    b->rows = cut(in->begin, in->owner, first, end, tiles);
    b->read = cut(in->read_begin, in->owner, first, end, tiles + j->r->tokens);
    embed_work(of, j, in->begin[first], in->begin[end] - in->begin[first], b->x);
    for (long i = 0; i < j->e->layers; i++) layer_work(of, j, i, first, end, b);
}

static void end_work(team of, const job *j, long first, long end, block *b, tile *tiles) {
    const encoder *e = j->e;
    const texts *in = j->in;
    long i = e->layers - 1, read = in->read_begin[first], width = e->heads * e->dim;
    site at[4];
    for (int s = 0; s < 4; s++) at[s] = (site){j->by->changes + 4 * i + s, 4 * e->layers};
    b->read = cut(in->read_begin, in->owner, first, end, tiles);
    rest_work(of, e, e->stack + i, at, b->read, in->read_begin[end] - read, (lines){j->seen + read * width, width}, b,
              (lines){j->out + read * e->hidden, e->hidden});
}

typedef void (*work)(team, const job *, long, long, block *, tile *);

/* To be called by all threads: each takes blocks of its own, or all of them share each. */
static void each_block(team all, const job *j, const cuts *c, work do_block) {
    tile *tiles = j->r->tiles + all.me * 2 * j->r->tokens;
    if (c->together) {
        block b = block_at(j, 0, all.me);
        for (long i = 0; i < c->count; i++) do_block(all, j, c->at[i], c->at[i + 1], &b, tiles);
    } else {
        block b = block_at(j, all.me, all.me);
#pragma omp for schedule(dynamic, 1)
        for (long i = 0; i < c->count; i++) do_block((team){0, 1}, j, c->at[i], c->at[i + 1], &b, tiles);
    }
}

/* Whether 24 sums of 16 floats find place in registers. */
int ahl_wide_registers(void) {
#ifdef __AVX512F__
    return 1;
#else
    return 0;
#endif
}

/* out [read, hidden] = what leaves the last layer at the tokens that are read; seen: room [read, heads * dim]. */
void ahl_encode(const encoder *e, const texts *in, const adapters *by, const room *r, const float *x, float *out,
                float *seen, int threads) {
    job j = {e, in, by, r, x, out, seen};
#pragma omp parallel num_threads(threads)
    {
        team all = {0, 1};
#ifdef _OPENMP
        extern int omp_get_thread_num(void), omp_get_num_threads(void);
        all = (team){omp_get_thread_num(), omp_get_num_threads()};
#endif
        each_block(all, &j, &in->whole, whole_work);
        meet(all);
        each_block(all, &j, &in->ends, end_work);
    }
}
