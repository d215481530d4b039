/* SPDX-License-Identifier: Apache-2.0 */
/* Who is expected, the places that are kept for them, and who is not to have one. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "attending.h"

/* ---- guests ------------------------------------------------------------------------- */

void free_guest(struct attendant_guest *guest)
{
    free((void *)guest->host.groups);
    free((void *)guest->host.label);
    free((void *)guest->host.before);
    free((void *)guest->host.behind);
    free(guest);
}

void free_guests(struct attendant *attendant)
{
    while (attendant->guests != NULL) {
        struct attendant_guest *guest = attendant->guests;

        attendant->guests = guest->next;
        free_guest(guest);
    }
}

struct attendant_guest *attendant_expect(struct attendant *attendant, const struct attendant_host *host,
                                         struct attendant_shelf *const *shelves, size_t count)
{
    struct attendant_guest *guest = count <= SEAT_SHELVES ? calloc(1, sizeof(*guest)) : NULL;

    if (guest == NULL)
        return NULL;
    guest->host = *host;
    guest->host.groups = copy_of(host->groups, host->groups_size);
    guest->host.label = copy_of(host->label, host->label_size);
    guest->host.before = copy_of(host->before, host->before_size);
    guest->host.behind = copy_of(host->behind, host->behind_size);
    memcpy(guest->shelves, shelves, count * sizeof(*shelves));
    guest->shelf_count = count;
    if (guest->host.groups == NULL || guest->host.label == NULL || guest->host.before == NULL ||
        guest->host.behind == NULL) {
        free_guest(guest);
        return NULL;
    }
    pthread_mutex_lock(&attendant->lock);
    guest->next = attendant->guests;
    attendant->guests = guest;
    pthread_mutex_unlock(&attendant->lock);
    return guest;
}

int attendant_place(struct attendant *attendant, struct attendant_guest *guest, int place, uint64_t client)
{
    int result = -ENOSPC;

    pthread_mutex_lock(&attendant->lock);
    if (guest->count < PLACES_MAX && place >= 0 && (size_t)place < attendant->place_count) {
        guest->places[guest->count++] = (struct place){place, client};
        result = 0;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_clear_place(struct attendant *attendant, int place)
{
    pthread_mutex_lock(&attendant->lock);
    if (place >= 0 && (size_t)place < attendant->place_count && alive_locked(attendant))
        commit(&attendant->places[place].client, 0);
    pthread_mutex_unlock(&attendant->lock);
}

int32_t *find_barred(struct attendant *attendant, int32_t pid)
{
    for (size_t i = 0; i < BARRED_MAX; i++)
        if (attendant->barred[i] == pid)
            return &attendant->barred[i];
    return NULL;
}

int attendant_bar(struct attendant *attendant, int32_t pid)
{
    int32_t *free_one;
    int result = 0;

    pthread_mutex_lock(&attendant->lock);
    if (find_barred(attendant, pid) == NULL) {
        free_one = find_barred(attendant, 0);
        if (free_one != NULL)
            *free_one = pid;
        else
            result = -ENOSPC;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_unbar(struct attendant *attendant, int32_t pid)
{
    int32_t *barred;

    pthread_mutex_lock(&attendant->lock);
    barred = find_barred(attendant, pid);
    if (barred != NULL)
        *barred = 0;
    pthread_mutex_unlock(&attendant->lock);
}

bool is_barred(struct attendant *attendant, const struct seat *seat)
{
    return seat->caller != NULL && find_barred(attendant, (int32_t)seat->caller->greeting.told.pid) != NULL;
}
