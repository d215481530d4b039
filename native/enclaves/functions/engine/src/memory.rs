// SPDX-License-Identifier: Apache-2.0
//! Memory is the slot's arena; what cannot go on leaves to C.
use core::{
    alloc::{GlobalAlloc, Layout},
    fmt::{self, Write},
    panic::PanicInfo,
};

extern "C" {
    fn fn_alloc(size: usize, zeroed: bool) -> *mut u8;
    fn fn_realloc(old: *mut u8, old_size: usize, size: usize) -> *mut u8;
    fn fn_free(memory: *mut u8, size: usize);
    fn fn_escape(text: *const u8, length: usize) -> !;
}

struct Arena;

/// The arena aligns to this; nothing that wasmi allocates wants more, and what did would not be had.
const ALIGNMENT: usize = 16;

unsafe impl GlobalAlloc for Arena {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.align() > ALIGNMENT {
            return core::ptr::null_mut();
        }
        fn_alloc(layout.size(), false)
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.align() > ALIGNMENT {
            return core::ptr::null_mut();
        }
        fn_alloc(layout.size(), true)
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        fn_free(memory, layout.size());
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        fn_realloc(memory, layout.size(), size)
    }
}

#[global_allocator]
static ARENA: Arena = Arena;

/// Last words, as many as C keeps: on the stack, since it may be memory that has run out.
struct Words {
    bytes: [u8; 240],
    length: usize,
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let some = text.len().min(self.bytes.len() - self.length);
        self.bytes[self.length..self.length + some].copy_from_slice(&text.as_bytes()[..some]);
        self.length += some;
        Ok(())
    }
}

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    let mut words = Words { bytes: [0; 240], length: 0 };
    let _ = write!(words, "{}", info.message());
    unsafe { fn_escape(words.bytes.as_ptr(), words.length) }
}

// What core and alloc, as they come compiled, name for unwinding.  Nothing unwinds.
#[no_mangle]
extern "C" fn rust_eh_personality() {}
#[no_mangle]
extern "C" fn _Unwind_Resume() -> ! {
    unsafe { fn_escape(core::ptr::null(), 0) }
}
