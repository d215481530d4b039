/* SPDX-License-Identifier: Apache-2.0 */
/* What lies ready: grants of each enclave, with their cells. */
#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "attending.h"
#include "crypto.h"

static bool cell_exists(const struct attendant *attendant, int cell)
{
    return cell >= 0 && (size_t)cell < attendant->cell_count;
}

void drop_shelf(struct attendant_shelf **shelves, size_t *count, const struct attendant_shelf *shelf)
{
    for (size_t i = 0; i < *count; i++)
        if (shelves[i] == shelf)
            shelves[i] = shelves[--*count];
}

void take_last(struct attendant_shelf *shelf)
{
    shelf->count--;
    shelf->counts.free--;
    shelf->counts.used++;
    shelf->counts.clients++;
}

static void shelf_free(struct attendant_shelf *shelf)
{
    free(shelf->name);
    free((void *)shelf->text.info);
    free((void *)shelf->text.rest);
    crypto_wipe(shelf->mac_key, sizeof(shelf->mac_key));
    free(shelf);
}

struct attendant_shelf *attendant_open(struct attendant *attendant, const struct attendant_enclave *enclave)
{
    struct attendant_shelf *shelf = calloc(1, sizeof(*shelf));

    if (shelf == NULL)
        return NULL;
    shelf->name = (char *)copy_of(enclave->name, enclave->name_size);
    shelf->name_size = enclave->name_size;
    shelf->text.info = copy_of(enclave->info, enclave->info_size);
    shelf->text.info_size = enclave->info_size;
    shelf->text.info_pairs = enclave->info_pairs;
    shelf->text.rest = copy_of(enclave->rest, enclave->rest_size);
    shelf->text.rest_size = enclave->rest_size;
    memcpy(shelf->mac_key, enclave->mac_key, sizeof(shelf->mac_key));
    shelf->number = enclave->number;
    shelf->fd = enclave->fd;
    shelf->arena = enclave->arena;
    if (shelf->name == NULL || shelf->text.info == NULL || shelf->text.rest == NULL) {
        shelf_free(shelf);
        return NULL;
    }
    pthread_mutex_lock(&attendant->lock);
    shelf->next = attendant->shelves;
    attendant->shelves = shelf;
    pthread_mutex_unlock(&attendant->lock);
    return shelf;
}

void attendant_close(struct attendant *attendant, struct attendant_shelf *shelf)
{
    struct attendant_shelf **at = &attendant->shelves;

    pthread_mutex_lock(&attendant->lock);
    for (size_t i = 0; i < attendant->seat_count; i++)
        drop_shelf(attendant->seats[i].shelves, &attendant->seats[i].shelf_count, shelf);
    for (struct attendant_guest *guest = attendant->guests; guest != NULL; guest = guest->next)
        drop_shelf(guest->shelves, &guest->shelf_count, shelf);
    while (*at != shelf)
        at = &(*at)->next;
    *at = shelf->next;
    pthread_mutex_unlock(&attendant->lock);
    shelf_free(shelf);
}

int attendant_stock(struct attendant *attendant, struct attendant_shelf *shelf, int cell, uint64_t grant,
                    uint64_t slot, uint64_t tcs, uint64_t generation, const uint8_t *key)
{
    int result = -ENOSPC;

    pthread_mutex_lock(&attendant->lock);
    if (shelf->count < SHELF_MAX && cell_exists(attendant, cell) && alive_locked(attendant)) {
        struct attendant_cell *made = &attendant->cells[cell];

        commit(&made->client, 0);
        made->request = 0;
        made->grant = grant;
        made->slot = slot;
        made->generation = generation;
        memcpy(made->key, key, sizeof(made->key));
        commit(&made->enclave, shelf->number);
        shelf->ready[shelf->count++] = (struct ready){.cell = cell, .tcs = tcs};
        result = 0;
    }
    pthread_mutex_unlock(&attendant->lock);
    return result;
}

void attendant_withdraw(struct attendant *attendant, struct attendant_shelf *shelf)
{
    pthread_mutex_lock(&attendant->lock);
    shelf->count = 0;
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_clear(struct attendant *attendant, int cell)
{
    pthread_mutex_lock(&attendant->lock);
    if (cell_exists(attendant, cell) && alive_locked(attendant)) {
        struct attendant_cell *used = &attendant->cells[cell];

        commit(&used->enclave, 0); /* first: without it nothing in here counts */
        commit(&used->client, 0);
        crypto_wipe(used->key, sizeof(used->key));
    }
    pthread_mutex_unlock(&attendant->lock);
}

void attendant_count(struct attendant *attendant, struct attendant_shelf *shelf, const uint64_t counts[7])
{
    pthread_mutex_lock(&attendant->lock);
    shelf->counts = (struct plain_counts){counts[0], counts[1], counts[2], counts[3],
                                          counts[4], counts[5], counts[6]};
    pthread_mutex_unlock(&attendant->lock);
}
