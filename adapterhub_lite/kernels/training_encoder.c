/* The layers of an encoder built as BERT is, forward, with adapters that learn: one native call, in float32. All
   threads share each product; every sum has one order, however many there are. */

#include "training_layers.h"

static void forward_site(team of, const stage *s, long i, int which, const product *w, int read, lines x, lines low,
                         lines y) {
    pieces rows = read ? s->read : s->all;
    site at = site_of(s, s->forward, i, which);
    low_work(of, rows, at, x, w->k, low);
    meet(of);
    tall_work(of, w, rows, at, 0, x, low, NO_ACT, y);
}

static void norm_work(team of, const crowd *c, lines x, lines delta, dropout by, const float *const *norm, float eps,
                      long width, lines sum, lines out, float *mean, float *inverse) {
    for (long t = share(c->count, of.me, of), end = share(c->count, of.me + 1, of); t < end; t++) {
        float *to = sum.at + t * sum.ld;
        add_row(x.at + t * x.ld, delta.at + t * delta.ld, &by, t, width, to);
        norm_row(to, norm[0], norm[1], width, eps, mean + t, inverse + t, out.at + t * out.ld);
    }
    meet(of);
}

static void choose(team of, const job *j, lines from_all, long width, lines to) {
    for (long t = share(j->read.count, of.me, of); t < share(j->read.count, of.me + 1, of); t++)
        memcpy(to.at + t * to.ld, from_all.at + j->chosen[t] * from_all.ld, width * sizeof(float));
}

/* q, k, v of all tokens; in the last layer queries only of those that are read. Returns what the residual adds to. */
static lines qkv_work(team of, const stage *s, long i, const kept_layer *k, lines x) {
    const job *j = s->j;
    const layer *l = j->stack + i;
    site at = site_of(s, s->forward, i, 0);
    int last = is_last(s, i);
    lines low = k->hidden[0], q = k->qkv, from_x = x;
    low_work(of, s->all, at, x, j->width, low);
    if (last) choose(of, j, x, j->width, s->chosen_x);
    meet(of);
    tall_work(of, &l->k, s->all, at, 1, x, low, NO_ACT, (lines){q.at + j->width, q.ld});
    tall_work(of, &l->v, s->all, at, 2, x, low, NO_ACT, (lines){q.at + 2 * j->width, q.ld});
    if (last) {
        choose(of, j, low, j->low, s->chosen_low);
        meet(of);
        low = s->chosen_low;
        q = s->chosen_q;
        from_x = s->chosen_x;
    }
    tall_work(of, &l->q, last ? s->read : s->all, at, 0, from_x, low, NO_ACT, q);
    meet(of);
    return from_x;
}

static void forward_layer(team of, const stage *s, long i, lines x) {
    const job *j = s->j;
    const layer *l = j->stack + i;
    const kept_layer *k = s->kept + slot_of(j, i);
    int last = is_last(s, i);
    const crowd *c = crowd_of(s, last);
    x = qkv_work(of, s, i, k, x);
    short_attention a = attention_of(s, i, k);
    short_work(of, &a, s->own + of.me * own_floats(j));
    meet(of);
    forward_site(of, s, i, 1, &l->out, last, k->seen, k->hidden[1], s->delta);
    meet(of);
    norm_work(of, c, x, s->delta, drop_of(s, c, i, ATTENDED), l->attended, l->attended_eps, j->width,
              k->attended_total, k->middle, k->means[0], k->inverses[0]);
    forward_site(of, s, i, 2, &l->up, last, k->middle, k->hidden[2], k->up);
    gelu_work(of, c, k->up, 0, j->inner, s->active);
    meet(of);
    forward_site(of, s, i, 3, &l->down, last, s->active, k->hidden[3], s->delta);
    meet(of);
    norm_work(of, c, k->middle, s->delta, drop_of(s, c, i, MADE), l->made, l->made_eps, j->width,
              k->made_total, last ? (lines){j->out, j->width} : k->out, k->means[1], k->inverses[1]);
}

static void read_all(team of, const job *j) {
    for (long i = 0; i < j->learners * j->layers * SITES; i++) {
        long which = i % SITES, in = which == 3 ? j->inner : j->width, n = which == 2 ? j->inner : j->width;
        read_work(of, j->groups + i, (long[]){n, n, n}, in);
    }
    meet(of);
}

/* How many floats of room a job needs. */
void ahl_encoder_room(job *j, int threads) {
    stage s = {.kept = malloc(slots_of(j) * sizeof(kept_layer))};
    if (s.kept) j->floats = lay_out(j, &s, threads);
    free(s.kept);
}

/* out [read, width] = what leaves the last layer; parameters are read as they are now. Returns whether there was
   room. */
int ahl_encoder_forward(const job *j, int threads) {
    stage s;
    if (!begin(j, &s, threads)) return 0;
#pragma omp parallel num_threads(threads)
    {
        team of = team_of();
        read_all(of, j);
        for (long i = 0; i < j->layers; i++) forward_layer(of, &s, i, input_of(&s, i));
    }
    free(s.memory);
    return 1;
}
