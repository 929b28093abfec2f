/* Products of many rows with a frozen float32 matrix in panels of 48 outputs: for each input, the 48 weights of a panel
   stand together, or are put so a strip at a time. Eight rows and a panel make 24 sums, which with three weights and one value fill the registers: a
   value and three weights are read for each 24 products. What an adapter adds is summed in the same registers, and
   y = act((x W^T) (1 + gain) + low up + biases) is written once. A row's sums have one order, whatever rows are beside
   it. */

#include "laying.h"

#define STRIP 384 /* inputs that are summed before they join the total; their weights stay in the second cache */

/* Unrolled, so that the sums stay in registers. */
#define EACH_ROW _Pragma("GCC unroll 8") for (int t = 0; t < rows; t++)
#define EACH_VEC _Pragma("GCC unroll 3") for (int u = 0; u < vecs; u++)

/* gelu(v) = v/2 (1 + erf(v / sqrt 2)) = max(v, 0) - |v|/2 erfc(|v| / sqrt 2), where erfc is Abramowitz and Stegun's
   7.1.26, within 1.5e-7. */
INLINE vec gelu(vec v) {
    vec size = at_most((vec)((ints)v & 0x7fffffff), 13.0f), below = size * 0.2316418965f + 1.0f;
#ifdef __AVX512F__
    vec t = (vec)_mm512_rcp14_ps((__m512)below);
    t *= 2.0f - below * t;
#else
    vec t = 1.0f / below;
#endif
    vec sum = t * 0.5307027145f - 0.7265760135f;
    sum = sum * t + 0.7107068705f;
    sum = sum * t - 0.142248368f;
    sum = sum * t + 0.127414796f;
    return at_least(v, 0) - size * t * sum * power_of_two(size * size * -0.7213475204f);
}

static void act_on(int act, lines y, long rows, long width) {
    for (long t = 0; t < rows; t++)
        for (long i = 0; i < width; i += LANES) {
            float *at = y.at + t * y.ld + i;
            vec v = load_some(at, width - i);
            store_some(at, act == GELU ? gelu(v) : at_least(v, 0), width - i);
        }
}

/* One strip of one panel: its inputs, its outputs' number, its weights, where the next weights lie. */
typedef struct {
    long begin, end, column, width;
    const float *w;
    const char *soon;
    long step;
    int more, last; /* whether y has something to add to; whether no inputs follow */
} strip;

INLINE void load_vecs(int vecs, const float *p, long width, vec *v) {
    EACH_VEC v[u] = load_some(p + u * LANES, width - u * LANES);
}

INLINE void change_sums(int rows, const member *by, long n, const strip *s, const float *low, long ld, vec *sum) {
    const int vecs = VECS;
    vec w[VECS];
    if (by->gain) {
        load_vecs(VECS, by->gain + s->column, s->width, w);
        EACH_ROW EACH_VEC sum[t * VECS + u] += sum[t * VECS + u] * w[u];
    }
    for (long r = 0; by->up && r < by->rank; r++) {
        load_vecs(VECS, by->up + r * n + s->column, s->width, w);
        EACH_ROW EACH_VEC sum[t * VECS + u] += w[u] * low[t * ld + by->first + r];
    }
    if (by->bias) {
        load_vecs(VECS, by->bias + s->column, s->width, w);
        EACH_ROW EACH_VEC sum[t * VECS + u] += w[u];
    }
}

/* y, at the panel's first column, of some rows. */
INLINE void sums(int rows, const product *w, const strip *s, const member *by, lines x, lines low, lines y) {
    const int vecs = VECS;
    vec sum[PIECE * VECS], some[VECS];
    EACH_ROW EACH_VEC sum[t * VECS + u] = (vec){0};
    const float *at = s->w;
    const char *soon = s->soon;
    for (long i = s->begin; i < s->end; i++) {
        __builtin_prefetch(soon, 0, 2);
        soon += s->step;
        EACH_VEC some[u] = load(at + u * LANES);
        at += PANEL;
        EACH_ROW {
            float v = x.at[t * x.ld + i];
            EACH_VEC sum[t * VECS + u] += some[u] * v;
        }
    }
    if (s->more) EACH_ROW {
        load_vecs(VECS, y.at + t * y.ld, s->width, some);
        EACH_VEC sum[t * VECS + u] += some[u];
    }
    if (s->last && by) change_sums(rows, by, w->n, s, low.at, low.ld, sum);
    if (s->last && w->bias) {
        load_vecs(VECS, w->bias + s->column, s->width, some);
        EACH_ROW EACH_VEC sum[t * VECS + u] += some[u];
    }
    EACH_ROW EACH_VEC store_some(y.at + t * y.ld + u * LANES, sum[t * VECS + u], s->width - u * LANES);
}

#define CASE(N) case N: FUNCTION(N); break;
#define BY_ROWS(rows)                                                                                                  \
    switch (rows) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) default: FUNCTION(8); }

#define FUNCTION(N) sums(N, w, s, by, x, low, y)
static void sums_of(long rows, const product *w, const strip *s, const member *by, lines x, lines low, lines y) {
    BY_ROWS(rows)
}
#undef FUNCTION

/* One strip of a panel, in `room` where it is not laid already. */
static const float *laid(const product *w, long number, const strip *s, float *room) {
    const float *all = (const float *)w->panels;
    if (w->format == LAID) return all + (number * w->k + s->begin) * PANEL;
    if (w->format == OUTPUT_LINES) lay_outputs(all, w->k, w->n, s->column, s->begin, s->end, room);
    if (w->format == INPUT_LINES) lay_inputs(all, w->n, w->n, s->column, 1, s->begin, s->end, room);
    return room;
}

/* Ask for a share of what the strip after this one will be put together from. */
static void ask(const product *w, const strip *s, long share, long shares) {
    long begin = s->last ? 0 : s->end, end = begin + STRIP < w->k ? begin + STRIP : w->k;
    long column = s->last ? s->column + PANEL : s->column, width = w->n - column < PANEL ? w->n - column : PANEL;
    long outputs = w->format == OUTPUT_LINES, rows = outputs ? width : end - begin, length = outputs ? end - begin : width;
    long each = (length + LANES - 1) / LANES, all = width > 0 ? rows * each : 0;
    const float *from = (const float *)w->panels + (outputs ? column * w->k + begin : begin * w->n + column);
    for (long i = all * share / shares; i < all * (share + 1) / shares; i++)
        __builtin_prefetch(from + i / each * (outputs ? w->k : w->n) + i % each * LANES, 0, 2);
}

static void panel(const product *w, long number, pieces rows, site at, long which, lines x, lines low, int add,
                  int act, lines y) {
    float room[STRIP * PANEL] __attribute__((aligned(64)));
    strip s = {.column = number * PANEL, .step = (PANEL * sizeof(float) + rows.count - 1) / rows.count};
    s.width = w->n - s.column < PANEL ? w->n - s.column : PANEL;
    if (w->format != LAID) s.step = 0;
    for (s.begin = 0; s.begin < w->k; s.begin = s.end) {
        s.end = s.begin + STRIP < w->k ? s.begin + STRIP : w->k;
        s.w = laid(w, number, &s, room);
        s.more = add || s.begin;
        s.last = s.end == w->k;
        for (long i = 0; i < rows.count; i++) {
            const tile *some = rows.all + i;
            if (w->format != LAID) ask(w, &s, i, rows.count);
            const member *by = some->owner < 0 || !at.changes ? 0 : at.changes[some->owner * at.stride].members + which;
            lines to = {y.at + some->first * y.ld + s.column, y.ld};
            s.soon = (const char *)(s.w + (s.end - s.begin) * PANEL) + i * s.step * (s.end - s.begin);
            sums_of(some->count, w, &s, by, from(x, some->first), from(low, some->first), to);
            if (act && s.last) act_on(act, to, some->count, s.width);
        }
    }
}

static void all_panels(team of, const product *w, pieces rows, site at, long number, lines x, lines low, int add,
                       int act, lines y) {
    long panels = (w->n + PANEL - 1) / PANEL, end = share(rows.count ? panels : 0, of.me + 1, of);
    for (long p = share(panels, of.me, of); p < end; p++) panel(w, p, rows, at, number, x, low, add, act, y);
}

void tall_work(team of, const product *w, pieces rows, site at, long number, lines x, lines low, int act, lines y) {
    all_panels(of, w, rows, at, number, x, low, 0, act, y);
}

void tall_sum(team of, const product *w, pieces rows, site at, lines x, lines low, int add, lines y) {
    all_panels(of, w, rows, at, 0, x, low, add, NO_ACT, y);
}

/* Up to 48 columns, `left` or fewer, of low for some rows. */
INLINE void columns(int rows, int vecs, const float *down, long width, long left, lines x, long k, lines low) {
    vec sum[PIECE * VECS], some[VECS];
    EACH_ROW EACH_VEC sum[t * VECS + u] = (vec){0};
    for (long i = 0; i < k; i++) {
        load_vecs(vecs, down + i * width, left, some);
        EACH_ROW {
            float v = x.at[t * x.ld + i];
            EACH_VEC sum[t * VECS + u] += some[u] * v;
        }
    }
    EACH_ROW EACH_VEC store_some(low.at + t * low.ld + u * LANES, sum[t * VECS + u], left - u * LANES);
}

#define FUNCTION(N)                                                                                                    \
    if (left <= LANES) columns(N, 1, down, width, left, x, k, low);                                                    \
    else columns(N, VECS, down, width, left, x, k, low)
static void columns_of(long rows, const float *down, long width, long left, lines x, long k, lines low) {
    BY_ROWS(rows)
}
#undef FUNCTION

void low_work(team of, pieces rows, site at, lines x, long k, lines low) {
    long end = share(rows.count, of.me + 1, of);
    for (const tile *some = rows.all + share(rows.count, of.me, of); some < rows.all + end; some++) {
        const change *by = some->owner < 0 ? 0 : at.changes + some->owner * at.stride;
        for (long j = 0; by && by->down && j < by->width; j += PANEL) {
            lines to = {low.at + some->first * low.ld + j, low.ld};
            columns_of(some->count, by->down + j, by->width, by->width - j, from(x, some->first), k, to);
        }
    }
}
