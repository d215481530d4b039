// SPDX-License-Identifier: Apache-2.0
//! Rounding and square roots by the processor, as WebAssembly defines them.
//!
//! The crate libm, which this replaces, gives a signalling NaN back from floor, ceil and trunc as it was;
//! WebAssembly wants it quiet, which is what the instructions of SSE4.1 do.  (Everything in an enclave may use
//! these: native/sdk/flags.toml.)
#![no_std]

#[cfg(not(target_feature = "sse4.1"))]
compile_error!("engine_library.py compiles it with SSE4.1");

use core::arch::x86_64::*;
use core::marker::PhantomData;

pub struct Libm<T>(PhantomData<T>);

macro_rules! functions {
    ($float:ty, $bits:ty, $set:ident, $get:ident, $floor:ident, $ceil:ident, $round:ident, $sqrt:ident) => {
        impl Libm<$float> {
            const SIGN: $bits = 1 << (<$bits>::BITS - 1);

            #[inline]
            pub fn fabs(x: $float) -> $float {
                <$float>::from_bits(x.to_bits() & !Self::SIGN)
            }

            #[inline]
            pub fn copysign(x: $float, sign: $float) -> $float {
                <$float>::from_bits(x.to_bits() & !Self::SIGN | sign.to_bits() & Self::SIGN)
            }

            #[inline]
            pub fn floor(x: $float) -> $float {
                unsafe { $get($floor($set(x), $set(x))) }
            }

            #[inline]
            pub fn ceil(x: $float) -> $float {
                unsafe { $get($ceil($set(x), $set(x))) }
            }

            #[inline]
            pub fn trunc(x: $float) -> $float {
                unsafe { $get($round::<{ _MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC }>($set(x), $set(x))) }
            }

            /// Halves away from zero.
            #[inline]
            pub fn round(x: $float) -> $float {
                // With the largest number below a half: with a half itself what is just below one would become one.
                let almost = <$float>::from_bits((0.5 as $float).to_bits() - 1);
                Self::trunc(x + Self::copysign(almost, x))
            }

            #[inline]
            pub fn sqrt(x: $float) -> $float {
                unsafe { $get($sqrt($set(x))) }
            }
        }
    };
}

#[inline]
fn sqrt_sd(x: __m128d) -> __m128d {
    unsafe { _mm_sqrt_sd(x, x) }
}

functions!(f32, u32, _mm_set_ss, _mm_cvtss_f32, _mm_floor_ss, _mm_ceil_ss, _mm_round_ss, _mm_sqrt_ss);
functions!(f64, u64, _mm_set_sd, _mm_cvtsd_f64, _mm_floor_sd, _mm_ceil_sd, _mm_round_sd, sqrt_sd);
