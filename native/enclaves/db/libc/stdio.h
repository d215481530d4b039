/* SPDX-License-Identifier: Apache-2.0 */
/* SQLite prints nothing in an enclave. */
