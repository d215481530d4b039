// SPDX-License-Identifier: Apache-2.0
//! Keys and values of the function's owner, for modules with the grant: ../../keys.c says what each call does.
use alloc::vec::Vec;
use wasmi::{Error, FuncType, Linker, ValType};

use crate::{
    run::Host,
    wasi::{pay, range, split, write, Answer, Call, COPY_FUEL, EFAULT, SUCCESS},
};

pub const MODULE: &str = "teemate_keys";
/// FN_GRANT_KEYS of ../../functions.h.
pub const GRANT: u32 = 2;

/// Fuel for a key that is looked up, and for a page of a list, which looks at many.
const KEY_FUEL: u64 = 2048;
const LIST_FUEL: u64 = 65_536;
/// What is read and written at once is copied; more than a value, or a page, is never wanted.
const KEY_MAX: u32 = 256;
const VALUE_MAX: u32 = 65_536;
const PAGE_MAX: u32 = 262_144;

/// Functions, and how many parameters each has.
const FUNCTIONS: &[(&str, usize)] = &[("delete", 2), ("get", 5), ("list", 6), ("put", 4)];

extern "C" {
    fn fn_keys_put(key: *const u8, key_length: usize, value: *const u8, length: usize) -> i32;
    fn fn_keys_get(key: *const u8, key_length: usize, value: *mut u8, room: usize, length: *mut u32) -> i32;
    fn fn_keys_delete(key: *const u8, key_length: usize) -> i32;
    fn fn_keys_list(
        prefix: *const u8,
        prefix_length: usize,
        records: *mut u8,
        room: usize,
        cursor: *mut u64,
        length: *mut u32,
    ) -> i32;
}

pub fn function_type(name: &str) -> Option<FuncType> {
    let &(_, parameters) = FUNCTIONS.iter().find(|(known, _)| *known == name)?;
    let types: Vec<_> = (0..parameters).map(|_| ValType::I32).collect();
    Some(FuncType::new(types, Some(ValType::I32)))
}

pub fn define(linker: &mut Linker<Host>, name: &str) -> Result<(), Error> {
    match name {
        "delete" => linker.func_wrap(MODULE, name, delete),
        "get" => linker.func_wrap(MODULE, name, get),
        "list" => linker.func_wrap(MODULE, name, list),
        "put" => linker.func_wrap(MODULE, name, put),
        _ => return Ok(()),
    }?;
    Ok(())
}

/// A copy of the key, whose length the other side looks at; None where it does not lie in the memory.
fn key(caller: &mut Call, at: u32, length: u32) -> Option<Vec<u8>> {
    let (memory, _) = split(caller)?;
    // One too long is still one too long.
    range(memory, at, length.min(KEY_MAX + 1) as usize).map(|key| key.to_vec())
}

fn put(mut caller: Call, at: u32, length: u32, value: u32, value_length: u32) -> Answer {
    pay(&mut caller, KEY_FUEL + u64::from(value_length.min(VALUE_MAX)) / 64 * COPY_FUEL)?;
    let Some(key) = key(&mut caller, at, length) else { return Ok(EFAULT) };
    let Some((memory, _)) = split(&mut caller) else { return Ok(EFAULT) };
    let Some(value) = range(memory, value, value_length as usize) else { return Ok(EFAULT) };
    Ok(unsafe { fn_keys_put(key.as_ptr(), key.len(), value.as_ptr(), value.len()) })
}

fn get(mut caller: Call, at: u32, length: u32, value: u32, room: u32, out: u32) -> Answer {
    let room = room.min(VALUE_MAX);
    pay(&mut caller, KEY_FUEL + u64::from(room) / 64 * COPY_FUEL)?;
    let Some(key) = key(&mut caller, at, length) else { return Ok(EFAULT) };
    let Some((memory, _)) = split(&mut caller) else { return Ok(EFAULT) };
    let Some(place) = range(memory, value, room as usize) else { return Ok(EFAULT) };
    let mut has = 0;
    let errno = unsafe { fn_keys_get(key.as_ptr(), key.len(), place.as_mut_ptr(), place.len(), &mut has) };
    answer(&mut caller, out, has, errno)
}

fn delete(mut caller: Call, at: u32, length: u32) -> Answer {
    pay(&mut caller, KEY_FUEL)?;
    let Some(key) = key(&mut caller, at, length) else { return Ok(EFAULT) };
    Ok(unsafe { fn_keys_delete(key.as_ptr(), key.len()) })
}

fn list(mut caller: Call, at: u32, length: u32, records: u32, room: u32, cursor: u32, out: u32) -> Answer {
    let room = room.min(PAGE_MAX);
    pay(&mut caller, LIST_FUEL + u64::from(room) / 64 * COPY_FUEL)?;
    let Some(prefix) = key(&mut caller, at, length) else { return Ok(EFAULT) };
    let Some((memory, _)) = split(&mut caller) else { return Ok(EFAULT) };
    let Some(word) = range(memory, cursor, 8) else { return Ok(EFAULT) };
    let mut next = word.iter().rev().fold(0, |all, &byte| all << 8 | u64::from(byte));
    let Some(place) = range(memory, records, room as usize) else { return Ok(EFAULT) };
    let mut wrote = 0;
    let errno = unsafe {
        fn_keys_list(prefix.as_ptr(), prefix.len(), place.as_mut_ptr(), place.len(), &mut next, &mut wrote)
    };
    match write(&mut caller, cursor, &next.to_le_bytes()) {
        SUCCESS => answer(&mut caller, out, wrote, errno),
        fault => Ok(fault),
    }
}

/// The errno, and how much it is about.
fn answer(caller: &mut Call, out: u32, length: u32, errno: i32) -> Answer {
    Ok(match write(caller, out, &length.to_le_bytes()) {
        SUCCESS => errno,
        fault => fault,
    })
}
