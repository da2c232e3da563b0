//! Ctrl-C as a flag.

use std::sync::atomic::{AtomicBool, Ordering};

use vmm_sys_util::signal::register_signal_handler;

static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// From now on SIGINT does not end the process.
pub(super) fn catch() -> std::io::Result<()> {
    extern "C" fn handler(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
        INTERRUPTED.store(true, Ordering::Relaxed);
    }
    register_signal_handler(libc::SIGINT, handler).map_err(|error| std::io::Error::from_raw_os_error(error.errno()))
}

/// Whether SIGINT came since the last call.
pub(super) fn take() -> bool {
    INTERRUPTED.swap(false, Ordering::Relaxed)
}
