/* SPDX-License-Identifier: Apache-2.0 */
#include "tmsdk.h"

TM_ECALL(empty)
{
    return 0;
}

TM_ECALL(echo)
{
    return tm_reply(rq, rq->in, rq->in_len);
}
