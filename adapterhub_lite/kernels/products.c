/* Products of many rows with a frozen float32 matrix as it lies: y (+)= x W^T or x W, with what adapters add to it.

   48 outputs of the matrix are laid into a panel, where for each input their 48 weights stand together; a panel stays in
   the second cache for all rows, so that laying it costs little, and no copy of the matrix is kept. Eight rows and a panel
   make 24 sums, which with three weights and one value fill the registers (see tall.c). What an adapter adds, low up, and
   biases are summed in the same registers. A row's sums have one order, whatever rows are beside it, however many
   threads there are. */

#include <omp.h>

#include "laying.h"

#define CHUNK 1536 /* inputs at most that are summed before they join the total; their panel stays in the second cache */
#define SOON 8     /* inputs whose weights are asked for before they are used */
#define BLOCK 16   /* pieces of rows at least that a panel is laid for */

#define EACH_ROW _Pragma("GCC unroll 8") for (int t = 0; t < rows; t++)
#define EACH_VEC _Pragma("GCC unroll 3") for (int u = 0; u < VECS; u++)

enum { OUTPUTS, INPUTS, PANELS };

/* What an adapter adds to the rows of one segment: low [rows, rank] up [rank, n]; none where up is none. */
typedef struct {
    long end;
    const float *up, *low;
    long rank, ldu, ldl;
} addition;

/* each: floats of the panels that a thread lays at once; all: those and the additions' of as many panels.
   form: what a row of w holds: the weights of one output, or of one input; or panels that are laid already. additions: of rows before each `end`.
   room: of each thread `all` floats; tiles: as many as rows at most. */
typedef struct {
    const float *w;
    long ldw, form, k, n;
    const float *bias, *x;
    long ldx, rows;
    float *y;
    long ldy, add;
    const addition *additions;
    long segments;
    float *room;
    long each, all;
    tile *tiles;
} products;

typedef struct {
    long begin, end, column, width;
    const float *w, *up;
} strip;

/* What an adapter adds by, laid as the panels are. */
static void lay_up(const products *p, const addition *by, long column, long panels, float *to) {
    for (long j = 0; j < panels; j++)
        for (long r = 0; r < by->rank; r++, to += PANEL) EACH_VEC {
            long at = column + j * PANEL + u * LANES;
            store(to + u * LANES, load_some(by->up + r * by->ldu + at, p->n - at));
        }
}

INLINE void load_vecs(const float *p, long width, vec *v) {
    EACH_VEC v[u] = load_some(p + u * LANES, width - u * LANES);
}

INLINE void add_change(int rows, const addition *by, const strip *s, const float *low, vec *sum) {
    vec w[VECS];
    for (long r = 0; r < by->rank; r++) {
        EACH_VEC w[u] = load(s->up + r * PANEL + u * LANES);
        EACH_ROW {
            float v = low[t * by->ldl + r];
            EACH_VEC sum[t * VECS + u] += w[u] * v;
        }
    }
}

/* y, at the panel's first column, of the rows of one tile. */
INLINE void sums(int rows, const products *p, const strip *s, const tile *some) {
    const float *x = p->x + some->first * p->ldx, *at = s->w;
    float *y = p->y + some->first * p->ldy + s->column;
    long ldx = p->ldx, length = s->end - s->begin, part = (length + PIECE - 1) / PIECE;
    vec sum[PIECE * VECS], some_w[VECS];
    EACH_ROW EACH_VEC sum[t * VECS + u] = (vec){0};
    for (long i = s->begin, next = 0; i < s->end; next++) {
        const float *soon = x + (rows + next) * ldx + s->begin;
        long stop = i + part < s->end ? i + part : s->end;
#pragma GCC unroll 4
        for (; i < stop; i++) {
            __builtin_prefetch(soon, 0, 2);
            soon += PIECE;
            EACH_VEC {
                some_w[u] = load(at + u * LANES);
                __builtin_prefetch(at + SOON * PANEL + u * LANES, 0, 3);
            }
            at += PANEL;
            EACH_ROW {
                float v = x[t * ldx + i];
                EACH_VEC sum[t * VECS + u] += some_w[u] * v;
            }
        }
    }
    if (s->begin || p->add) EACH_ROW {
        load_vecs(y + t * p->ldy, s->width, some_w);
        EACH_VEC sum[t * VECS + u] += some_w[u];
    }
    if (s->end == p->k) {
        const addition *by = p->additions + some->owner;
        if (some->owner >= 0 && by->up) add_change(rows, by, s, by->low + some->first * by->ldl, sum);
        if (p->bias) {
            load_vecs(p->bias + s->column, s->width, some_w);
            EACH_ROW EACH_VEC sum[t * VECS + u] += some_w[u];
        }
    }
    EACH_ROW EACH_VEC store_some(y + t * p->ldy + u * LANES, sum[t * VECS + u], s->width - u * LANES);
}

static void sums_of(const products *p, const strip *s, const tile *some) {
#define CASE(N) case N: sums(N, p, s, some); break;
    switch (some->count) { CASE(1) CASE(2) CASE(3) CASE(4) CASE(5) CASE(6) CASE(7) default: sums(8, p, s, some); }
}

/* Panels first .. end - 1 of the rows of some tiles. */
static void group(const products *p, long first, long end, const tile *tiles, long count, float *room, float *ups) {
    strip s = {0};
    for (; s.begin < p->k; s.begin = s.end) {
        s.end = s.begin + CHUNK < p->k ? s.begin + CHUNK : p->k;
        const float *panels = room;
        long apart = (s.end - s.begin) * PANEL;
        if (p->form == INPUTS) lay_inputs(p->w, p->ldw, p->n, first * PANEL, end - first, s.begin, s.end, room);
        for (long i = first; i < end && p->form == OUTPUTS; i++)
            lay_outputs(p->w, p->ldw, p->n, i * PANEL, s.begin, s.end, room + (i - first) * apart);
        if (p->form == PANELS) {
            apart = p->k * PANEL;
            panels = p->w + first * apart + s.begin * PANEL;
        }
        long owner = -1;
        for (long j = 0; j < count; j++) {
            const addition *by = p->additions + tiles[j].owner;
            if (tiles[j].owner != owner && by->up && s.end == p->k) lay_up(p, by, first * PANEL, end - first, ups);
            owner = tiles[j].owner;
            for (long i = first; i < end; i++) {
                s.column = i * PANEL;
                s.width = p->n - s.column < PANEL ? p->n - s.column : PANEL;
                s.w = panels + (i - first) * apart;
                s.up = ups + (i - first) * by->rank * PANEL;
                sums_of(p, &s, tiles + j);
            }
        }
    }
}

/* Cut the rows into pieces of one segment each. */
static long cut(const products *p) {
    long count = 0, from = 0;
    for (long i = 0; i < p->segments; i++) {
        long rows = p->additions[i].end - from, parts = (rows + PIECE - 1) / PIECE;
        for (long j = 0; j < parts; j++) {
            long at = rows * j / parts;
            p->tiles[count++] = (tile){from + at, rows * (j + 1) / parts - at, i};
        }
        from = p->additions[i].end;
    }
    return count;
}

/* How many panels are laid at once, so that all threads end together: each is given at least two groups. */
static long width_of(long panels, long most, long threads) {
    long found = 1, least = 0;
    if (most > panels / (2 * threads)) most = panels / (2 * threads);
    for (long width = 1; width <= most; width++) {
        long groups = (panels + width - 1) / width, work = (groups + threads - 1) / threads * width;
        if (!least || work <= least) {
            found = width;
            least = work;
        }
    }
    return found;
}

void ahl_products(const products *p, int threads) {
    long count = cut(p), panels = (p->n + PANEL - 1) / PANEL;
    long width = width_of(panels, p->each / ((p->k < CHUNK ? p->k : CHUNK) * PANEL), threads);
    long groups = (panels + width - 1) / width, blocks = (count + BLOCK - 1) / BLOCK;
    long parts = (2 * threads + groups - 1) / groups;
    if (parts > blocks) parts = blocks;
#pragma omp parallel num_threads(threads)
    {
        float *room = p->room + (long)omp_get_thread_num() * p->all;
#pragma omp for schedule(dynamic) nowait
        for (long i = 0; i < groups * parts; i++) {
            long first = i / parts * width, end = first + width < panels ? first + width : panels;
            long from = count * (i % parts) / parts, to = count * (i % parts + 1) / parts;
            group(p, first, end, p->tiles + from, to - from, room, room + p->each);
        }
    }
}
