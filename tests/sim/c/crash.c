/* SPDX-License-Identifier: Apache-2.0 */
/* Enter, then crash as a host does. */
#include "tests.h"

int main(void)
{
    struct teemate_enclave *enclave = test_enclave_mapped(NULL);
    volatile int *nowhere = (volatile int *)8;

    LEFT(enter(enclave, 0, OP_NOTHING, 0, 0));
    FAULTED(enter(enclave, 0, OP_READ, 8, 0), SGX_ERESUME, SGX_VECTOR_PF);
    return *nowhere;
}
