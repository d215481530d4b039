/* SPDX-License-Identifier: Apache-2.0 */
/*
 * A C program that attaches as any would, and measures itself: the twin of teemate.bench.subject.
 *
 *   teemate-subject SOCKET ENCLAVE
 *
 * "warm" attaches on a connection that is there, "cold" connects first; both to the reply of the first call.
 * With "--first" behind these it attaches once, prints the monotonic clock at that reply, and ends.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <teemate_client.h>

#include "floor.h"

#define WAIT_MS 10000u

struct subject {
    const char *socket;
    const char *enclave;
    struct teemate_broker *broker; /* "warm"; made when it is first asked for */
    double end;
};

static void must(int code, const struct teemate_error *error)
{
    if (code == TEEMATE_OK)
        return;
    fprintf(stderr, "teemate-subject: %s: %s\n", teemate_code_name(error->code), error->text);
    exit(1);
}

static struct teemate_broker *connect_to(const struct subject *subject)
{
    struct teemate_error error;
    struct teemate_broker *broker = NULL;

    must(teemate_connect(subject->socket, "bench", &broker, &error), &error);
    return broker;
}

/* Attach and call; the grant is the caller's to give up, or its connection's. */
static struct teemate_grant *come_in(struct subject *subject, struct teemate_broker *broker)
{
    struct teemate_error error;
    struct teemate_grant *grant = NULL;
    struct teemate_lease *lease = NULL;

    must(teemate_attach(broker, subject->enclave, 1, WAIT_MS, &grant, &error), &error);
    must(teemate_take(grant, 0, &lease, &error), &error);
    must(teemate_call(lease, "empty", NULL, 0, NULL, 0, NULL, NULL, &error), &error);
    subject->end = floor_now_ns();
    teemate_give(lease);
    return grant;
}

static double warm_once(void *state)
{
    struct subject *subject = state;
    struct teemate_error error;
    struct teemate_grant *grant;
    double start;

    if (subject->broker == NULL)
        subject->broker = connect_to(subject);
    start = floor_now_ns();
    grant = come_in(subject, subject->broker);
    must(teemate_detach(grant, &error), &error);
    return subject->end - start;
}

static double cold_once(void *state)
{
    struct subject *subject = state;
    double start = floor_now_ns();
    struct teemate_broker *broker = connect_to(subject);
    struct teemate_error error;

    come_in(subject, broker);
    must(teemate_disconnect(broker, &error), &error); /* detaches */
    return subject->end - start;
}

int main(int argc, char **argv)
{
    struct subject subject = {0};
    const struct floor words[] = {{warm_once, "warm", &subject}, {cold_once, "cold", &subject}};
    int first = argc == 4 && strcmp(argv[3], "--first") == 0;

    if (argc != 3 && !first) {
        fprintf(stderr, "usage: teemate-subject SOCKET ENCLAVE [--first]\n");
        return 2;
    }
    subject.socket = argv[1];
    subject.enclave = argv[2];
    if (first) {
        cold_once(&subject);
        printf("%.0f\n", subject.end);
        return 0;
    }
    return floor_serve(words, 2);
}
