/* SPDX-License-Identifier: Apache-2.0 */
#ifndef assert
#define assert(condition) ((void)0)
#endif
