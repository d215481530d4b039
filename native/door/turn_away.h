/* SPDX-License-Identifier: Apache-2.0 */
#ifndef TEEMATE_DOOR_TURN_AWAY_H
#define TEEMATE_DOOR_TURN_AWAY_H

#include <stddef.h>

/*
 * Tells a connection `message` and closes it.  Returns 0; or 1 when it may not be closed by a thread
 * that has other things to do, since descriptors were sent that nobody received: closing those can
 * take for ever.  It then stays the caller's.
 */
int turn_away(int fd, const char *message, size_t length);

#endif
