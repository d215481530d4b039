/* SPDX-License-Identifier: Apache-2.0 */
#include "teemate.h"

const char *teemate_test_build(void)
{
#ifdef TEEMATE_TEST_BUILD
    return TEEMATE_TEST_BUILD;
#else
    return "";
#endif
}
