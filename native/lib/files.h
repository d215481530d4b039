/* SPDX-License-Identifier: Apache-2.0 */
/*
 * The files of one enclave, on the host: everything lies in one folder.
 *
 * Used by the warden's I/O thread for a shared enclave and by the calling thread for a private one; but for
 * file_do() one thread at a time.  What comes from the enclave is checked like what comes from anybody: a name is
 * one plain component, opened beneath the folder without following links.
 */
#ifndef TEEMATE_FILES_H
#define TEEMATE_FILES_H

#include <stdint.h>

#include "teemate_abi.h"

struct files;

/*
 * `directory` stays the caller's and has to stay open.  `limit`: bytes that all files of the folder may take
 * together, each counted in blocks of 4 KiB and as one at least; 0: no limit.  What is there
 * already counts; who else writes there is not seen.  Fails with -ENOMEM, or the errno of listing the folder.
 */
int files_open(int directory, uint64_t limit, struct files **files);
/* Closes what it has open; says nothing about what was not synced.  NULL is fine. */
void files_close(struct files *files);

/*
 * Do one request; `data` has TM_FILE_DATA bytes, to write or to read into.  Returns what struct tm_file_request
 * says, or -EINVAL for one that cannot be.  -ENOSPC at the limit.  READ of no name is of the folder: names of
 * files, each with its zero, as many whole ones as fit; `offset` of them are left out.
 */
int64_t files_do(struct files *files, const struct tm_file_request *request, void *data);

/*
 * One request of a file that this process has a descriptor of: READ, WRITE, SYNC, SIZE or TRUNCATE.  From any thread;
 * no limit.
 */
int64_t file_do(int fd, const struct tm_file_request *request, void *data);

#endif
