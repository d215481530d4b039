"""Published vectors, and random inputs against independent implementations."""

from __future__ import annotations

import hashlib
import hmac
from functools import cache

import pytest
from cryptography.hazmat.primitives import cmac, hashes
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from hypothesis import given, settings
from hypothesis import strategies as st
from native_library import Crypto

RANDOM = settings(max_examples=150, deadline=None)
KEYS = st.binary(min_size=16, max_size=16)


@pytest.mark.parametrize(
    ("message", "digest"),
    [
        (b"", "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"),
        (b"abc", "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"),
        (
            b"abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq",
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1",
        ),
        (b"a" * 1_000_000, "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0"),
    ],
    ids=["empty", "one block", "two blocks", "a million"],
)
def test_sha256_gives_the_digests_of_fips_180(crypto: Crypto, message: bytes, digest: str) -> None:
    assert crypto.sha256(message).hex() == digest


@RANDOM
@given(pieces=st.lists(st.binary(max_size=300), max_size=6))
def test_sha256_does_not_depend_on_how_the_message_is_cut(crypto: Crypto, pieces: list[bytes]) -> None:
    assert crypto.sha256(*pieces) == hashlib.sha256(b"".join(pieces)).digest()


@pytest.mark.parametrize("length", [*range(54, 67), *range(118, 130), 4096])
def test_sha256_pads_every_length_right(crypto: Crypto, length: int) -> None:
    message = bytes(range(256)) * 17
    assert crypto.sha256(message[:length]) == hashlib.sha256(message[:length]).digest()


# RFC 4231, section 4; case 5 truncates and is left out.
@pytest.mark.parametrize(
    ("key", "data", "mac"),
    [
        (b"\x0b" * 20, b"Hi There", "b0344c61d8db38535ca8afceaf0bf12b881dc200c9833da726e9376c2e32cff7"),
        (
            b"Jefe",
            b"what do ya want for nothing?",
            "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843",
        ),
        (b"\xaa" * 20, b"\xdd" * 50, "773ea91e36800e46854db8ebd09181a72959098b3ef8c122d9635514ced565fe"),
        (
            bytes(range(1, 26)),
            b"\xcd" * 50,
            "82558a389a443c0ea4cc819899f2083a85f0faa3e578f8077a2e3ff46729665b",
        ),
        (
            b"\xaa" * 131,
            b"Test Using Larger Than Block-Size Key - Hash Key First",
            "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54",
        ),
    ],
)
def test_hmac_gives_the_macs_of_rfc_4231(crypto: Crypto, key: bytes, data: bytes, mac: str) -> None:
    assert crypto.hmac(key, data).hex() == mac


@RANDOM
@given(key=st.binary(max_size=150), a=st.binary(max_size=150), b=st.binary(max_size=150))
def test_hmac_of_two_pieces_is_that_of_their_concatenation(
    crypto: Crypto, key: bytes, a: bytes, b: bytes
) -> None:
    assert crypto.hmac_2(key, a, b) == hmac.digest(key, a + b, "sha256")


def test_aes_encrypts_the_example_of_fips_197(crypto: Crypto) -> None:
    block = bytes.fromhex("00112233445566778899aabbccddeeff")
    assert crypto.aes(bytes(range(16)), block).hex() == "69c4e0d86a7b0430d8cdb78070b4c55a"


@RANDOM
@given(key=KEYS, block=st.binary(min_size=16, max_size=16))
def test_aes_agrees_with_openssl(crypto: Crypto, key: bytes, block: bytes) -> None:
    encryptor = Cipher(algorithms.AES128(key), modes.ECB()).encryptor()
    assert crypto.aes(key, block) == encryptor.update(block)


@pytest.mark.parametrize(
    ("length", "mac"),
    [
        (0, "bb1d6929e95937287fa37d129b756746"),
        (16, "070a16b46b4d4144f79bdd9dd04a287c"),
        (40, "dfa66747de9ae63030ca32611497c827"),
        (64, "51f0bebf7e3b9d92fc49741779363cfe"),
    ],
)
def test_cmac_gives_the_macs_of_rfc_4493(crypto: Crypto, length: int, mac: str) -> None:
    message = bytes.fromhex(
        "6bc1bee22e409f96e93d7e117393172aae2d8a571e03ac9c9eb76fac45af8e51"
        "30c81c46a35ce411e5fbc1191a0a52eff69f2445df4f9b17ad2b417be66c3710"
    )
    key = bytes.fromhex("2b7e151628aed2a6abf7158809cf4f3c")
    assert crypto.cmac(key, message[:length]).hex() == mac


@RANDOM
@given(key=KEYS, data=st.binary(max_size=100))
def test_cmac_agrees_with_openssl(crypto: Crypto, key: bytes, data: bytes) -> None:
    other = cmac.CMAC(algorithms.AES128(key))
    other.update(data)
    assert crypto.cmac(key, data) == other.finalize()


# The GCM specification's test cases 1 to 4 (AES-128, 96-bit IV).
GCM_KEY = "feffe9928665731c6d6a8f9467308308"
GCM_IV = "cafebabefacedbaddecaf888"
GCM_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
GCM_CIPHER = (
    "42831ec2217774244b7221b784d0d49ce3aa212f2c02a4e035c17e2329aca12e"
    "21d514b25466931c7d8f6a5aac84aa051ba30b396a0aac973d58e091473f5985"
)


@pytest.mark.parametrize(
    ("key", "iv", "aad", "plain", "cipher", "tag"),
    [
        ("00" * 16, "00" * 12, "", "", "", "58e2fccefa7e3061367f1d57a4e7455a"),
        (
            "00" * 16,
            "00" * 12,
            "",
            "00" * 16,
            "0388dace60b6a392f328c2b971b2fe78",
            "ab6e47d42cec13bdf53a67b21257bddf",
        ),
        (GCM_KEY, GCM_IV, "", GCM_PLAIN, GCM_CIPHER, "4d5c2af327cd64a62cf35abd2ba6fab4"),
        (
            GCM_KEY,
            GCM_IV,
            "feedfacedeadbeeffeedfacedeadbeefabaddad2",
            GCM_PLAIN[:120],
            GCM_CIPHER[:120],
            "5bc94fbc3221a5db94fae95ae7121a47",
        ),
    ],
    ids=["1", "2", "3", "4"],
)
def test_gcm_gives_the_results_of_its_specification(
    crypto: Crypto, key: str, iv: str, aad: str, plain: str, cipher: str, tag: str
) -> None:
    key_, iv_, aad_ = bytes.fromhex(key), bytes.fromhex(iv), bytes.fromhex(aad)
    sealed = crypto.gcm_seal(key_, iv_, aad_, bytes.fromhex(plain))
    assert (sealed[0].hex(), sealed[1].hex()) == (cipher, tag)
    assert crypto.gcm_open(key_, iv_, aad_, *sealed) == (0, bytes.fromhex(plain))


@RANDOM
@given(
    key=KEYS,
    iv=st.binary(min_size=12, max_size=12),
    aad=st.binary(max_size=50),
    data=st.binary(max_size=400),
)
def test_gcm_agrees_with_openssl(crypto: Crypto, key: bytes, iv: bytes, aad: bytes, data: bytes) -> None:
    cipher, tag = crypto.gcm_seal(key, iv, aad, data)
    assert cipher + tag == AESGCM(key).encrypt(iv, data, aad)
    assert crypto.gcm_open(key, iv, aad, cipher, tag) == (0, data)


@RANDOM
@given(data=st.binary(min_size=1, max_size=40), bit=st.integers(0, 127))
def test_gcm_gives_nothing_out_when_the_tag_is_wrong(crypto: Crypto, data: bytes, bit: int) -> None:
    key, iv = bytes(16), bytes(12)
    cipher, tag = crypto.gcm_seal(key, iv, b"", data)
    forged = (int.from_bytes(tag, "big") ^ 1 << bit).to_bytes(16, "big")
    assert crypto.gcm_open(key, iv, b"", cipher, forged) == (-1, bytes(len(data)))


@cache
def rsa_example() -> tuple[int, int, int, int, bytes]:
    """Return modulus, signature, Q1, Q2 and digest, of a key that is made now."""
    key = rsa.generate_private_key(public_exponent=3, key_size=3072)
    message = b"what EINIT would look at"
    s = int.from_bytes(key.sign(message, padding.PKCS1v15(), hashes.SHA256()), "big")
    m = key.public_key().public_numbers().n
    q1 = s * s // m
    q2 = (s**3 - q1 * s * m) // m
    return m, s, q1, q2, hashlib.sha256(message).digest()


def test_rsa_takes_a_signature_with_its_quotients(crypto: Crypto) -> None:
    assert crypto.rsa3072_e3_verify(*rsa_example()) == 0


@pytest.mark.parametrize("bit", [0, 1, 777, 3070])
def test_rsa_tells_a_wrong_signature_from_wrong_quotients(crypto: Crypto, bit: int) -> None:
    m, s, q1, q2, digest = rsa_example()
    flip = 1 << bit
    assert crypto.rsa3072_e3_verify(m, s ^ flip, q1, q2, digest) == -1
    assert crypto.rsa3072_e3_verify(m ^ flip, s, q1, q2, digest) == -1
    assert crypto.rsa3072_e3_verify(m, s, q1 ^ flip, q2, digest) == -2
    assert crypto.rsa3072_e3_verify(m, s, q1, q2 ^ flip, digest) == -2


def test_rsa_refuses_the_signature_of_another_digest(crypto: Crypto) -> None:
    m, s, q1, q2, digest = rsa_example()
    other = bytes([digest[0] ^ 1]) + digest[1:]
    assert crypto.rsa3072_e3_verify(m, s, q1, q2, other) == -1


def test_rsa_refuses_a_signature_that_is_not_below_the_modulus(crypto: Crypto) -> None:
    m, s, q1, q2, digest = rsa_example()
    assert crypto.rsa3072_e3_verify(m, m, q1, q2, digest) == -1
    if s + m < 1 << 3072:
        big = s + m
        first = big * big // m
        second = (big**3 - first * big * m) // m
        if max(first, second) < 1 << 3072:
            assert crypto.rsa3072_e3_verify(m, big, first, second, digest) == -1


def test_rsa_ends_with_a_modulus_of_zero(crypto: Crypto) -> None:
    assert crypto.rsa3072_e3_verify(0, 0, 0, 0, bytes(32)) == -1


@given(a=st.binary(max_size=40), b=st.binary(max_size=40))
@RANDOM
def test_compare_says_whether_bytes_are_equal(crypto: Crypto, a: bytes, b: bytes) -> None:
    length = min(len(a), len(b))
    assert crypto.lib.crypto_compare(a, a, len(a)) == 0
    assert (crypto.lib.crypto_compare(a, b, length) == 0) == (a[:length] == b[:length])


def test_wipe_leaves_zeros(crypto: Crypto) -> None:
    secret = crypto.ffi.new("uint8_t[]", b"secret")
    crypto.lib.crypto_wipe(secret, 6)
    assert bytes(secret)[:6] == bytes(6)
