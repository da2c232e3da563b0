//! Getting a vCPU thread out of KVM_RUN, without losing a kick that comes just before it goes in.
//!
//! The signal handler runs on the vCPU's own thread and sets `immediate_exit` in its `kvm_run`. If the signal comes while the guest runs,
//! KVM_RUN returns EINTR. If it comes between the thread's look at its commands and KVM_RUN, then KVM_RUN finds the flag set and returns
//! EINTR as well (KVM API, "immediate_exit"). The thread clears the flag before it looks at its commands, never after.

use std::cell::Cell;
use std::thread::JoinHandle;

use kvm_bindings::kvm_run;
use kvm_ioctls::VcpuFd;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler, unblock_signal};

thread_local! {
    /// The `kvm_run` of the vCPU this thread runs. Has no destructor, so the handler may read it at any time.
    static KVM_RUN: Cell<*mut kvm_run> = const { Cell::new(std::ptr::null_mut()) };
}

extern "C" fn exit_kvm_run(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let run = KVM_RUN.get();
    if !run.is_null() {
        // SAFETY: `Kickable` keeps the pointer valid for as long as it is set, and the handler runs on the thread that owns the mapping.
        unsafe { (&raw mut (*run).immediate_exit).write_volatile(1) };
    }
}

/// Proof that the current thread can be kicked out of KVM_RUN. Ends with the borrow of the vCPU.
pub struct Kickable(());

impl Kickable {
    /// Lets the calling thread, which is about to run `vcpu`, be kicked until the value is dropped. `vcpu` must outlive it on this thread.
    pub fn new(vcpu: &mut VcpuFd) -> std::io::Result<Self> {
        let signal = SIGRTMIN();
        register_signal_handler(signal, exit_kvm_run).map_err(std::io::Error::from)?;
        KVM_RUN.set(vcpu.get_kvm_run());
        unblock_signal(signal).map_err(|error| std::io::Error::other(error.to_string()))?;
        Ok(Kickable(()))
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        KVM_RUN.set(std::ptr::null_mut());
    }
}

/// Makes the vCPU thread `thread` leave KVM_RUN, or not enter it. Whatever it is to see then must be visible before the call.
pub fn kick<T>(thread: &JoinHandle<T>) {
    // Fails only for a thread that has ended.
    let _ = thread.kill(SIGRTMIN());
}
