//! The ways in which the agent is asked to end: the power button and SIGTERM.

use std::fs::{self, File};
use std::io::Read;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{channel, Receiver, Sender};
use std::thread;

/// Set once: every worker finishes its last check and ends.
pub static STOPPING: AtomicBool = AtomicBool::new(false);

/// Whether the workers are to end.
pub fn stopping() -> bool {
    STOPPING.load(Ordering::Relaxed)
}

/// `struct input_event` on 64-bit machines: two words of time, then type, code and value
/// (Linux, include/uapi/linux/input.h).
const INPUT_EVENT_SIZE: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Starts listening. Gives the requests, as the reason to report, and whether there is any input
/// device that could be a power button. To be called before other threads start.
pub fn listen() -> (Receiver<&'static str>, bool) {
    let (sender, receiver) = channel();
    listen_for_sigterm(sender.clone());
    let mut power_button = false;
    let entries = fs::read_dir("/dev/input").into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_name().to_string_lossy().starts_with("event")) {
        if let Ok(device) = File::open(entry.path()) {
            power_button = true;
            let sender = sender.clone();
            thread::spawn(move || wait_for_power_key(device, &sender));
        }
    }
    (receiver, power_button)
}

fn listen_for_sigterm(sender: Sender<&'static str>) {
    // SAFETY: sigset_t is filled in by sigemptyset before use, and all pointers are to live values.
    let set = unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&mut set);
        libc::sigaddset(&mut set, libc::SIGTERM);
        libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        set
    };
    thread::spawn(move || {
        let mut signal = 0;
        // SAFETY: both point to live values; the set's signals are blocked in every thread.
        while unsafe { libc::sigwait(&set, &mut signal) } == 0 {
            // Nobody listens any more only when the agent is ending anyway.
            let _ = sender.send("sigterm");
        }
    });
}

fn wait_for_power_key(mut device: File, sender: &Sender<&'static str>) {
    let mut event = [0_u8; INPUT_EVENT_SIZE];
    while device.read_exact(&mut event).is_ok() {
        let kind = u16::from_ne_bytes([event[16], event[17]]);
        let code = u16::from_ne_bytes([event[18], event[19]]);
        let value = i32::from_ne_bytes([event[20], event[21], event[22], event[23]]);
        if kind == EV_KEY && code == KEY_POWER && value == 1 {
            let _ = sender.send("power_button");
        }
    }
}
