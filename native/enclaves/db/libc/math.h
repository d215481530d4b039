/* SPDX-License-Identifier: Apache-2.0 */
/* No functions of mathematics are compiled in. */
#define INFINITY (__builtin_inff())
#define fabs(number) __builtin_fabs(number)
