/* What the parts of an encoder's training share: adapters that learn, and attention within short rows. All functions
   are to be called by all threads of one parallel region; there is no barrier after them. */

#ifndef AHL_TRAINING_ENCODER_H
#define AHL_TRAINING_ENCODER_H

#include "tall.h"
#include "training.h"

/* One layer of one learner; a none: it changes nothing. a [rank, in], b [out, rank] and their gradients; up [rank, out]
   = scale b^T; first: where its rank begins among its group's. */
typedef struct {
    const float *a, *b;
    float *grad_a, *grad_b, *up;
    long rank, first;
    float scale;
} trained;

/* The layers of one input: down [in, width] holds all a^T beside each other, lines [width, in] all scale a below. */
typedef struct {
    trained members[MEMBERS];
    float *down, *lines;
    long width, inputs;
} trained_group;

/* Take over parameters as they are now. */
void read_work(team of, const trained_group *g, const long *outs, long in);

/* out [m, n] += scale * left^T right over `rows` rows. */
void outer_work(team of, lines left, long m, lines right, long n, long rows, float scale, float *out);

/* Rows whose queries see all of their keys: queries [texts + 1], keys [texts + 1] say where each begins. log_sum:
   [queries, heads], the logarithm of each softmax's denominator. */
typedef struct {
    lines q, k, v, out, log_sum, grad, grad_q, grad_k, grad_v;
    const long *queries, *keys;
    long texts, heads, dim;
    float scaling;
    dropout drop;
} short_attention;

/* Floats of room that a thread needs where the longest row has so many tokens. */
#define SHORT_QUERIES 48
INLINE long short_room(long longest, long dim) {
    return ((longest + LANES - 1) / LANES * LANES) * (2 * dim + 2 * SHORT_QUERIES);
}

void short_work(team of, const short_attention *a, float *room);
void short_back_work(team of, const short_attention *a, float *room);

#endif
