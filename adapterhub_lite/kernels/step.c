/* What stands between the products of a decoder's step, one new token a row, all in float32. */

#include <math.h>

#include "vectors.h"

/* x [rows, n] += change (or nothing); out = x / sqrt(mean(x^2) + eps) * weight. */
void ahl_add_norm(float *x, const float *change, const float *weight, float eps, long rows, long n, float *out) {
    for (long row = 0; row < rows; row++) {
        float *from = x + row * n, *to = out + row * n;
        vec squares = {0};
        float rest = 0;
        long i = 0;
        for (; i + LANES <= n; i += LANES) {
            vec v = load(from + i);
            if (change) {
                v += load(change + row * n + i);
                store(from + i, v);
            }
            squares += v * v;
        }
        for (; i < n; i++) {
            if (change) from[i] += change[row * n + i];
            rest += from[i] * from[i];
        }
        float scale = 1 / sqrtf((total(squares) + rest) / n + eps);
        for (i = 0; i + LANES <= n; i += LANES) store(to + i, load(from + i) * scale * load(weight + i));
        for (; i < n; i++) to[i] = from[i] * scale * weight[i];
    }
}

/* out [rows, n] = silu(gate) * up, where both [rows, 2n] holds gate and then up. */
void ahl_silu_mul(const float *both, long rows, long n, float *out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * n > 16384)
    for (long row = 0; row < rows; row++) {
        const float *gate = both + row * 2 * n, *up = gate + n;
        for (long i = 0; i < n; i += LANES) {
            long count = n - i < LANES ? n - i : LANES;
            vec g = load_part(gate + i, count, 0), u = load_part(up + i, count, 0);
            vec v = g / (1 + exponential(-g)) * u;
            memcpy(out + row * n + i, &v, count * sizeof(float));
        }
    }
}

/* Turn the query and key heads of qkv [rows, heads + 2 kv_heads, dim] by their row's angles, cos and sin [rows, dim],
   and write keys and values to column `column` of [rows, kv_heads, columns, dim]. */
void ahl_rotate(float *qkv, const float *cos, const float *sin, long rows, long heads, long kv_heads, long dim,
                float *keys, float *values, long columns, long column) {
    long half = dim / 2;
    for (long row = 0; row < rows; row++) {
        float *from = qkv + row * (heads + 2 * kv_heads) * dim;
        const float *c = cos + row * dim, *s = sin + row * dim;
        for (long head = 0; head < heads + kv_heads; head++) {
            float *v = from + head * dim;
            for (long i = 0; i < half; i++) {
                float a = v[i], b = v[i + half];
                v[i] = a * c[i] - b * s[i];
                v[i + half] = b * c[i + half] + a * s[i + half];
            }
        }
        for (long head = 0; head < kv_heads; head++) {
            long to = ((row * kv_heads + head) * columns + column) * dim;
            memcpy(keys + to, from + (heads + head) * dim, dim * sizeof(float));
            memcpy(values + to, from + (heads + kv_heads + head) * dim, dim * sizeof(float));
        }
    }
}

/* Attention of one token a row. filled [rows, columns], or none: which of the first `end` columns a row sees.
   out [rows, heads * dim]; dim is a multiple of 16; scores: room for rows * heads * (end + 16). */
void ahl_attend(const float *qkv, const float *keys, const float *values, const uint8_t *filled, long rows, long heads,
                long kv_heads, long dim, long columns, long end, float scaling, float *scores, float *out, int threads) {
    long group = heads / kv_heads;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows * heads * end * dim > 65536)
    for (long unit = 0; unit < rows * kv_heads; unit++) {
        long row = unit / kv_heads, kv = unit % kv_heads;
        const float *k = keys + unit * columns * dim, *v = values + unit * columns * dim;
        const uint8_t *seen = filled ? filled + row * columns : 0;
        for (long g = 0; g < group; g++) {
            long head = kv * group + g;
            const float *q = qkv + (row * (heads + 2 * kv_heads) + head) * dim;
            float *score = scores + (row * heads + head) * (end + LANES);
            for (long c = 0; c < end; c++) {
                vec sum = {0};
                for (long i = 0; i < dim; i += LANES) sum += load(q + i) * load(k + c * dim + i);
                score[c] = seen && !seen[c] ? -INFINITY : total(sum) * scaling;
            }
            for (long c = end; c < end + LANES; c++) score[c] = -INFINITY;
            vec most = all(-INFINITY), sum = {0};
            for (long c = 0; c < end; c += LANES) most = greater(load(score + c), most);
            float peak = largest(most);
            for (long c = 0; c < end; c += LANES) {
                vec weight = exponential(load(score + c) - peak);
                store(score + c, weight);
                sum += weight;
            }
            float share = 1 / total(sum);
            float *to = out + (row * heads + head) * dim;
            for (long i = 0; i < dim; i += LANES) {
                vec mixed = {0};
                for (long c = 0; c < end; c++) mixed += load(v + c * dim + i) * score[c];
                store(to + i, mixed * share);
            }
        }
    }
}
