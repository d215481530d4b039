// SPDX-License-Identifier: Apache-2.0
//! Agreeing on a key (X25519, RFC 7748) for sealed uploads.  Nothing is allocated; who calls wipes what is secret.
use x25519_dalek::{x25519, X25519_BASEPOINT_BYTES};

/// # Safety
/// Both point to 32 bytes.
#[no_mangle]
pub unsafe extern "C" fn engine_public_key(private_key: *const [u8; 32], public_key: *mut [u8; 32]) {
    *public_key = x25519(*private_key, X25519_BASEPOINT_BYTES);
}

/// False when the secret is zero: the other's point is of low order, and everybody would know what it is.
///
/// # Safety
/// All point to 32 bytes.
#[no_mangle]
pub unsafe extern "C" fn engine_agree(private_key: *const [u8; 32], other: *const [u8; 32], secret: *mut [u8; 32]) -> bool {
    *secret = x25519(*private_key, *other);
    (*secret).iter().fold(0, |all, byte| all | byte) != 0
}
