// SPDX-License-Identifier: Apache-2.0
//! Memory is the slot's arena; what cannot go on leaves to C.
use alloc::format;
use core::{
    alloc::{GlobalAlloc, Layout},
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

#[panic_handler]
fn panic(info: &PanicInfo) -> ! {
    // Where memory has run out there is none for a text either: then C knows why.
    let text = match info.message().as_str() {
        Some(text) => text.into(),
        None => format!("{}", info.message()),
    };
    unsafe { fn_escape(text.as_ptr(), text.len()) }
}

// What core and alloc, as they come compiled, name for unwinding.  Nothing unwinds.
#[no_mangle]
extern "C" fn rust_eh_personality() {}
#[no_mangle]
extern "C" fn _Unwind_Resume() -> ! {
    unsafe { fn_escape(core::ptr::null(), 0) }
}
