/* SPDX-License-Identifier: Apache-2.0 */
/* Memory and sorting are of its own. */
