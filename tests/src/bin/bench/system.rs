//! `clock_gettime` and `getrandom` of this program, so that a simulation has virtual time and repeatable random numbers
//! (`weft_tests::bench::dht::virtual_time`). Outside a simulation they call the C library's.
//!
//! The linker prefers a program's own definition to a library's. The standard library documents that `getrandom` may be
//! replaced in this way, and madsim does the same with both. The definitions are in this program and not in a library,
//! so that no test gets them by linking.

// There is no other way to replace and find the C library's functions.
#![allow(unsafe_code)]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem::transmute,
    ptr,
    sync::atomic::{AtomicPtr, Ordering},
};

use weft_tests::bench::dht::virtual_time;

/// The numbers of the clocks on Linux.
const CLOCK_REALTIME: c_int = 0;
const CLOCK_MONOTONIC: c_int = 1;

/// `struct timespec` of 64-bit Linux.
#[repr(C)]
struct Timespec {
    seconds: i64,
    nanoseconds: i64,
}

type ClockGettime = unsafe extern "C" fn(c_int, *mut Timespec) -> c_int;
type Getrandom = unsafe extern "C" fn(*mut c_void, usize, c_uint) -> isize;

unsafe extern "C" {
    fn dlsym(handle: *mut c_void, name: *const c_char) -> *mut c_void;
}

/// Returns the next definition of a function after this program's, which is the C library's. Looked up once.
fn next(cache: &AtomicPtr<c_void>, name: &CStr) -> *mut c_void {
    /// `RTLD_NEXT`.
    const NEXT: *mut c_void = ptr::without_provenance_mut(usize::MAX);
    let mut found = cache.load(Ordering::Acquire);
    if found.is_null() {
        // SAFETY: the name ends with a zero byte, and glibc defines the handle.
        found = unsafe { dlsym(NEXT, name.as_ptr()) };
        assert!(!found.is_null(), "the C library has {name:?}");
        cache.store(found, Ordering::Release);
    }
    found
}

/// Returns the time of a clock; see clock_gettime(2).
///
/// # Safety
/// `time` points to a `struct timespec`.
#[unsafe(no_mangle)]
unsafe extern "C" fn clock_gettime(clock: c_int, time: *mut Timespec) -> c_int {
    static NEXT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    let now = match clock {
        CLOCK_REALTIME => virtual_time::since_1970(),
        CLOCK_MONOTONIC => virtual_time::monotonic(),
        _ => None,
    };
    if let Some(now) = now {
        let now = Timespec {
            seconds: now.as_secs() as i64,
            nanoseconds: i64::from(now.subsec_nanos()),
        };
        // SAFETY: the caller promises that `time` may be written.
        unsafe { time.write(now) };
        return 0;
    }
    // SAFETY: this is the type of the C library's function.
    unsafe {
        let next: ClockGettime = transmute(next(&NEXT, c"clock_gettime"));
        next(clock, time)
    }
}

/// Fills `buffer` with random bytes; see getrandom(2).
///
/// # Safety
/// `buffer` has `length` bytes.
#[unsafe(no_mangle)]
unsafe extern "C" fn getrandom(buffer: *mut c_void, length: usize, flags: c_uint) -> isize {
    static NEXT: AtomicPtr<c_void> = AtomicPtr::new(ptr::null_mut());
    if virtual_time::monotonic().is_some() {
        // SAFETY: the caller promises that these bytes may be written; zeros make them a slice of bytes.
        let bytes = unsafe {
            buffer.write_bytes(0, length);
            std::slice::from_raw_parts_mut(buffer.cast::<u8>(), length)
        };
        if virtual_time::random(bytes) {
            return length as isize;
        }
    }
    // SAFETY: this is the type of the C library's function.
    unsafe {
        let next: Getrandom = transmute(next(&NEXT, c"getrandom"));
        next(buffer, length, flags)
    }
}
