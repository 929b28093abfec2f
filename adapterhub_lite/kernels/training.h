/* What the element-wise kernels of training share: parts of rows, and dropout as a pure function of names. */

#ifndef AHL_TRAINING_H
#define AHL_TRAINING_H

#include "vectors.h"

/* Sixteen values from column i of a row of n, 0 after its end. */
INLINE vec take(const float *row, long i, long n) {
    return n - i >= LANES ? load(row + i) : load_part(row + i, n - i, 0);
}

INLINE void put(float *row, long i, long n, vec v) {
    if (n - i >= LANES)
        store(row + i, v);
    else
        memcpy(row + i, &v, (n - i) * sizeof(float));
}

/* e^v for v that should not be above 0: 0 below -87; NaN stays NaN. */
INLINE vec exponential_down(vec v) {
    ints small = v < -87.0f;
    vec n = rounded((vec)(((ints)v & ~small)) * 1.44269504f);
    vec r = v - n * 0.693145752f - n * 1.42860677e-6f;
    vec sum = all(1.0f / 720);
    sum = sum * r + 1.0f / 120;
    sum = sum * r + 1.0f / 24;
    sum = sum * r + 1.0f / 6;
    sum = sum * r + 0.5f;
    sum = sum * r + 1.0f;
    sum = sum * r + 1.0f;
    ints power = __builtin_convertvector(n, ints);
    return (vec)((ints)(sum * (vec)((power + 127) << 23)) & ~small);
}

/* keys, tokens: of each line; an element stays, times `scale`, where the top 24 bits of its hash reach `threshold`.
   keys none: no dropout. */
typedef struct {
    const int64_t *keys, *tokens;
    long salt, threshold;
    float scale;
} dropout;

/* The lowbias32 finaliser (C. Wellons, "Prospecting for hash functions", 2018). */
INLINE uint32_t mixed(uint32_t x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

INLINE bits mixed_lanes(bits x) {
    x = (x ^ x >> 16) * 0x7feb352du;
    x = (x ^ x >> 15) * 0x846ca68bu;
    return x ^ x >> 16;
}

#define COLUMN 0x27d4eb2fu /* an element is hashed as the word of its line ^ column * COLUMN */

/* What names a line in one place of the model. */
INLINE uint32_t word_of(const dropout *by, long line) {
    uint64_t key = by->keys[line];
    uint32_t folded = (uint32_t)key ^ (uint32_t)(key >> 32) * 0x9e3779b1u;
    return mixed(mixed(folded ^ (uint32_t)by->salt * 0x85ebca77u) ^ (uint32_t)by->tokens[line] * 0xc2b2ae3du);
}

#define FIRST_LANES (bits){0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}

/* scale where the element stays, else 0; steps: column * COLUMN of each. */
INLINE vec kept(const dropout *by, uint32_t word, bits steps) {
    ints stays = (ints)(mixed_lanes(word ^ steps) >> 8) >= (int32_t)by->threshold;
    return (vec)((ints)all(by->scale) & stays);
}

/* The same for sixteen columns from `first`. */
INLINE vec kept_columns(const dropout *by, uint32_t word, long first) {
    return kept(by, word, ((uint32_t)first + FIRST_LANES) * COLUMN);
}

#endif
