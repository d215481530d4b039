/* SPDX-License-Identifier: Apache-2.0 */
#include "popular.h"

/* Read while it is written: what is made of it is a guess. */
static struct {
    uint64_t next;
    struct {
        uint64_t place, at;
    } starts[POPULAR_STARTS];
} last;

void popular_note(struct tm_txn *txn, uint64_t place)
{
    uint64_t which = last.next % POPULAR_STARTS;

    tm_txn_set(txn, &last.starts[which].place, place);
    tm_txn_set(txn, &last.starts[which].at, tm_time());
    tm_txn_set(txn, &last.next, last.next + 1);
}

struct tally {
    uint64_t place;
    unsigned count;
};

static void count(struct tally *tallies, unsigned *used, uint64_t place)
{
    unsigned i = 0;

    while (i < *used && tallies[i].place != place)
        i++;
    if (i == *used)
        tallies[(*used)++] = (struct tally){.place = place};
    tallies[i].count++;
}

unsigned popular_now(bool (*is_wanted)(uint64_t place), uint64_t places[POPULAR_MAX])
{
    struct tally tallies[POPULAR_STARTS];
    uint64_t now = tm_time();
    unsigned used = 0, all = 0, chosen = 0;

    for (unsigned i = 0; i < POPULAR_STARTS; i++) {
        uint64_t place = __atomic_load_n(&last.starts[i].place, __ATOMIC_RELAXED);
        uint64_t at = __atomic_load_n(&last.starts[i].at, __ATOMIC_RELAXED);

        if (!place || (at < now && now - at > POPULAR_AGE))
            continue;
        count(tallies, &used, place);
    }
    for (unsigned i = 0; i < used; i++) {
        if (!is_wanted(tallies[i].place))
            tallies[i].count = 0;
        all += tallies[i].count;
    }
    while (chosen < POPULAR_MAX) {
        struct tally *most = NULL;

        for (unsigned i = 0; i < used; i++)
            if (!most || tallies[i].count > most->count)
                most = &tallies[i];
        if (!most || most->count < POPULAR_LEAST || most->count * POPULAR_PART < all)
            break;
        places[chosen++] = most->place;
        most->count = 0;
    }
    return chosen;
}
