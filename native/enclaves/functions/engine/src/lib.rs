// SPDX-License-Identifier: Apache-2.0
//! The WebAssembly engine of the functions enclave: wasmi, and what C needs of it.
//!
//! Whatever is allocated here is the running slot's (arena.c), and nothing is shared between slots:
//! wasmi's own locks are never contended, and a slot whose holder is killed takes nothing of anybody's
//! with it.  A panic, and memory that runs out, leave to C at once (`fn_escape`), which throws all of the
//! slot's memory away; no destructor runs, and none is missed.
#![no_std]

extern crate alloc;

mod agree;
mod effort;
mod keys;
mod memory;
mod run;
mod wasi;

use alloc::{boxed::Box, format, string::String};
use core::{ffi::c_void, slice};
use wasmi::{CompilationMode, Config, Engine, ExternType, Linker, Module};

use run::Host;

pub use agree::{engine_agree, engine_public_key};
pub use run::{engine_finish, engine_run};

/// Of the value stack, in bytes, and of calls: what the text of FN_LIMIT_STACK names.
const STACK_BYTES: usize = 1 << 20;
const STACK_CALLS: usize = 10_000;

/// A module that can be run, with all of its code compiled: what wasmi compiles when it is first called it takes from
/// the fuel of the call, which cannot be gone on with when that is a slice's and there is too little.
pub struct Prepared {
    engine: Engine,
    module: Module,
    linker: Linker<Host>,
}

/// Where C wants a text.
#[repr(C)]
pub struct Text {
    bytes: [u8; 240],
    length: u32,
}

impl Text {
    fn put(&mut self, text: &str) {
        let some = text.len().min(self.bytes.len());
        self.bytes[..some].copy_from_slice(&text.as_bytes()[..some]);
        self.length = some as u32;
    }
}

fn engine() -> Engine {
    let mut config = Config::default();
    config
        .consume_fuel(true)
        .compilation_mode(CompilationMode::Eager)
        .ignore_custom_sections(true)
        .wasm_memory64(false)
        .wasm_multi_memory(false)
        .wasm_custom_page_sizes(false)
        .wasm_wide_arithmetic(false)
        .set_max_recursion_depth(STACK_CALLS)
        .set_max_stack_height(STACK_BYTES)
        .set_max_cached_stacks(1);
    Engine::new(&config)
}

/// # Safety
/// `bytes` is readable for `length`.
unsafe fn bytes<'a>(bytes: *const u8, length: usize) -> &'a [u8] {
    if length == 0 {
        &[]
    } else {
        slice::from_raw_parts(bytes, length)
    }
}

/// Is this a module that can be deployed?  0, or 1 and `text` says why not.  `effort` is what preparing it takes.
///
/// # Safety
/// The pointers are what C says they are.
#[no_mangle]
pub unsafe extern "C" fn engine_validate(
    module: *const u8,
    length: usize,
    grants: u32,
    text: *mut Text,
    effort: *mut u64,
) -> i32 {
    match check(bytes(module, length), grants) {
        Ok(()) => {
            *effort = effort::effort(bytes(module, length));
            0
        }
        Err(reason) => {
            (*text).put(&reason);
            1
        }
    }
}

fn check(bytes: &[u8], grants: u32) -> Result<(), String> {
    if !bytes.starts_with(b"\0asm") {
        return Err("it is no WebAssembly module: it does not begin with \\0asm".into());
    }
    let engine = engine();
    let module = Module::new(&engine, bytes).map_err(|error| format!("{error}"))?;
    wasi::check(&module, grants)?;
    match module.get_export("_start") {
        Some(ExternType::Func(ty)) if ty.params().is_empty() && ty.results().is_empty() => Ok(()),
        Some(_) => Err("its export _start is no function without parameters and results".into()),
        None => Err("it exports no function _start: build it as a WASI command".into()),
    }
}

/// Make a module ready to run; NULL when it cannot be, and `text` says why.
///
/// # Safety
/// `engine_validate` has said 0 of the same bytes, with the same grants.
#[no_mangle]
pub unsafe extern "C" fn engine_prepare(
    module: *const u8,
    length: usize,
    grants: u32,
    text: *mut Text,
) -> *mut c_void {
    let engine = engine();
    // Validated when it was deployed, and kept in the enclave since.
    let made = Module::new_unchecked(&engine, bytes(module, length))
        .and_then(|module| wasi::linker(&engine, &module, grants).map(|linker| Prepared { engine, module, linker }));
    match made {
        Ok(prepared) => Box::into_raw(Box::new(prepared)).cast(),
        Err(error) => {
            (*text).put(&format!("{error}"));
            core::ptr::null_mut()
        }
    }
}

/// # Safety
/// `prepared` came from `engine_prepare`, and nothing of it is running.
#[no_mangle]
pub unsafe extern "C" fn engine_forget(prepared: *mut c_void) {
    drop(Box::from_raw(prepared.cast::<Prepared>()));
}
