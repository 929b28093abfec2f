/* Rounding to NF4 (QLoRA, arXiv 2305.14314): blocks of 64 numbers that share one scale, sixteen levels between -1 and 1.

   A number goes to the level whose bound is the last one below it, as bitsandbytes rounds: code = how many of the fifteen
   bounds, halfway between levels, are below number / scale. Every block is worked on alone, so a result depends neither on
   the number of threads nor on other blocks. */

#include "vectors.h"

#define BLOCK 64
#define PARTS (BLOCK / LANES)
#define LEVELS 16
#define SMALLEST 1e-38f /* a scale of 0 is divided by as this, as in bitsandbytes */

typedef struct {
    vec levels;
    float bounds[LEVELS - 1];
} grid;

INLINE grid grid_of(const float *levels) {
    grid g = {.levels = load(levels)};
    for (int i = 0; i < LEVELS - 1; i++) g.bounds[i] = (levels[i] + levels[i + 1]) / 2;
    return g;
}

INLINE ints nearest(vec v, const grid *g) {
    ints code = {0};
#pragma GCC unroll 15
    for (int i = 0; i < LEVELS - 1; i++) code -= v > g->bounds[i];
    return code;
}

INLINE float reciprocal(float scale) { return 1.0f / (scale > SMALLEST ? scale : SMALLEST); }

/* The squared error of a block under a scale, each number's times its importance. */
INLINE float error_of(const vec *w, const vec *importance, float scale, const grid *g) {
    float by = reciprocal(scale);
    vec sum = {0};
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) {
        vec gap = w[i] - __builtin_shuffle(g->levels, nearest(w[i] * by, g)) * scale;
        sum += gap * gap * importance[i];
    }
    return total(sum);
}

/* The scale that suits the levels best which a block has under another scale: <level, w> / <level, level>. */
INLINE float fitted(const vec *w, const vec *importance, float scale, const grid *g) {
    float by = reciprocal(scale);
    vec over = {0}, under = {0};
    for (int i = 0; i < PARTS; i++) {
        vec level = __builtin_shuffle(g->levels, nearest(w[i] * by, g));
        over += level * w[i] * importance[i];
        under += level * level * importance[i];
    }
    float divisor = total(under);
    return divisor > 0 ? total(over) / divisor : scale;
}

INLINE float largest_of(const vec *w) {
    vec most = {0};
    for (int i = 0; i < PARTS; i++) most = greater(most, (vec)((ints)w[i] & 0x7fffffff));
    return largest(most);
}

INLINE void search_block(const vec *w, const vec *importance, const float *factors, long count, long rounds,
                         const grid *g, float *scale, float *errors, uint8_t *codes) {
    float most = largest_of(w), best = most * factors[0], least = error_of(w, importance, best, g);
    errors[0] = least;
    for (long i = 1; i < count; i++) {
        float error = error_of(w, importance, most * factors[i], g);
        if (error < least) least = error, best = most * factors[i];
    }
    for (long i = 0; i < rounds; i++) {
        float next = fitted(w, importance, best, g), error = error_of(w, importance, next, g);
        if (!(error < least)) break;
        least = error, best = next;
    }
    *scale = best;
    errors[1] = least;
    float by = reciprocal(best);
    for (int i = 0; i < PARTS; i++) {
        ints code = nearest(w[i] * by, g);
        for (int j = 0; j < LANES; j++) codes[i * LANES + j] = (uint8_t)code[j];
    }
}

/* For each block of w [blocks, 64]: of the scales that are its largest number times a factor the first of least error,
   then improved up to `rounds` times by fitting it to the levels it gives. importance [period, 64], of blocks in turn.
   errors [blocks, 2]: under the first factor, and under the scale that was chosen. */
void ahl_nf4_search(const float *w, long blocks, const float *importance, long period, const float *factors, long count,
                    long rounds, const float *levels, float *scales, float *errors, uint8_t *codes, int threads) {
    grid g = grid_of(levels);
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long b = 0; b < blocks; b++) {
        vec values[PARTS], weights[PARTS];
        for (int i = 0; i < PARTS; i++) {
            values[i] = load(w + b * BLOCK + i * LANES);
            weights[i] = load(importance + b % period * BLOCK + i * LANES);
        }
        search_block(values, weights, factors, count, rounds, &g, scales + b, errors + 2 * b, codes + b * BLOCK);
    }
}

INLINE int level_of(float v, vec bounds) {
#ifdef __AVX512F__
    return __builtin_popcount(_mm512_cmp_ps_mask(_mm512_set1_ps(v), (__m512)bounds, _CMP_GT_OQ));
#else
    int code = 0;
    for (int i = 0; i < LEVELS - 1; i++) code += v > bounds[i];
    return code;
#endif
}

/* Rounds w [rows, 64] one column after another, each row by its scale; what a number loses is taken from the columns that
   follow, as far as `upper` says (GPTQ, arXiv 2210.17323). upper [64, 64]: a diagonal block of the upper Cholesky factor of
   the inverse of the inputs' second moments. w is left as it was; errors [rows, 64]: each loss over the factor's diagonal,
   for what comes behind the block. */
void ahl_nf4_feedback(const float *w, long rows, const float *upper, const float *scales, const float *levels,
                      float *errors, uint8_t *codes, int threads) {
    vec bounds = all(__builtin_inff());
    for (int i = 0; i < LEVELS - 1; i++) bounds[i] = (levels[i] + levels[i + 1]) / 2;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (long row = 0; row < rows; row++) {
        float values[BLOCK] __attribute__((aligned(64)));
        memcpy(values, w + row * BLOCK, sizeof values);
        float scale = scales[row], by = reciprocal(scale);
        for (int j = 0; j < BLOCK; j++) {
            const float *line = upper + j * BLOCK;
            int code = level_of(values[j] * by, bounds);
            float error = (values[j] - levels[code] * scale) / line[j];
            codes[row * BLOCK + j] = (uint8_t)code;
            errors[row * BLOCK + j] = error;
            for (int i = j / LANES; i < PARTS; i++)
                store(values + i * LANES, load(values + i * LANES) - load(line + i * LANES) * error);
        }
    }
}
