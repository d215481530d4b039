// SPDX-License-Identifier: Apache-2.0
//! WASI preview 1 without a system: arguments, environment, standard streams, clocks, randomness, exit.
//!
//! All of its functions are there, so that programs link.  Files and sockets do not exist: what names a
//! descriptor other than 0, 1 and 2 is EBADF, what names a path ENOTCAPABLE, and what cannot be, ENOSYS.
//! Clocks tell what the enclave's host has told: it can lie about the time.
use alloc::{format, string::String, vec::Vec};
use wasmi::{Caller, Engine, Error, ExternType, FuncType, Linker, Module, Val, ValType};

use crate::{
    keys,
    run::{Host, Stream},
};

const MODULE: &str = "wasi_snapshot_preview1";

pub const SUCCESS: i32 = 0;
const EBADF: i32 = 8;
pub const EFAULT: i32 = 21;
const EINVAL: i32 = 28;
const EIO: i32 = 29;
const ENOSYS: i32 = 52;
const ESPIPE: i32 = 70;
const ENOTCAPABLE: i32 = 76;

const CHARACTER_DEVICE: u8 = 2;
const RIGHT_READ: u64 = 1 << 1;
const RIGHT_WRITE: u64 = 1 << 6;
/// The time that is told comes several times a second.
const RESOLUTION: u64 = 100_000_000;
/// Fuel, which is paid before the work, as the engine counts only its own: for 8 bytes of randomness, for a buffer
/// of a list, and for 64 bytes that are copied.
const RANDOM_FUEL: u64 = 64;
const VECTOR_FUEL: u64 = 8;
pub const COPY_FUEL: u64 = 1;
/// For leaving to the caller and coming back.
const STREAM_FUEL: u64 = 4096;
const VECTORS: u32 = 1024;
/// Bytes of randomness between two payments.
const RANDOM_PIECE: usize = 4096;

extern "C" {
    fn tm_random(data: *mut u8, length: usize);
    fn tm_time() -> u64;
}

pub type Call<'a> = Caller<'a, Host>;
pub type Answer = Result<i32, Error>;

/// Errors of WASI by name: (name, parameters, errno); parameters are `i` for i32 and `I` for i64.
const REFUSED: &[(&str, &str, i32)] = &[
    ("fd_advise", "iIIi", EBADF),
    ("fd_allocate", "iII", EBADF),
    ("fd_datasync", "i", EBADF),
    ("fd_fdstat_set_flags", "ii", EBADF),
    ("fd_fdstat_set_rights", "iII", EBADF),
    ("fd_filestat_get", "ii", EBADF),
    ("fd_filestat_set_size", "iI", EBADF),
    ("fd_filestat_set_times", "iIIi", EBADF),
    ("fd_pread", "iiiIi", EBADF),
    ("fd_prestat_get", "ii", EBADF),
    ("fd_prestat_dir_name", "iii", EBADF),
    ("fd_pwrite", "iiiIi", EBADF),
    ("fd_readdir", "iiiIi", EBADF),
    ("fd_renumber", "ii", EBADF),
    ("fd_sync", "i", EBADF),
    ("fd_tell", "ii", ESPIPE),
    ("path_create_directory", "iii", ENOTCAPABLE),
    ("path_filestat_get", "iiiii", ENOTCAPABLE),
    ("path_filestat_set_times", "iiiiIIi", ENOTCAPABLE),
    ("path_link", "iiiiiii", ENOTCAPABLE),
    ("path_open", "iiiiiIIii", ENOTCAPABLE),
    ("path_readlink", "iiiiii", ENOTCAPABLE),
    ("path_remove_directory", "iii", ENOTCAPABLE),
    ("path_rename", "iiiiii", ENOTCAPABLE),
    ("path_symlink", "iiiii", ENOTCAPABLE),
    ("path_unlink_file", "iii", ENOTCAPABLE),
    ("poll_oneoff", "iiii", ENOSYS),
    ("proc_raise", "i", ENOSYS),
    ("sock_accept", "iii", EBADF),
    ("sock_recv", "iiiiii", EBADF),
    ("sock_send", "iiiii", EBADF),
    ("sock_shutdown", "ii", EBADF),
];

/// Parameters of those that are here; all but proc_exit return an errno.
const DONE: &[(&str, &str)] = &[
    ("args_get", "ii"),
    ("args_sizes_get", "ii"),
    ("clock_res_get", "ii"),
    ("clock_time_get", "iIi"),
    ("environ_get", "ii"),
    ("environ_sizes_get", "ii"),
    ("fd_close", "i"),
    ("fd_fdstat_get", "ii"),
    ("fd_read", "iiii"),
    ("fd_seek", "iIii"),
    ("fd_write", "iiii"),
    ("proc_exit", "i"),
    ("random_get", "ii"),
    ("sched_yield", ""),
];

/// The type of one of WASI's functions.
fn function_type(name: &str) -> Option<FuncType> {
    let refused = REFUSED.iter().map(|&(known, parameters, _)| (known, parameters));
    let (_, parameters) = refused.chain(DONE.iter().copied()).find(|&(known, _)| known == name)?;
    let types: Vec<_> = parameters.bytes().map(|b| if b == b'I' { ValType::I64 } else { ValType::I32 }).collect();
    Some(FuncType::new(types, (name != "proc_exit").then_some(ValType::I32)))
}

/// Why `module` imports what there is not, if it does.
pub fn check(module: &Module, grants: u32) -> Result<(), String> {
    for import in module.imports() {
        let (from, name) = (import.module(), import.name());
        let ours = match from {
            MODULE => function_type(name),
            keys::MODULE => keys::function_type(name),
            _ => None,
        };
        if from == keys::MODULE && ours.is_some() && grants & keys::GRANT == 0 {
            return Err(format!("it imports {from}.{name}: deploy it with the grant \"keys\""));
        }
        match (ours, import.ty()) {
            (None, _) if from == keys::MODULE => return Err(format!("it imports {from}.{name}, which there is not")),
            (None, _) => return Err(format!("it imports {from}.{name}: there is {MODULE} and nothing else")),
            (Some(ours), ExternType::Func(theirs)) if ours == *theirs => (),
            _ if from == keys::MODULE => return Err(format!("it imports {from}.{name} with another type than it has")),
            _ => return Err(format!("it imports {from}.{name} with another type than WASI gives it")),
        }
    }
    Ok(())
}

/// A linker with what `module`, whose imports were checked, wants of WASI.
pub fn linker(engine: &Engine, module: &Module, grants: u32) -> Result<Linker<Host>, Error> {
    let mut linker = Linker::new(engine);
    linker.allow_shadowing(true); // who imports a function twice has it twice
    for import in module.imports() {
        match import.module() {
            keys::MODULE if grants & keys::GRANT != 0 => keys::define(&mut linker, import.name())?,
            MODULE => define(&mut linker, import.name())?,
            _ => (), // instantiating says that it is missing
        }
    }
    Ok(linker)
}

fn define(linker: &mut Linker<Host>, name: &str) -> Result<(), Error> {
    if let Some(&(_, _, errno)) = REFUSED.iter().find(|(known, _, _)| *known == name) {
        let Some(ty) = function_type(name) else { return Ok(()) };
        linker.func_new(MODULE, name, ty, move |_, _, results| {
            results[0] = Val::I32(errno);
            Ok(())
        })?;
        return Ok(());
    }
    match name {
        "args_get" => linker.func_wrap(MODULE, name, |c: Call, list: u32, text: u32| strings(c, |h| h.args, list, text)),
        "args_sizes_get" => linker.func_wrap(MODULE, name, |c: Call, n: u32, size: u32| sizes(c, |h| h.args, n, size)),
        "clock_res_get" => linker.func_wrap(MODULE, name, clock_res_get),
        "clock_time_get" => linker.func_wrap(MODULE, name, clock_time_get),
        "environ_get" => linker.func_wrap(MODULE, name, |c: Call, list: u32, text: u32| strings(c, |h| h.env, list, text)),
        "environ_sizes_get" => linker.func_wrap(MODULE, name, |c: Call, n: u32, size: u32| sizes(c, |h| h.env, n, size)),
        "fd_close" => linker.func_wrap(MODULE, name, |_: Call, fd: u32| if fd < 3 { SUCCESS } else { EBADF }),
        "fd_fdstat_get" => linker.func_wrap(MODULE, name, fd_fdstat_get),
        "fd_read" => linker.func_wrap(MODULE, name, fd_read),
        "fd_seek" => linker.func_wrap(MODULE, name, |_: Call, fd: u32, _: i64, _: i32, _: u32| if fd < 3 { ESPIPE } else { EBADF }),
        "fd_write" => linker.func_wrap(MODULE, name, fd_write),
        "proc_exit" => linker.func_wrap(MODULE, name, |_: Call, status: i32| -> Result<(), Error> { Err(Error::i32_exit(status)) }),
        "random_get" => linker.func_wrap(MODULE, name, random_get),
        "sched_yield" => linker.func_wrap(MODULE, name, |_: Call| SUCCESS),
        _ => return Ok(()), // instantiating says that it is missing
    }?;
    Ok(())
}

/// The memory of the calling instance, and what else there is of it.
pub fn split<'a>(caller: &'a mut Call) -> Option<(&'a mut [u8], &'a mut Host)> {
    if caller.data().memory.is_none() {
        // In a start function, before anybody could look.
        let memory = caller.get_export("memory")?.into_memory()?;
        caller.data_mut().memory = Some(memory);
    }
    let memory = caller.data().memory?;
    Some(memory.data_and_store_mut(caller))
}

pub fn range(memory: &mut [u8], at: u32, length: usize) -> Option<&mut [u8]> {
    memory.get_mut(at as usize..)?.get_mut(..length)
}

pub fn write(caller: &mut Call, at: u32, data: &[u8]) -> i32 {
    match split(caller).and_then(|(memory, _)| range(memory, at, data.len())) {
        Some(place) => {
            place.copy_from_slice(data);
            SUCCESS
        }
        None => EFAULT,
    }
}

/// Burn fuel for work that the engine does not see, before it is done.
pub fn pay(caller: &mut Call, fuel: u64) -> Result<(), Error> {
    let has = caller.get_fuel()?;
    caller.set_fuel(has.saturating_sub(fuel))?;
    // The store has a slice only: what it lacks is taken from the next.
    match fuel.checked_sub(has) {
        None | Some(0) => Ok(()),
        Some(lacks) => caller.data_mut().owe(lacks),
    }
}

fn sizes(mut caller: Call, which: fn(&Host) -> &'static [u8], count: u32, size: u32) -> Answer {
    let text = which(caller.data());
    pay(&mut caller, text.len() as u64 / 4)?;
    let number = text.iter().filter(|&&byte| byte == 0).count() as u32;
    Ok(match write(&mut caller, count, &number.to_le_bytes()) {
        SUCCESS => write(&mut caller, size, &(text.len() as u32).to_le_bytes()),
        errno => errno,
    })
}

fn strings(mut caller: Call, which: fn(&Host) -> &'static [u8], mut list: u32, mut at: u32) -> Answer {
    let text = which(caller.data());
    // They may be of one byte each, with its zero.
    pay(&mut caller, text.len() as u64 * VECTOR_FUEL / 2)?;
    for string in text.split_inclusive(|&byte| byte == 0) {
        for errno in [write(&mut caller, list, &at.to_le_bytes()), write(&mut caller, at, string)] {
            if errno != SUCCESS {
                return Ok(errno);
            }
        }
        list = list.wrapping_add(4);
        at = at.wrapping_add(string.len() as u32);
    }
    Ok(SUCCESS)
}

fn clock_res_get(mut caller: Call, clock: u32, out: u32) -> i32 {
    if clock > 3 {
        return EINVAL;
    }
    write(&mut caller, out, &RESOLUTION.to_le_bytes())
}

fn clock_time_get(mut caller: Call, clock: u32, _precision: i64, out: u32) -> i32 {
    if clock > 3 {
        return EINVAL;
    }
    match unsafe { tm_time() } {
        0 => EIO, // nobody has told it yet
        now => write(&mut caller, out, &now.to_le_bytes()),
    }
}

fn fd_fdstat_get(mut caller: Call, fd: u32, out: u32) -> i32 {
    if fd > 2 {
        return EBADF;
    }
    let mut stat = [0; 24];
    stat[0] = CHARACTER_DEVICE;
    stat[8..16].copy_from_slice(&(if fd == 0 { RIGHT_READ } else { RIGHT_WRITE }).to_le_bytes());
    write(&mut caller, out, &stat)
}

/// (address, length) of a list of buffers that all lie in the memory, and the sum of the lengths; or an errno.
fn vectors(caller: &mut Call, list: u32, count: u32) -> Result<Result<(Vec<(u32, usize)>, u32), i32>, Error> {
    let count = count.min(VECTORS);
    pay(caller, u64::from(count) * VECTOR_FUEL)?;
    let Some((memory, _)) = split(caller) else { return Ok(Err(EFAULT)) };
    let Some(words) = range(memory, list, count as usize * 8) else { return Ok(Err(EFAULT)) };
    let word = |at: &[u8]| u32::from_le_bytes([at[0], at[1], at[2], at[3]]);
    let vectors: Vec<_> = words.chunks_exact(8).map(|pair| (word(pair), word(&pair[4..]) as usize)).collect();
    let mut total = 0u32;
    for &(at, length) in &vectors {
        if range(memory, at, length).is_none() {
            return Ok(Err(EFAULT));
        }
        match total.checked_add(length as u32) {
            Some(sum) => total = sum,
            None => return Ok(Err(EINVAL)), // they overlap, many times over
        }
    }
    Ok(Ok((vectors, total)))
}

fn fd_read(mut caller: Call, fd: u32, list: u32, count: u32, out: u32) -> Answer {
    if fd != 0 {
        return Ok(EBADF);
    }
    let (vectors, room) = match vectors(&mut caller, list, count)? {
        Ok(both) => both,
        Err(errno) => return Ok(errno),
    };
    let left = caller.data().stdin.len() - caller.data().stdin_at;
    if left == 0 && room != 0 && caller.data().stream == Stream::Open {
        return read_stream(caller, &vectors, out);
    }
    let total = (room as usize).min(left);
    pay(&mut caller, total as u64 / 64 * COPY_FUEL)?;
    let Some((memory, host)) = split(&mut caller) else { return Ok(EFAULT) };
    for (at, length) in vectors {
        let some = length.min(host.stdin.len() - host.stdin_at);
        let Some(place) = range(memory, at, some) else { return Ok(EFAULT) };
        place.copy_from_slice(&host.stdin[host.stdin_at..host.stdin_at + some]);
        host.stdin_at += some;
    }
    Ok(write(&mut caller, out, &(total as u32).to_le_bytes()))
}

/// As much as has come, and into one buffer: more is for the next call.
fn read_stream(mut caller: Call, vectors: &[(u32, usize)], out: u32) -> Answer {
    let Some(&(at, length)) = vectors.iter().find(|(_, length)| *length != 0) else { return Ok(EFAULT) };
    pay(&mut caller, STREAM_FUEL)?;
    let Some((memory, host)) = split(&mut caller) else { return Ok(EFAULT) };
    let Some(place) = range(memory, at, length) else { return Ok(EFAULT) };
    let got = host.read_stream(place)?;
    pay(&mut caller, got as u64 / 64 * COPY_FUEL)?;
    Ok(write(&mut caller, out, &(got as u32).to_le_bytes()))
}

fn fd_write(mut caller: Call, fd: u32, list: u32, count: u32, out: u32) -> Answer {
    if fd != 1 && fd != 2 {
        return Ok(EBADF);
    }
    let (vectors, total) = match vectors(&mut caller, list, count)? {
        Ok(both) => both,
        Err(errno) => return Ok(errno),
    };
    pay(&mut caller, u64::from(total) / 64 * COPY_FUEL)?;
    if fd == 1 && caller.data().stream != Stream::No {
        pay(&mut caller, vectors.len() as u64 * STREAM_FUEL)?;
    }
    let Some((memory, host)) = split(&mut caller) else { return Ok(EFAULT) };
    for (at, length) in vectors {
        let Some(data) = range(memory, at, length) else { return Ok(EFAULT) };
        if fd == 1 {
            host.write_stdout(data)?;
        } else {
            host.write_stderr(data);
        }
    }
    Ok(write(&mut caller, out, &total.to_le_bytes()))
}

fn random_get(mut caller: Call, at: u32, length: u32) -> Answer {
    let length = length as usize;
    if split(&mut caller).and_then(|(memory, _)| range(memory, at, length)).is_none() {
        return Ok(EFAULT);
    }
    for done in (0..length).step_by(RANDOM_PIECE) {
        let some = RANDOM_PIECE.min(length - done);
        pay(&mut caller, some.div_ceil(8) as u64 * RANDOM_FUEL)?;
        let Some((memory, _)) = split(&mut caller) else { return Ok(EFAULT) };
        let Some(place) = range(memory, at + done as u32, some) else { return Ok(EFAULT) };
        unsafe { tm_random(place.as_mut_ptr(), some) };
    }
    Ok(SUCCESS)
}
