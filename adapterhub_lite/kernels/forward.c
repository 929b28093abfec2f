/* The forward of a decoder built as Llama is, all in float32: tokens of several rows laid one after another, each with
   an adapter of its own or none, their keys and values written to a window that the rows share. */

#include <math.h>

#include "vectors.h"
#include "work.h"

/* The parts of one layer. before, after: weights of the norms; q_norm, k_norm: those of single heads, or none. */
typedef struct {
    product qkv, out, gate_up, down;
    const float *before, *after, *q_norm, *k_norm;
} layer;

typedef struct {
    long layers, hidden, heads, kv_heads, dim, inner;
    float eps, scaling;
    const layer *stack;
    product head;
    const float *norm;
} decoder;

/* keys, values: [layers, rows, kv_heads, columns, dim]; filled: [rows, columns], which of them a row sees. */
typedef struct {
    float *keys, *values;
    const uint8_t *filled;
    long rows, columns;
} window;

/* tokens: how many; row, column: where each stands in the window; cos, sin [tokens, dim]: the angles of its position. */
typedef struct {
    long tokens;
    const long *row, *column;
    const float *cos, *sin;
} text;

/* tiles [count]; changes [adapter][4 * layers + 1]: of qkv, out, gate_up, down of each layer, then of the head.
   width: the largest of any adapter. */
typedef struct {
    long count, width;
    const tile *tiles;
    const change *changes;
} adapters;

/* Room for what is computed on the way, a line a token: normed, added [hidden]; wide [the most of qkv, gate_up];
   inner [the most of heads * dim, inner]; low [adapters.width]. scores: [threads, columns + 16]; begin: [rows]. */
typedef struct {
    float *normed, *added, *wide, *inner, *low, *scores;
    long *begin;
} room;

INLINE float inverse_root(const float *x, long n, float eps) {
    vec squares = {0};
    float rest = 0;
    long i = 0;
    for (; i + LANES <= n; i += LANES) squares += load(x + i) * load(x + i);
    for (; i < n; i++) rest += x[i] * x[i];
    return 1 / sqrtf((total(squares) + rest) / n + eps);
}

/* out = x / sqrt(mean(x^2) + eps) * weight; out may be x (arXiv 1910.07467). */
INLINE void rms_norm(const float *x, const float *weight, float eps, long n, float *out) {
    float scale = inverse_root(x, n, eps);
    for (long i = 0; i < n; i++) out[i] = x[i] * scale * weight[i];
}

/* x += added (or nothing); normed = the norm of x. */
static void norm_work(float *x, const float *added, const float *weight, float eps, long tokens, long n,
                      float *normed) {
#pragma omp for schedule(static)
    for (long t = 0; t < tokens; t++) {
        if (added)
            for (long i = 0; i < n; i++) x[t * n + i] += added[t * n + i];
        rms_norm(x + t * n, weight, eps, n, normed + t * n);
    }
}

/* x [tokens, n] times the factors that adapters have for it. */
static void scale_work(const adapters *by, long site, long stride, float *x, long n) {
#pragma omp for schedule(static)
    for (long t = 0; t < by->count; t++) {
        const float *scale = by->changes[by->tiles[t].owner * stride + site].scale;
        for (long row = 0; scale && row < by->tiles[t].count; row++)
            for (long i = 0; i < n; i++) x[(by->tiles[t].first + row) * n + i] *= scale[i];
    }
}

/* y = x W^T and what the adapters change of it. */
static void site_work(const decoder *d, const product *w, const adapters *by, long site, long members,
                      const long *widths, float *x, const text *of, float *low, float *y, int scales) {
    long stride = 4 * d->layers + 1;
    if (by->count && scales) scale_work(by, site, stride, x, w->k);
    linear_work(w, x, of->tokens, y);
    if (by->count) shrink_work(by->tiles, by->count, by->changes + site, stride, x, w->k, low, by->width);
#pragma omp barrier
    if (by->count)
        expand_work(by->tiles, by->count, by->changes + site, stride, members, widths, w->bias, low, by->width, y,
                    w->n);
}

/* Norm and turn the query and key heads of qkv (arXiv 2104.09864, halves as Llama pairs them); write keys and values. */
static void rotate_work(const decoder *d, const layer *of, float *qkv, const text *in, float *keys, float *values,
                        long columns) {
    long dim = d->dim, half = dim / 2, heads = d->heads, kv_heads = d->kv_heads;
#pragma omp for schedule(static)
    for (long t = 0; t < in->tokens; t++) {
        float *from = qkv + t * (heads + 2 * kv_heads) * dim;
        const float *c = in->cos + t * dim, *s = in->sin + t * dim;
        for (long head = 0; head < heads + kv_heads; head++) {
            float *v = from + head * dim;
            const float *norm = head < heads ? of->q_norm : of->k_norm;
            if (norm) rms_norm(v, norm, d->eps, dim, v);
            for (long i = 0; i < half; i++) {
                float a = v[i], b = v[i + half];
                v[i] = a * c[i] - b * s[i];
                v[i + half] = b * c[i + half] + a * s[i + half];
            }
        }
        for (long head = 0; head < kv_heads; head++) {
            long to = ((in->row[t] * kv_heads + head) * columns + in->column[t]) * dim;
            memcpy(keys + to, from + (heads + head) * dim, dim * sizeof(float));
            memcpy(values + to, from + (heads + kv_heads + head) * dim, dim * sizeof(float));
        }
    }
}

/* out += sum of v [count, dim] weighted by score; 64 of dim at a time, so that four sums go side by side. */
INLINE void mix(const float *v, const float *score, long count, long dim, float share, float *out) {
    for (long i = 0; i < dim; i += 4 * LANES) {
        vec sum[4] = {{0}, {0}, {0}, {0}};
        if (i + 4 * LANES <= dim) {
            for (long c = 0; c < count; c++)
                for (int u = 0; u < 4; u++) sum[u] += load(v + c * dim + i + u * LANES) * score[c];
            for (int u = 0; u < 4; u++) store(out + i + u * LANES, sum[u] * share);
        } else
            for (long j = i; j < dim; j += LANES) {
                sum[0] = (vec){0};
                for (long c = 0; c < count; c++) sum[0] += load(v + c * dim + j) * score[c];
                store(out + j, sum[0] * share);
            }
    }
}

/* One query over `count` columns; score has room for 16 more. */
INLINE void attend(const float *q, const float *k, const float *v, const uint8_t *seen, long count, long dim,
                   float scaling, float *score, float *out) {
    for (long c = 0; c < count; c++) {
        vec sum = {0};
        for (long i = 0; i < dim; i += LANES) sum += load(q + i) * load(k + c * dim + i);
        score[c] = seen[c] ? total(sum) * scaling : -INFINITY;
    }
    for (long c = count; c < count + LANES; c++) score[c] = -INFINITY;
    vec most = all(-INFINITY), sum = {0};
    for (long c = 0; c < count; c += LANES) most = greater(load(score + c), most);
    float peak = largest(most);
    for (long c = 0; c < count; c += LANES) {
        vec weight = exponential(load(score + c) - peak);
        store(score + c, weight);
        sum += weight;
    }
    mix(v, score, count, dim, 1 / total(sum), out);
}

/* Every token sees the columns of its row up to its own. */
static void attend_work(const decoder *d, const float *qkv, const text *in, const float *keys, const float *values,
                        const window *w, const room *r, int thread, float *out) {
    long dim = d->dim, group = d->heads / d->kv_heads;
    float *score = r->scores + thread * (w->columns + LANES);
#pragma omp for schedule(static) collapse(2)
    for (long t = 0; t < in->tokens; t++)
        for (long kv = 0; kv < d->kv_heads; kv++) {
            long row = in->row[t], begin = r->begin[row], count = in->column[t] + 1 - begin;
            long from = ((row * d->kv_heads + kv) * w->columns + begin) * dim;
            for (long head = kv * group; head < (kv + 1) * group; head++)
                attend(qkv + (t * (d->heads + 2 * d->kv_heads) + head) * dim, keys + from, values + from,
                       w->filled + row * w->columns + begin, count, dim, d->scaling, score,
                       out + (t * d->heads + head) * dim);
        }
}

/* out [tokens, n] = silu(gate) * up, where both [tokens, 2n] holds gate and then up (arXiv 2002.05202). */
static void silu_work(const float *both, long tokens, long n, float *out) {
#pragma omp for schedule(static) collapse(2)
    for (long t = 0; t < tokens; t++)
        for (long i = 0; i < n; i += LANES) {
            long count = n - i < LANES ? n - i : LANES;
            vec g = load_part(both + t * 2 * n + i, count, 0), u = load_part(both + t * 2 * n + n + i, count, 0);
            vec v = g / (1 + exponential(-g)) * u;
            memcpy(out + t * n + i, &v, count * sizeof(float));
        }
}

static void begin_work(const window *w, long *begin) {
#pragma omp for schedule(static)
    for (long row = 0; row < w->rows; row++) {
        const uint8_t *seen = w->filled + row * w->columns, *first = memchr(seen, 1, w->columns);
        begin[row] = first ? first - seen : 0;
    }
}

static void layer_work(const decoder *d, long i, const text *in, const adapters *by, const window *w, const room *r,
                       int thread, int scales, float *x) {
    const layer *l = d->stack + i;
    long hidden[] = {d->hidden}, inner[] = {d->inner, d->inner};
    long qkv[] = {d->heads * d->dim, d->kv_heads * d->dim, d->kv_heads * d->dim};
    long of_layer = i * w->rows * d->kv_heads * w->columns * d->dim;
    float *keys = w->keys + of_layer, *values = w->values + of_layer;
    norm_work(x, i ? r->added : 0, l->before, d->eps, in->tokens, d->hidden, r->normed);
    site_work(d, &l->qkv, by, 4 * i, 3, qkv, r->normed, in, r->low, r->wide, scales);
    rotate_work(d, l, r->wide, in, keys, values, w->columns);
    attend_work(d, r->wide, in, keys, values, w, r, thread, r->inner);
    site_work(d, &l->out, by, 4 * i + 1, 1, hidden, r->inner, in, r->low, r->added, scales);
    norm_work(x, r->added, l->after, d->eps, in->tokens, d->hidden, r->normed);
    site_work(d, &l->gate_up, by, 4 * i + 2, 2, inner, r->normed, in, r->low, r->wide, scales);
    silu_work(r->wide, in->tokens, d->inner, r->inner);
    site_work(d, &l->down, by, 4 * i + 3, 1, hidden, r->inner, in, r->low, r->added, scales);
}

/* x [tokens, hidden]: embeddings; becomes what leaves the last layer. logits [wanted, n of the head]: after the tokens
   `which`; their tiles are those of `last`. scales: whether any adapter scales an input. */
void ahl_forward(const decoder *d, const text *in, const adapters *by, const window *w, const room *r, float *x,
                 long wanted, const long *which, const adapters *last, float *logits, int scales, int threads) {
#pragma omp parallel num_threads(threads)
    {
        int thread = 0;
#ifdef _OPENMP
        extern int omp_get_thread_num(void);
        thread = omp_get_thread_num();
#endif
        begin_work(w, r->begin);
        for (long i = 0; i < d->layers; i++) layer_work(d, i, in, by, w, r, thread, scales, x);
#pragma omp for schedule(static)
        for (long t = 0; t < wanted; t++) {
            float *from = x + which[t] * d->hidden;
            for (long i = 0; i < d->hidden; i++) from[i] += r->added[which[t] * d->hidden + i];
            rms_norm(from, d->norm, d->eps, d->hidden, r->normed + t * d->hidden);
        }
        text ends = {wanted};
        long widths[] = {d->head.n};
        site_work(d, &d->head, last, 4 * d->layers, 1, widths, r->normed, &ends, r->low, logits, scales);
    }
}
