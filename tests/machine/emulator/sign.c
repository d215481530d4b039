/*
 * Sign the test enclave: sign ENCLAVE KEY HEAP MEASURE_HEAP OUTPUT
 */

#define OPENSSL_SUPPRESS_DEPRECATED
#include <openssl/bn.h>
#include <openssl/pem.h>
#include <openssl/rsa.h>
#include <openssl/sha.h>
#include "pages.h"

static unsigned char sig[1808];

static void put(int offset, const BIGNUM *n)
{
    BN_bn2lebinpad(n, sig + offset, 384);
}

static void put64(int offset, uint64_t v)
{
    memcpy(sig + offset, &v, 8);
}

static void measure(SHA256_CTX *sha, const char *tag, uint64_t a, uint64_t b)
{
    unsigned char block[64] = { 0 };

    memcpy(block, tag, strlen(tag));
    memcpy(block + 8, &a, 8);
    memcpy(block + 16, &b, 8);
    SHA256_Update(sha, block, 64);
}

int main(int argc, char **argv)
{
    unsigned char hash[32], body[256], raw[384];
    const BIGNUM *n, *e, *d;
    BN_CTX *bc = BN_CTX_new();
    BIGNUM *s = BN_new(), *q = BN_new(), *r = BN_new(), *t = BN_new();
    unsigned long off;
    struct image im;
    SHA256_CTX sha;
    unsigned len;
    RSA *rsa;
    FILE *f;
    int i;

    if (argc != 6) {
        return 2;
    }
    make_image(&im, argv[1], strtoul(argv[3], NULL, 0), atoi(argv[4]));

    SHA256_Init(&sha);
    {
        unsigned char block[64] = "ECREATE";
        uint32_t frame = 1;
        uint64_t size = ENCL_SIZE;

        memcpy(block + 8, &frame, 4);
        memcpy(block + 12, &size, 8);
        SHA256_Update(&sha, block, 64);
    }
    for (i = 0; i < im.n; i++) {
        struct segment *g = &im.seg[i];

        for (off = 0; off < g->size; off += PAGE) {
            unsigned long c;

            measure(&sha, "EADD", g->offset + off, g->flags);
            for (c = 0; g->measure && c < PAGE; c += 256) {
                measure(&sha, "EEXTEND", g->offset + off + c, 0);
                SHA256_Update(&sha, g->src + off + c, 256);
            }
        }
    }
    SHA256_Final(hash, &sha);

    f = fopen(argv[2], "r");
    rsa = f ? PEM_read_RSAPrivateKey(f, NULL, NULL, NULL) : NULL;
    if (!rsa) {
        fprintf(stderr, "cannot read %s\n", argv[2]);
        return 2;
    }
    RSA_get0_key(rsa, &n, &e, &d);

    memcpy(sig, "\6\0\0\0\xe1\0\0\0\0\0\1\0\0\0\0\0", 16);
    memcpy(sig + 24, "\1\1\0\0\x60\0\0\0\x60\0\0\0\1\0\0\0", 16);
    put(128, n);
    sig[512] = 3;
    sig[900] = 1;                               /* MISCSELECT: EXINFO */
    memset(sig + 904, 0xff, 4);
    put64(928, 4);                              /* ATTRIBUTES: MODE64BIT */
    put64(936, 7);                              /* XFRM: x87, SSE, AVX */
    put64(944, ~0x12ULL);                       /* all but DEBUG, PROVISION */
    put64(952, ~0ULL);
    memcpy(sig + 960, hash, 32);
    sig[1024] = 1;                              /* ISVPRODID */
    sig[1026] = 2;                              /* ISVSVN */

    memcpy(body, sig, 128);
    memcpy(body + 128, sig + 900, 128);
    SHA256(body, sizeof(body), hash);
    if (!RSA_sign(NID_sha256, hash, 32, raw, &len, rsa) || len != 384) {
        return 2;
    }
    BN_bin2bn(raw, 384, s);
    put(516, s);
    BN_mul(t, s, s, bc);                        /* Q1 = s^2 / n */
    BN_div(q, r, t, n, bc);
    put(1040, q);
    BN_mul(t, r, s, bc);                        /* Q2 = s * (s^2 % n) / n */
    BN_div(q, r, t, n, bc);
    put(1424, q);

    f = fopen(argv[5], "wb");
    return !f || fwrite(sig, sizeof(sig), 1, f) != 1 || fclose(f);
}
