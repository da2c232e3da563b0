//! A terminal in raw mode, restored on every way out.

use std::io::{IsTerminal, Result, stdin};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, OutputModes, Termios, tcgetattr, tcsetattr};

/// The terminal's mode before it was changed.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();
static RAW: AtomicBool = AtomicBool::new(false);

/// Signals that end the process unless somebody handles them. Whoever handles one of them from now on takes the duty over.
const FATAL: [libc::c_int; 5] = [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM, libc::SIGABRT];

/// Standard input in raw mode, until dropped.
#[derive(Debug)]
pub(super) struct RawTerminal(());

impl RawTerminal {
    /// Puts standard input into raw mode, if it is a terminal.
    pub fn enter() -> Result<Option<Self>> {
        if !stdin().is_terminal() {
            return Ok(None);
        }
        let mut raw = tcgetattr(stdin())?;
        ORIGINAL.get_or_init(|| raw.clone());
        raw.make_raw();
        // Our own messages end their lines with a line feed alone.
        raw.output_modes |= OutputModes::OPOST;
        RAW.store(true, Ordering::SeqCst);
        restore_on_exit_and_signals();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        Ok(Some(RawTerminal(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Restores the terminal, if it is in raw mode. For those who end the process without unwinding; safe in a signal handler.
pub fn restore() {
    if RAW.swap(false, Ordering::SeqCst)
        && let Some(original) = ORIGINAL.get()
    {
        // Not std's handle, whose lock a signal handler must not touch.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, original);
    }
}

fn restore_on_exit_and_signals() {
    static ONCE: std::sync::Once = std::sync::Once::new();
    extern "C" fn at_exit() {
        restore();
    }
    extern "C" fn on_signal(signal: libc::c_int) {
        restore();
        // The handler was for one time (SA_RESETHAND): now the signal does what it does by default. It is delivered when this returns.
        // SAFETY: raise is safe in a signal handler.
        unsafe { libc::raise(signal) };
    }
    ONCE.call_once(|| {
        // SAFETY: both functions live as long as the process and do nothing that a signal handler or an exiting process must not do;
        // the structures are zeroed, which is valid for them, and owned by this frame.
        unsafe {
            libc::atexit(at_exit);
            for signal in FATAL {
                let mut current: libc::sigaction = std::mem::zeroed();
                if libc::sigaction(signal, std::ptr::null(), &mut current) != 0 || current.sa_sigaction != libc::SIG_DFL {
                    // Ignored, or somebody handles it already.
                    continue;
                }
                let mut action: libc::sigaction = std::mem::zeroed();
                let handler: extern "C" fn(libc::c_int) = on_signal;
                action.sa_sigaction = handler as usize;
                action.sa_flags = libc::SA_RESETHAND;
                libc::sigaction(signal, &action, std::ptr::null_mut());
            }
        }
    });
}

#[cfg(test)]
mod tests;
