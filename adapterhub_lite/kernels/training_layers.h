/* What the forward and the backward of an encoder's layers share: the job, where everything lies, tables of changes. */

#ifndef AHL_TRAINING_LAYERS_H
#define AHL_TRAINING_LAYERS_H

#include <stdlib.h>

#include "training_encoder.h"
#include "training_rows.h"

#define SPARE LANES /* floats between lines, so that equal columns do not share places of the first cache */
#define SITES 4     /* of a layer: q k v, out, up, down */

/* What a place drops, see `dropout`. */
typedef struct {
    long threshold;
    float scale;
} rate;

enum { SEEN, ATTENDED, MADE }; /* places of a layer that drop */

/* A norm is its weight, then its bias. */
typedef struct {
    product q, k, v, out, up, down;
    const float *attended[2], *made[2];
    float attended_eps, made_eps;
    rate rates[3];
} layer;

/* Neighbouring tokens of one learner. */
typedef struct {
    long first, end, learner;
} segment;

/* What is computed for: all tokens, or those that are read. begin [texts + 1]. */
typedef struct {
    long count, segment_count;
    const segment *segments;
    const int64_t *keys, *indices;
    const long *begin;
} crowd;

/* lowest: the first layer whose backward is wanted. A place that drops has the number places * layer + its salt.
   groups [learner][layer][SITES]; longest: tokens of a text; low: the most that a group's ranks are together. */
typedef struct {
    long layers, width, heads, dim, inner;
    float scaling;
    const layer *stack;
    long learners;
    const trained_group *groups;
    long texts, longest, low, training, drops, lowest, places, salts[3];
    crowd all, read;
    const int64_t *chosen;
    float *room;
    long floats; /* of the room: found by ahl_encoder_room */
    const float *x, *grad;
    float *out, *below;
} job;

/* What is kept of a layer. */
typedef struct {
    lines qkv, hidden[SITES], seen, log_sum, attended_total, middle, up, made_total, out;
    float *means[2], *inverses[2];
} kept_layer;

/* Of all layers: what one gives the next, and the tables of changes: [learner][layer][SITES], slopes [...]
   [MEMBERS]. */
typedef struct {
    const job *j;
    kept_layer *kept;
    lines delta, chosen_x, chosen_q, chosen_low, total, rest, active, inner, seen, qkv, query, slope, below;
    float *own;
    change *forward, *back, *slopes;
    tile *tiles;
    pieces all, read;
    long *starts; /* of the segments' tiles: of all, then of the read ones */
    void *memory;
} stage;

INLINE long slots_of(const job *j) {
    long lowest = j->lowest > 0 ? j->lowest : 0;
    return j->training ? (lowest < 2 ? lowest : 2) + j->layers - lowest : 2;
}

INLINE long slot_of(const job *j, long i) {
    long lowest = j->lowest > 0 ? j->lowest : 0;
    return j->training && i >= lowest ? (lowest < 2 ? lowest : 2) + i - lowest : i % 2;
}

INLINE lines carve(float **at, long rows, long width) {
    lines l = {*at, width + SPARE};
    *at += rows * l.ld;
    return l;
}

INLINE kept_layer carve_layer(const job *j, float **at) {
    long n = j->all.count, width = j->width;
    kept_layer k = {carve(at, n, 3 * width)};
    for (int s = 0; s < SITES; s++) k.hidden[s] = carve(at, n, j->low);
    k.log_sum = carve(at, n, j->heads);
    lines *narrow[] = {&k.seen, &k.attended_total, &k.middle, &k.made_total, &k.out};
    for (int i = 0; i < 5; i++) *narrow[i] = carve(at, n, width);
    k.up = carve(at, n, j->inner);
    for (int i = 0; i < 2; i++) {
        k.means[i] = carve(at, n, 0).at;
        k.inverses[i] = carve(at, n, 0).at;
    }
    return k;
}

INLINE long own_floats(const job *j) { return short_room(j->longest, j->dim) + LANES; }

/* Lay everything out from room; returns how many floats it takes. */
INLINE long lay_out(const job *j, stage *s, long threads) {
    float *at = j->room;
    long n = j->all.count, read = j->read.count, width = j->width;
    for (long i = 0; i < slots_of(j); i++) s->kept[i] = carve_layer(j, &at);
    lines *narrow[] = {&s->delta, &s->total, &s->rest, &s->below};
    lines *few[] = {&s->chosen_x, &s->chosen_q, &s->query};
    for (int i = 0; i < 4; i++) *narrow[i] = carve(&at, n, width);
    for (int i = 0; i < 3; i++) *few[i] = carve(&at, read, width);
    /* Attention's gradients come when those of the feed-forward part have been read. */
    float *feed = at;
    s->active = carve(&at, n, j->inner);
    s->qkv = carve(&feed, n, 3 * width);
    if (at < feed) at = feed;
    s->seen = s->rest;
    s->inner = carve(&at, n, j->inner);
    s->slope = carve(&at, n, j->low);
    s->chosen_low = carve(&at, read, j->low);
    s->own = at;
    return at + threads * own_floats(j) - j->room;
}

/* Pieces of neighbouring tokens of one learner; starts [segments + 1]: where those of each segment begin. */
INLINE pieces cut(const crowd *c, tile *to, long *starts) {
    long count = 0;
    for (long i = 0; i < c->segment_count; i++) {
        const segment *s = c->segments + i;
        long rows = s->end - s->first, parts = (rows + PIECE - 1) / PIECE;
        starts[i] = count;
        for (long p = 0; p < parts; p++) {
            long at = rows * p / parts;
            to[count++] = (tile){s->first + at, rows * (p + 1) / parts - at, s->learner};
        }
    }
    starts[c->segment_count] = count;
    return (pieces){to, count};
}

INLINE void fill_changes(const job *j, stage *s) {
    for (long i = 0; i < j->learners * j->layers * SITES; i++) {
        const trained_group *g = j->groups + i;
        s->forward[i] = (change){g->width ? g->down : 0, g->width};
        s->back[i] = (change){0, 0};
        if (g->width) s->back[i].members[0] = (member){g->lines, g->width};
        for (int m = 0; m < MEMBERS; m++) {
            const trained *t = g->members + m;
            if (t->a) s->forward[i].members[m] = (member){t->up, t->rank, t->first};
            s->slopes[i * MEMBERS + m] = (change){t->a ? t->b : 0, t->a ? t->rank : 0};
        }
    }
}

/* Whether there was room for the tables. */
INLINE int begin(const job *j, stage *s, long threads) {
    long groups = j->learners * j->layers * SITES, tiles = j->all.count + j->read.count + 1;
    long starts = j->all.segment_count + j->read.segment_count + 2, kept = slots_of(j);
    char *at = s->memory = malloc(kept * sizeof(kept_layer) + groups * (2 + MEMBERS) * sizeof(change) +
                                  tiles * sizeof(tile) + starts * sizeof(long));
    if (!at) return 0;
    s->j = j;
    s->kept = (kept_layer *)at;
    s->forward = (change *)(s->kept + kept);
    s->back = s->forward + groups;
    s->slopes = s->back + groups;
    s->tiles = (tile *)(s->slopes + MEMBERS * groups);
    s->starts = (long *)(s->tiles + tiles);
    lay_out(j, s, threads);
    s->all = cut(&j->all, s->tiles, s->starts);
    s->read = cut(&j->read, s->tiles + s->all.count, s->starts + j->all.segment_count + 1);
    fill_changes(j, s);
    return 1;
}

/* Who computes from layer i's attention on. */
INLINE int is_last(const stage *s, long i) { return i == s->j->layers - 1; }
INLINE const crowd *crowd_of(const stage *s, int read) { return read ? &s->j->read : &s->j->all; }

INLINE site site_of(const stage *s, const change *changes, long i, long which) {
    return (site){changes + SITES * i + which, SITES * s->j->layers};
}

INLINE dropout drop_of(const stage *s, const crowd *c, long i, int place) {
    const job *j = s->j;
    rate r = j->stack[i].rates[place];
    if (!j->drops || !r.threshold) return (dropout){0};
    return (dropout){c->keys, c->indices, j->places * i + j->salts[place], r.threshold, r.scale};
}

INLINE short_attention attention_of(const stage *s, long i, const kept_layer *k) {
    const job *j = s->j;
    const crowd *c = crowd_of(s, is_last(s, i));
    lines q = k->qkv, key = {q.at + j->width, q.ld}, value = {key.at + j->width, q.ld};
    if (is_last(s, i)) q = s->chosen_q;
    return (short_attention){.q = q, .k = key, .v = value, .out = k->seen, .log_sum = k->log_sum, .queries = c->begin,
                             .keys = j->all.begin, .texts = j->texts, .heads = j->heads, .dim = j->dim,
                             .scaling = j->scaling, .drop = drop_of(s, c, i, SEEN)};
}

/* Activations, or with grad gradients through them, of the columns of x that this thread has just made: those panels
   that tall_work gives it. */
INLINE void gelu_work(team of, const crowd *c, lines x, const lines *grad, long n, lines out) {
    long panels = (n + 47) / 48, first = share(panels, of.me, of) * 48, end = share(panels, of.me + 1, of) * 48;
    if (end > n) end = n;
    for (long t = 0; t < c->count && first < end; t++)
        activate_row(IS_GELU, x.at + t * x.ld + first, grad ? grad->at + t * grad->ld + first : 0, end - first,
                     out.at + t * out.ld + first);
}

INLINE lines input_of(const stage *s, long i) {
    return i ? s->kept[slot_of(s->j, i - 1)].out : (lines){(float *)s->j->x, s->j->width};
}

INLINE team team_of(void) {
#ifdef _OPENMP
    extern int omp_get_thread_num(void), omp_get_num_threads(void);
    return (team){omp_get_thread_num(), omp_get_num_threads()};
#else
    return (team){0, 1};
#endif
}

#endif
