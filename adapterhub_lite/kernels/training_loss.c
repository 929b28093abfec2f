/* Cross entropy of rows of logits and its gradient, which takes the place of the logits. */

#include <math.h>

#include "training.h"

#define STRETCH 1024 /* values that stay in the first cache between the search for the largest and the sum */

/* The largest value of a row (0 if that is -infinity) and the sum of e^(value - largest): one reading of memory; a
   larger value found later scales down what was summed before. */
static double sum_up(const float *row, long n, float *largest_of) {
    float peak = -INFINITY;
    double sum = 0;
    for (long at = 0; at < n; at += STRETCH) {
        long end = n - at < STRETCH ? n : at + STRETCH, whole = at + (end - at) / LANES * LANES;
        vec rest = load_part(row + whole, end - whole, -INFINITY), most = rest;
        for (long i = at; i < whole; i += LANES) most = greater(load(row + i), most);
        float found = largest(most);
        if (found > peak) {
            sum *= exp((double)peak - found);
            peak = found;
        }
        float shift = peak > -INFINITY ? peak : 0;
        vec sums = exponential_down(rest - shift);
        for (long i = at; i < whole; i += LANES) sums += exponential_down(load(row + i) - shift);
        sum += total(sums);
    }
    *largest_of = peak > -INFINITY ? peak : 0;
    return sum;
}

/* softmax - onehot; not by the logarithm of the sum, whose rounding the largest values would show. */
static void to_gradient(float *row, long n, long target, float peak, float share) {
    long i = 0;
    for (; i + LANES <= n; i += LANES) store(row + i, exponential_down(load(row + i) - peak) * share);
    if (i < n) {
        vec v = exponential_down(load_part(row + i, n - i, 0) - peak) * share;
        memcpy(row + i, &v, (n - i) * sizeof(float));
    }
    row[target] -= 1;
}

/* losses [rows] = log(sum(e^logits)) - logits [target]; with `gradient`, logits [rows, n] become softmax - onehot. A
   row with a negative target has no loss and no gradient. Returns whether all targets are below n; else nothing is
   written. */
int ahl_cross_entropy(float *logits, const int64_t *targets, long rows, long n, float *losses, int gradient,
                      int threads) {
    for (long row = 0; row < rows; row++)
        if (targets[row] >= n) return 0;
#pragma omp parallel for schedule(static) num_threads(threads)
    for (long row = 0; row < rows; row++) {
        float *from = logits + row * n;
        long target = targets[row];
        losses[row] = 0;
        if (target < 0) {
            if (gradient) memset(from, 0, n * sizeof(float));
            continue;
        }
        float peak;
        double sum = sum_up(from, n, &peak);
        losses[row] = log(sum) + ((double)peak - from[target]);
        if (gradient) to_gradient(from, n, target, peak, 1 / sum);
    }
    return 1;
}
