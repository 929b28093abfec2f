/* What several threads do together, each a part: to be called by all threads of one parallel region. */

#ifndef AHL_WORK_H
#define AHL_WORK_H

#include <stdint.h>

/* A frozen product; see wide.c. bias: [n] or none. */
typedef struct {
    const char *panels;
    long format;
    const float *scales, *codes, *bias;
    long k, n;
} product;

/* y [rows, n] = x [rows, k] W^T + bias. No barrier after it. */
void linear_work(const product *w, const float *x, long rows, float *y);

/* What an adapter does at one layer: y += (y - own bias) gain + bias + hidden up, where hidden are `rank` columns, from
   column `first`, of the low-rank values of the layer's group. Any of the pointers may be none. */
typedef struct {
    const float *up;
    long rank, first;
    const float *gain, *bias;
} member;

#define MEMBERS 3

/* What an adapter does at the layers of one input: down [k, width], or none; the factor on the input, or none. */
typedef struct {
    const float *down;
    long width;
    const float *scale;
    member members[MEMBERS];
} change;

/* Neighbouring tokens of one adapter, at most TILE of them. */
#define TILE 4
typedef struct {
    long first, count, owner;
} tile;

/* changes [owner]: of this group of layers, each `stride` changes after the one before. */
void shrink_work(const tile *tiles, long count, const change *changes, long stride, const float *x, long k,
                 float *hidden, long ld);

/* widths [members]: columns of y that belong to each layer of the group; own: the frozen biases of all, or none. */
void expand_work(const tile *tiles, long count, const change *changes, long stride, long members, const long *widths,
                 const float *own, const float *hidden, long ld, float *y, long ldy);

#endif
