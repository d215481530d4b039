/* SPDX-License-Identifier: Apache-2.0 */
/*
 * Product of two matrices of doubles.
 *
 * Payload: m, k, n (uint32), A (m × k doubles, row by row), B (k × n); result: m × n doubles.  All little endian,
 * which is the byte order of WebAssembly.
 */
#include "function.h"

int main(void)
{
    struct bytes input = read_input();
    uint32_t size[3];
    size_t m, k, n;

    if (input.length < sizeof(size))
        fail(1, "the payload begins with m, k and n");
    memcpy(size, input.data, sizeof(size));
    m = size[0], k = size[1], n = size[2];
    if (m > 8192 || k > 8192 || n > 8192)
        fail(1, "a side has at most 8192 elements");
    if (input.length != sizeof(size) + (m * k + k * n) * sizeof(double))
        fail(1, "the payload's length does not fit its sizes");

    double *left = allocate((m * k + k * n) * sizeof(double)), *right = left + m * k;
    double *product = allocate(m * n * sizeof(double));

    memset(product, 0, m * n * sizeof(double));
    memcpy(left, input.data + sizeof(size), (m * k + k * n) * sizeof(double));
    /* Row by row of B, so that all three are walked in the order in which they lie. */
    for (size_t row = 0; row < m; row++)
        for (size_t i = 0; i < k; i++)
            for (size_t column = 0; column < n; column++)
                product[row * n + column] += left[row * k + i] * right[i * n + column];
    write_output(product, m * n * sizeof(double));
    return 0;
}
