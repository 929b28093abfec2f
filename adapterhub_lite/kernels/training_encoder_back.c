/* The layers of an encoder built as BERT is, backward: one native call. Who computes what is as in the forward. */

#include "training_layers.h"

/* below = grad W + what comes through A. Of q, k and v, the later ones are added to the first. */
static void through_weights(team of, const stage *s, long i, int which, pieces rows, lines grad, lines below) {
    const layer *l = s->j->stack + i;
    const product *all[][MEMBERS] = {{&l->q, &l->k, &l->v}, {&l->out}, {&l->up}, {&l->down}};
    site none = {0}, at = site_of(s, s->back, i, which);
    for (int m = 0; m < MEMBERS && all[which][m]; m++) {
        product w = *all[which][m];
        w = (product){.panels = w.panels, .format = INPUT_LINES, .k = w.n, .n = w.k};
        int end = m == MEMBERS - 1 || !all[which][m + 1];
        lines own = {grad.at + m * w.k, grad.ld};
        tall_sum(of, &w, rows, end ? at : none, own, s->slope, m > 0, below);
    }
}

/* below = what comes through W and A; gradients of all A and B of the site. x: its input, low: A x. No barrier
   after it. */
static void back_site(team of, const stage *s, long i, int which, int read, lines grad, lines x, lines low,
                      const lines *below) {
    const job *j = s->j;
    const crowd *c = crowd_of(s, read);
    pieces rows = read ? s->read : s->all;
    const long *starts = s->starts + (read ? j->all.segment_count + 1 : 0);
    long in = which == 3 ? j->inner : j->width, n = which == 2 ? j->inner : j->width;
    for (long g = 0; g < c->segment_count; g++) {
        pieces own = {rows.all + starts[g], starts[g + 1] - starts[g]};
        long mine = (c->segments[g].learner * j->layers + i) * SITES + which;
        for (int m = 0; m < MEMBERS; m++) {
            const trained *t = j->groups[mine].members + m;
            if (!t->a) continue;
            site slopes = {s->slopes + (SITES * i + which) * MEMBERS + m, SITES * MEMBERS * j->layers};
            lines to = {s->slope.at + t->first, s->slope.ld};
            low_work(of, own, slopes, (lines){grad.at + m * n, grad.ld}, n, to);
        }
    }
    meet(of);
    if (below) through_weights(of, s, i, which, rows, grad, *below);
    for (long g = 0; g < c->segment_count; g++) {
        const segment *some = c->segments + g;
        const trained_group *group = j->groups + (some->learner * j->layers + i) * SITES + which;
        for (const trained *t = group->members; t < group->members + MEMBERS; t++) {
            if (!t->a) continue;
            lines own = from(grad, some->first), slope = from(s->slope, some->first), hidden = from(low, some->first);
            own.at += (t - group->members) * n;
            slope.at += t->first;
            hidden.at += t->first;
            long count = some->end - some->first;
            outer_work(of, slope, t->rank, from(x, some->first), in, count, t->scale, t->grad_a);
            outer_work(of, own, n, hidden, t->rank, count, t->scale, t->grad_b);
        }
    }
}

/* total = the gradient of a norm's input from grad (and more, or none); delta = what dropout leaves of it. */
static void norm_back_work(team of, const crowd *c, lines grad, const lines *more, lines sum, const float *weight,
                           const float *mean, const float *inverse, dropout by, long width, lines to, lines delta) {
    for (long t = share(c->count, of.me, of), end = share(c->count, of.me + 1, of); t < end; t++) {
        float *into = to.at + t * to.ld;
        const float *g = grad.at + t * grad.ld;
        if (more) {
            add_row(g, more->at + t * more->ld, &(dropout){0}, t, width, into);
            g = into;
        }
        norm_row_back(g, sum.at + t * sum.ld, weight, mean + t, inverse[t], width, 0, into);
        if (by.keys)
            drop_row(&by, t, into, width, delta.at + t * delta.ld);
        else
            memcpy(delta.at + t * delta.ld, into, width * sizeof(float));
    }
    meet(of);
}

/* The gradients of q, k and v, side by side. */
static lines attend_back(team of, const stage *s, long i, const kept_layer *k) {
    const job *j = s->j;
    short_attention a = attention_of(s, i, k);
    lines grads = s->qkv;
    a.grad = s->seen;
    a.grad_q = is_last(s, i) ? s->query : grads;
    a.grad_k = (lines){grads.at + j->width, grads.ld};
    a.grad_v = (lines){grads.at + 2 * j->width, grads.ld};
    short_back_work(of, &a, s->own + of.me * own_floats(j));
    if (!is_last(s, i)) return grads;
    for (long t = share(j->all.count, of.me, of); t < share(j->all.count, of.me + 1, of); t++)
        memset(grads.at + t * grads.ld, 0, j->width * sizeof(float));
    meet(of);
    for (long t = share(j->read.count, of.me, of); t < share(j->read.count, of.me + 1, of); t++)
        memcpy(grads.at + j->chosen[t] * grads.ld, s->query.at + t * s->query.ld, j->width * sizeof(float));
    return grads;
}

/* Add what came by the residual to the columns of `below` that this thread has made. */
static void residual_work(team of, const stage *s, int last, lines below) {
    const job *j = s->j;
    const crowd *c = crowd_of(s, last);
    long panels = (j->width + 47) / 48, first = share(panels, of.me, of) * 48, end = share(panels, of.me + 1, of) * 48;
    if (end > j->width) end = j->width;
    for (long t = 0; t < c->count && first < end; t++) {
        float *to = below.at + (last ? j->chosen[t] : t) * below.ld + first;
        add_row(to, s->total.at + t * s->total.ld + first, &(dropout){0}, t, end - first, to);
    }
}

/* The gradient of x, the layer's input, goes to below, where there is one; it may lie where grad does. */
static void backward_layer(team of, const stage *s, long i, lines x, lines grad, const lines *below) {
    const job *j = s->j;
    const layer *l = j->stack + i;
    const kept_layer *k = s->kept + slot_of(j, i);
    int last = is_last(s, i);
    const crowd *c = crowd_of(s, last);
    norm_back_work(of, c, grad, 0, k->made_total, l->made[0], k->means[1], k->inverses[1],
                   drop_of(s, c, i, MADE), j->width, s->total, s->delta);
    gelu_work(of, c, k->up, 0, j->inner, s->active); /* made again: it is the widest that a layer could keep */
    back_site(of, s, i, 3, last, s->delta, s->active, k->hidden[3], &s->inner);
    gelu_work(of, c, k->up, &s->inner, j->inner, s->inner);
    meet(of);
    back_site(of, s, i, 2, last, s->inner, k->middle, k->hidden[2], &s->rest);
    meet(of);
    norm_back_work(of, c, s->total, &s->rest, k->attended_total, l->attended[0], k->means[0], k->inverses[0],
                   drop_of(s, c, i, ATTENDED), j->width, s->total, s->delta);
    back_site(of, s, i, 1, last, s->delta, k->seen, k->hidden[1], &s->seen);
    meet(of);
    lines grads = attend_back(of, s, i, k);
    meet(of);
    back_site(of, s, i, 0, 0, grads, x, k->hidden[0], below);
    if (below) residual_work(of, s, last, *below);
    meet(of);
}

/* Gradients of all parameters grow by those of grad [read, width], that of `out`; below [tokens, width], or none,
   becomes that of x. */
int ahl_encoder_backward(const job *j, int threads) {
    stage s;
    if (!begin(j, &s, threads)) return 0;
#pragma omp parallel num_threads(threads)
    {
        team of = team_of();
        long lowest = j->lowest > 0 ? j->lowest : 0;
        lines grad = {(float *)j->grad, j->width};
        for (long i = j->layers - 1; i >= lowest; i--) {
            lines below = i == lowest && j->below ? (lines){j->below, j->width} : s.below;
            backward_layer(of, &s, i, input_of(&s, i), grad, i > lowest || j->below ? &below : 0);
            grad = below;
        }
    }
    free(s.memory);
    return 1;
}
