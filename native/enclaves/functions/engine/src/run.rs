// SPDX-License-Identifier: Apache-2.0
//! One invocation: a fresh instance, limits, and how it ended.
use alloc::{boxed::Box, format, vec::Vec};
use core::ffi::c_void;
use wasmi::{
    errors::{ErrorKind, InstantiationError, MemoryError, TableError},
    Error, Memory, ResourceLimiter, Store, TrapCode, TypedResumableCall,
};
use wasmi_core::LimiterError;

use crate::{bytes, Prepared, Text, STACK_CALLS};

/// Fuel that is burnt between two looks at the clock: some tenths of a millisecond, or some hundred where calls of
/// functions with very many locals, which are zeroed for next to no fuel, are all that is done.
const SLICE: u64 = 100_000;
/// The one slice of a start function, which commands do not have: it cannot be gone on with.
const START_SLICE: u64 = 4_000_000;
/// Elements of all tables, and how many things an instance may consist of.
const TABLE_ELEMENTS: usize = 65_536;
const TABLES: usize = 16;
/// What is kept of stderr: the end of it.
pub const LOG_BYTES: usize = 16_384;

/// enum fn_outcome of ../engine.h.
#[repr(u32)]
#[derive(Clone, Copy, PartialEq)]
pub enum Outcome {
    Done = 0,
    Exited = 1,
    Trapped = 2,
    Limit = 3,
    Unstartable = 4,
}

/// enum fn_limit of ../functions.h.
#[repr(u32)]
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Limit {
    None = 0,
    Memory = 1,
    Fuel = 2,
    Time = 3,
    Output = 4,
    Stack = 5,
    Stream = 7,
}

/// struct engine_run of ../engine.h.
#[repr(C)]
pub struct Run {
    args: *const u8,
    args_length: usize,
    env: *const u8,
    env_length: usize,
    stdin: *const u8,
    stdin_length: usize,
    memory: u64,
    fuel: u64,
    time: u64,
    output: u64,
    stream: u64,
    outcome: Outcome,
    limit: Limit,
    exit_code: i32,
    text: Text,
    fuel_used: u64,
    stdout: *const u8,
    stdout_length: usize,
    stderr: *const u8,
    stderr_length: usize,
    stderr_dropped: u64,
    state: *mut c_void,
}

extern "C" {
    fn tm_time() -> u64;
    fn fn_stream_read(to: *mut u8, room: usize, got: *mut usize) -> i32;
    fn fn_stream_write(data: *const u8, length: usize) -> i32;
}

/// What leads to the caller while the function runs.
#[derive(Clone, Copy, PartialEq)]
pub enum Stream {
    No,
    Open,
    /// Nothing more comes from there.
    Ended,
}

pub struct Host {
    pub args: &'static [u8],
    pub env: &'static [u8],
    pub stdin: &'static [u8],
    pub stdin_at: usize,
    pub stdout: Vec<u8>,
    pub stderr: Vec<u8>,
    pub stderr_dropped: u64,
    pub memory: Option<Memory>,
    pub stream: Stream,
    /// Bytes of stdout that were streamed.
    streamed: usize,
    /// Fuel that host functions have burnt and the store did not have; what there is for that; and until when.
    owed: u64,
    spare: u64,
    ends: u64,
    output: usize,
    limiter: Limiter,
}

struct Limiter {
    bytes: usize,
    elements: usize,
    /// Elements that a table may have, and does not have yet.
    growing: usize,
    denied: bool,
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> Result<bool, LimiterError> {
        let fits = desired <= self.bytes;
        self.denied |= !fits;
        Ok(fits)
    }

    fn table_growing(&mut self, current: usize, desired: usize, _: Option<usize>) -> Result<bool, LimiterError> {
        let more = desired.saturating_sub(current);
        let fits = more <= self.elements;
        if fits {
            self.elements -= more;
            self.growing = more;
        }
        self.denied |= !fits;
        Ok(fits)
    }

    // Out of fuel: of its slice, and it is tried again with the next.
    fn memory_grow_failed(&mut self, error: &LimiterError) {
        self.denied |= !matches!(error, LimiterError::OutOfFuel { .. });
    }

    fn table_grow_failed(&mut self, error: &LimiterError) {
        self.elements += core::mem::take(&mut self.growing);
        self.denied |= !matches!(error, LimiterError::OutOfFuel { .. });
    }

    fn instances(&self) -> usize {
        1
    }

    fn tables(&self) -> usize {
        TABLES
    }

    fn memories(&self) -> usize {
        1
    }
}

/// What a host function ends the run with, beside an exit status: a limit that it has met.
#[derive(Debug)]
struct Met(Limit);

impl core::fmt::Display for Met {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "a limit was met: {:?}", self.0)
    }
}

impl wasmi::errors::HostError for Met {}

impl Host {
    /// For looking at types only.
    pub fn nobody() -> Self {
        Host {
            args: &[],
            env: &[],
            stdin: &[],
            stdin_at: 0,
            stdout: Vec::new(),
            stderr: Vec::new(),
            stderr_dropped: 0,
            memory: None,
            stream: Stream::No,
            streamed: 0,
            owed: 0,
            spare: 0,
            ends: 0,
            output: 0,
            limiter: Limiter { bytes: 0, elements: 0, growing: 0, denied: false },
        }
    }

    /// Have some of what the caller sends, none at its end, into `place`; or end, with a limit.
    pub fn read_stream(&mut self, place: &mut [u8]) -> Result<usize, Error> {
        let mut got = 0;
        if unsafe { fn_stream_read(place.as_mut_ptr(), place.len(), &mut got) } != 0 {
            return Err(Error::host(Met(Limit::Stream)));
        }
        if got == 0 {
            self.stream = Stream::Ended;
        }
        self.in_time()?;
        Ok(got)
    }

    fn write_stream(&mut self, data: &[u8]) -> Result<(), Error> {
        if data.len() > self.output - self.streamed {
            return Err(Error::host(Met(Limit::Output)));
        }
        self.streamed += data.len();
        if unsafe { fn_stream_write(data.as_ptr(), data.len()) } != 0 {
            return Err(Error::host(Met(Limit::Stream)));
        }
        self.in_time()
    }

    /// The caller may have kept us waiting.
    fn in_time(&self) -> Result<(), Error> {
        if unsafe { tm_time() } >= self.ends {
            return Err(Error::host(Met(Limit::Time)));
        }
        Ok(())
    }

    pub fn write_stdout(&mut self, data: &[u8]) -> Result<(), Error> {
        if self.stream != Stream::No {
            return self.write_stream(data);
        }
        if data.len() > self.output - self.stdout.len() {
            return Err(Error::host(Met(Limit::Output)));
        }
        let needed = self.stdout.len() + data.len();
        if needed > self.stdout.capacity() {
            // Twice as much, but no more than it may become.
            let room = needed.max(2 * self.stdout.capacity()).min(self.output);
            self.stdout.reserve_exact(room - self.stdout.len());
        }
        self.stdout.extend_from_slice(data);
        Ok(())
    }

    /// Owe fuel that the store's slice does not have.  Who needs more than a slice has looks at the clock, too.
    pub fn owe(&mut self, fuel: u64) -> Result<(), Error> {
        self.owed = self.owed.saturating_add(fuel);
        if self.owed > self.spare {
            return Err(Error::host(Met(Limit::Fuel)));
        }
        self.in_time()
    }

    pub fn write_stderr(&mut self, data: &[u8]) {
        let data = match data.len().checked_sub(LOG_BYTES) {
            Some(over) => {
                self.stderr_dropped += over as u64;
                &data[over..]
            }
            None => data,
        };
        self.stderr.extend_from_slice(data);
        if self.stderr.len() > 2 * LOG_BYTES {
            self.trim_stderr();
        }
    }

    fn trim_stderr(&mut self) {
        let over = self.stderr.len().saturating_sub(LOG_BYTES);
        self.stderr.drain(..over);
        self.stderr_dropped += over as u64;
    }
}

/// Run `_start` of `prepared` in a fresh instance; `run` says with what, and then how it ended.  What it points to
/// then is there until `engine_finish`.
///
/// # Safety
/// The pointers are what C says they are, and what they point to stays until `engine_finish`.
#[no_mangle]
pub unsafe extern "C" fn engine_run(prepared: *mut c_void, run: *mut Run) {
    let prepared = &*prepared.cast::<Prepared>();
    let run = &mut *run;
    let mut store = Store::new(
        &prepared.engine,
        Host {
            args: bytes(run.args, run.args_length),
            env: bytes(run.env, run.env_length),
            stdin: bytes(run.stdin, run.stdin_length),
            output: run.output as usize,
            stream: if run.stream == 0 { Stream::No } else { Stream::Open },
            limiter: Limiter { bytes: run.memory as usize, elements: TABLE_ELEMENTS, growing: 0, denied: false },
            ..Host::nobody()
        },
    );
    store.limiter(|host| &mut host.limiter);
    let mut tank = Tank { left: run.fuel, slice: 0, started: unsafe { tm_time() }, time: run.time };
    let result = start(prepared, &mut store, &mut tank);
    tank.empty(&mut store);
    run.fuel_used = run.fuel - tank.left;
    ended(run, result, &store);
    store.data_mut().trim_stderr();
    let state = Box::new(store);
    let host = state.data();
    run.stdout = host.stdout.as_ptr();
    run.stdout_length = host.stdout.len();
    run.stderr = host.stderr.as_ptr();
    run.stderr_length = host.stderr.len();
    run.stderr_dropped = host.stderr_dropped;
    run.state = Box::into_raw(state).cast();
}

/// # Safety
/// `state` is what `engine_run` has left.
#[no_mangle]
pub unsafe extern "C" fn engine_finish(state: *mut c_void) {
    drop(Box::from_raw(state.cast::<Store<Host>>()));
}

/// The fuel of an invocation, of which the store gets a slice at a time.
struct Tank {
    left: u64,
    slice: u64,
    /// When, by the clock; 0: nobody had told the time yet, and it counts from when somebody does.
    started: u64,
    time: u64,
}

impl Tank {
    /// Take back what the store has left of its slice.
    fn empty(&mut self, store: &mut Store<Host>) {
        let unused = store.get_fuel().unwrap_or(0);
        let owed = core::mem::take(&mut store.data_mut().owed);
        self.left = self.left.saturating_sub(self.slice - unused.min(self.slice)).saturating_sub(owed);
        self.slice = 0;
    }

    /// Another slice, of `needed` at least.
    fn fill(&mut self, store: &mut Store<Host>, needed: u64) -> Result<(), Limit> {
        self.empty(store);
        if needed > self.left || self.left == 0 {
            return Err(Limit::Fuel);
        }
        let now = unsafe { tm_time() };
        if self.started == 0 {
            self.started = now;
        }
        if now - self.started >= self.time {
            return Err(Limit::Time);
        }
        self.slice = self.left.min(SLICE.max(needed));
        let host = store.data_mut();
        host.spare = self.left - self.slice;
        host.ends = if self.started == 0 { u64::MAX } else { self.started.saturating_add(self.time) };
        store.set_fuel(self.slice).map_err(|_| Limit::Fuel)
    }
}

enum Ended {
    Limit(Limit),
    Unstartable(Error),
    Error(Error),
}

impl From<Error> for Ended {
    fn from(error: Error) -> Self {
        Ended::Error(error)
    }
}

impl From<Limit> for Ended {
    fn from(limit: Limit) -> Self {
        Ended::Limit(limit)
    }
}

fn start(prepared: &Prepared, store: &mut Store<Host>, tank: &mut Tank) -> Result<(), Ended> {
    tank.fill(store, tank.left.min(START_SLICE))?;
    let instance = prepared.linker.instantiate_and_start(&mut *store, &prepared.module).map_err(Ended::Unstartable)?;
    let memory = instance.get_memory(&*store, "memory");
    store.data_mut().memory = memory;
    let function = instance.get_typed_func::<(), ()>(&*store, "_start")?;
    tank.fill(store, 0)?;
    let mut call = function.call_resumable(&mut *store, ())?;
    loop {
        call = match call {
            TypedResumableCall::Finished(()) => return Ok(()),
            // What a host function ends it with is one of two.
            TypedResumableCall::HostTrap(trap) => {
                let error = trap.host_error();
                return Err(match error.i32_exit_status() {
                    Some(status) => Error::i32_exit(status).into(),
                    None => error.downcast_ref().map_or(Limit::Fuel, |&Met(limit)| limit).into(),
                });
            }
            TypedResumableCall::OutOfFuel(more) => {
                tank.fill(store, more.required_fuel())?;
                more.resume(&mut *store)?
            }
        }
    }
}

fn ended(run: &mut Run, result: Result<(), Ended>, store: &Store<Host>) {
    let denied = store.data().limiter.denied;
    run.exit_code = 0;
    run.limit = Limit::None;
    run.text.put("");
    let (outcome, limit) = match result {
        Ok(()) => (Outcome::Done, Limit::None),
        Err(Ended::Limit(limit)) => (Outcome::Limit, limit),
        Err(Ended::Error(error)) => cause(run, &error, false),
        Err(Ended::Unstartable(error)) => cause(run, &error, true),
    };
    run.outcome = outcome;
    run.limit = limit;
    // A program that was refused memory and then gave up failed for want of it.
    if denied && (outcome == Outcome::Trapped || outcome == Outcome::Exited || outcome == Outcome::Unstartable) {
        run.outcome = Outcome::Limit;
        run.limit = Limit::Memory;
    }
}

fn cause(run: &mut Run, error: &Error, starting: bool) -> (Outcome, Limit) {
    if let Some(status) = error.i32_exit_status() {
        run.exit_code = status;
        return (if status == 0 { Outcome::Done } else { Outcome::Exited }, Limit::None);
    }
    if let Some(&Met(limit)) = error.downcast_ref() {
        return (Outcome::Limit, limit);
    }
    match error.as_trap_code() {
        Some(TrapCode::OutOfFuel) => return (Outcome::Limit, Limit::Fuel),
        Some(TrapCode::StackOverflow) => {
            run.text.put(&format!("calls are nested deeper than {STACK_CALLS}, or need more than 1 MiB of stack"));
            return (Outcome::Limit, Limit::Stack);
        }
        Some(TrapCode::GrowthOperationLimited) => return (Outcome::Limit, Limit::Memory),
        _ => (),
    }
    let limit = match error.kind() {
        ErrorKind::Memory(memory) | ErrorKind::Instantiation(InstantiationError::FailedToInstantiateMemory(memory)) => {
            match memory {
                MemoryError::ResourceLimiterDeniedAllocation
                | MemoryError::OutOfSystemMemory
                | MemoryError::OutOfBoundsGrowth => Some(Limit::Memory),
                MemoryError::OutOfFuel { .. } => Some(Limit::Fuel),
                _ => None,
            }
        }
        ErrorKind::Table(table) => match table {
            TableError::ResourceLimiterDeniedAllocation | TableError::OutOfSystemMemory => Some(Limit::Memory),
            TableError::OutOfFuel { .. } => Some(Limit::Fuel),
            _ => None,
        },
        ErrorKind::Fuel(_) | ErrorKind::ResumableOutOfFuel(_) => Some(Limit::Fuel),
        _ => None,
    };
    if let Some(limit) = limit {
        return (Outcome::Limit, limit);
    }
    run.text.put(&format!("{error}"));
    (if starting && error.as_trap_code().is_none() { Outcome::Unstartable } else { Outcome::Trapped }, Limit::None)
}
