/* Weights as a module has them, laid into panels of 48 outputs: for each input, the 48 weights of a panel stand together. */

#ifndef AHL_LAYING_H
#define AHL_LAYING_H

#include "tall.h"

#define VECS 3
#define PANEL (VECS * LANES)
#define AHEAD 8 /* rows of one input each, or lines of 16 weights, that are asked for before they are laid */

/* A row holds the weights of one input. Inputs begin, ... of the panels from a column on, zeros beside the last of n
   outputs; panels lie `apart`, (end - begin) * PANEL. */
INLINE void lay_inputs(const float *w, long ldw, long n, long column, long panels, long begin, long end, float *to) {
    long apart = (end - begin) * PANEL;
    for (long i = begin; i < end; i++, to += PANEL)
        for (long j = 0; j < panels; j++)
#pragma GCC unroll 3
            for (int u = 0; u < VECS; u++) {
                long at = column + j * PANEL + u * LANES;
                const float *from = w + i * ldw + at;
                __builtin_prefetch(from + AHEAD * ldw, 0, 3);
                store(to + j * apart + u * LANES, load_some(from, n - at));
            }
}

/* A row holds the weights of one output. Inputs begin, ... of the panel at a column. */
INLINE void lay_outputs(const float *w, long ldw, long n, long column, long begin, long end, float *to) {
    for (long first = column; first < column + PANEL; first += LANES, to += LANES)
        for (long i = begin; i < end; i += LANES) {
            long count = end - i < LANES ? end - i : LANES;
            vec block[LANES];
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++) {
                const float *from = w + (first + r) * ldw + i;
                __builtin_prefetch(from + AHEAD * LANES, 0, 3);
                block[r] = load_some(from, first + r < n ? count : 0);
            }
            turn(block);
#pragma GCC unroll 16
            for (int r = 0; r < LANES; r++)
                if (r < count) store(to + (i - begin + r) * PANEL, block[r]);
        }
}

#endif
