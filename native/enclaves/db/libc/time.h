/* SPDX-License-Identifier: Apache-2.0 */
#ifndef DB_LIBC_TIME_H
#define DB_LIBC_TIME_H

typedef long time_t;
struct tm {
    int tm_sec, tm_min, tm_hour, tm_mday, tm_mon, tm_year, tm_wday, tm_yday, tm_isdst;
};

#endif
