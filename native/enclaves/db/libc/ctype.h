/* SPDX-License-Identifier: Apache-2.0 */
/* It has tables of its own. */
