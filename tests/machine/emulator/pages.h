/*
 * The pages of the test enclave, in the order in which they are added
 */

#ifndef PAGES_H
#define PAGES_H

#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "layout.h"

#define SI_R 1
#define SI_W 2
#define SI_X 4
#define SI_PENDING 8
#define SI_MODIFIED 16
#define SI_PR 32
#define SI_TCS 0x100
#define SI_REG 0x200
#define SI_TRIM 0x400

struct segment {
    unsigned long offset, size, flags;
    int measure;
    unsigned char *src;
};

struct image {
    struct segment seg[6];
    int n;
};

static inline void add_segment(struct image *im, unsigned long offset,
                               unsigned long size, unsigned long flags,
                               int measure, const void *src)
{
    struct segment *s = &im->seg[im->n++];

    s->offset = offset;
    s->size = size;
    s->flags = flags;
    s->measure = measure;
    s->src = aligned_alloc(PAGE, size);
    if (src) {
        memcpy(s->src, src, size);
    } else {
        memset(s->src, 0, size);
    }
}

/* @heap bytes more, measured or not, for the benchmark */
static inline void make_image(struct image *im, const char *file,
                              unsigned long heap, int measure_heap)
{
    static unsigned char bin[TEXT_SIZE + DATA_SIZE];
    FILE *f = fopen(file, "rb");
    int i;

    if (!f || fread(bin, 1, sizeof(bin), f) != sizeof(bin)) {
        fprintf(stderr, "cannot read %s\n", file);
        exit(2);
    }
    fclose(f);

    im->n = 0;
    add_segment(im, OFF_TCS, NTCS * PAGE, SI_TCS, 1, NULL);
    for (i = 0; i < NTCS; i++) {
        uint64_t *tcs = (uint64_t *)(im->seg[0].src + i * PAGE);

        tcs[2] = OFF_SSA + i * NSSA * PAGE;     /* OSSA */
        tcs[3] = (uint64_t)NSSA << 32;          /* CSSA, NSSA */
        tcs[4] = OFF_TEXT;                      /* OENTRY */
        tcs[8] = ~0ULL;                         /* FSLIMIT, GSLIMIT */
    }
    add_segment(im, OFF_SSA, (NSSA + 1) * NTCS * PAGE, SI_REG | SI_R | SI_W, 1,
                NULL);
    add_segment(im, OFF_TEXT, TEXT_SIZE, SI_REG | SI_R | SI_X, 1, bin);
    add_segment(im, OFF_DATA, DATA_SIZE, SI_REG | SI_R | SI_W, 1,
                bin + TEXT_SIZE);
    if (heap) {
        add_segment(im, OFF_HEAP, heap, SI_REG | SI_R | SI_W, measure_heap,
                    NULL);
    }
}

#endif
