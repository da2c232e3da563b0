//! The thread that works on a device's queue.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vmm_sys_util::eventfd::EventFd;

use super::interrupt::Interrupt;
use super::{DriverError, Processed, VirtioDevice};
use crate::memory::GuestRam;

/// How long a pause waits for the request in flight.
const IDLE_LIMIT: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// A device, its thread, and what the thread shares with the vCPUs. Dropping it ends the thread after the request in flight.
pub(super) struct QueueWorker<D: VirtioDevice> {
    shared: Arc<Shared<D>>,
    thread: Option<JoinHandle<()>>,
}

/// A queue that the driver set up.
pub(super) struct ActiveQueue {
    pub(super) queue: Queue,
    /// The negotiated features.
    pub(super) features: u64,
}

struct Shared<D: VirtioDevice> {
    device: D,
    ram: GuestRam,
    interrupt: Interrupt,
    /// QueueNotify, and everything else that the thread should look for.
    kick: EventFd,
    /// Asks the thread to stop after the request in flight.
    stop: AtomicBool,
    state: Mutex<State<D::Backend>>,
    /// Signalled when the thread has put the queue back.
    idle: Condvar,
}

/// Why the thread stopped working.
enum Stopped {
    /// There is nothing to do, or it was asked to.
    Idle,
    /// A request cannot be done now.
    Held,
}

/// The thread takes queue and backend out for as long as it works, so that no lock is held then.
struct State<B> {
    queue: Option<ActiveQueue>,
    /// Nothing while paused, or held up by a request that cannot be done.
    backend: Option<B>,
    busy: bool,
    quit: bool,
}

impl<D: VirtioDevice> QueueWorker<D> {
    /// Starts the thread, paused and without a queue.
    pub(super) fn start(device: D, ram: GuestRam) -> io::Result<Self> {
        let shared = Arc::new(Shared {
            interrupt: Interrupt::new()?,
            kick: EventFd::new(0)?,
            stop: AtomicBool::new(false),
            state: Mutex::new(State { queue: None, backend: None, busy: false, quit: false }),
            idle: Condvar::new(),
            device,
            ram,
        });
        let worker = shared.clone();
        let thread = std::thread::Builder::new().name(shared.device.id().to_owned()).spawn(move || worker.run())?;
        Ok(QueueWorker { shared, thread: Some(thread) })
    }

    pub(super) fn device(&self) -> &D {
        &self.shared.device
    }

    pub(super) fn ram(&self) -> &GuestRam {
        &self.shared.ram
    }

    pub(super) fn interrupt(&self) -> &Interrupt {
        &self.shared.interrupt
    }

    /// The event to connect to QueueNotify (ioeventfd).
    pub(super) fn kick_event(&self) -> &EventFd {
        &self.shared.kick
    }

    /// Makes the thread look at the queue.
    pub(super) fn kick(&self) {
        self.shared.kick();
    }

    /// Waits for the request in flight and takes the backend away. An error if it takes too long: it may wait for a page that is lost.
    pub(super) fn pause(&self) -> Result<(), String> {
        self.shared.when_idle_within(IDLE_LIMIT, |state| state.backend = None)
    }

    /// Opens the backend and lets the thread look at the queue once. A thread that a pause gave up waiting for works on with what it has.
    pub(super) fn resume(&self) -> Result<(), String> {
        let backend = self.shared.device.open_backend()?;
        let mut state = self.shared.lock();
        if !state.busy {
            state.backend = Some(backend);
        }
        self.shared.kick();
        Ok(())
    }

    /// Gives the thread another queue, or none, when the request in flight is done.
    pub(super) fn set_queue(&self, queue: Option<ActiveQueue>) {
        self.shared.when_idle(|state| state.queue = queue);
    }

    /// `next_avail` and `next_used` of the queue if there is one. Meaningful while paused.
    pub(super) fn queue_indices(&self) -> Option<(u16, u16)> {
        self.shared.when_idle(|state| state.queue.as_ref().map(|active| (active.queue.next_avail(), active.queue.next_used())))
    }
}

impl<D: VirtioDevice> Drop for QueueWorker<D> {
    fn drop(&mut self) {
        self.shared.when_idle(|state| {
            state.quit = true;
            state.queue = None;
        });
        if let Some(thread) = self.thread.take() {
            // The thread's panic, if any, was reported when it happened.
            let _ = thread.join();
        }
    }
}

impl<D: VirtioDevice> Shared<D> {
    fn lock(&self) -> MutexGuard<'_, State<D::Backend>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kick(&self) {
        // Fails only when the counter is full, and then the event is pending anyway.
        let _ = self.kick.write(1);
    }

    /// Stops the thread after the request in flight, changes the state, and lets the thread look at it.
    fn when_idle<R>(&self, change: impl FnOnce(&mut State<D::Backend>) -> R) -> R {
        let mut state = self.lock();
        while state.busy {
            self.stop.store(true, Ordering::Relaxed);
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        self.stop.store(false, Ordering::Relaxed);
        let result = change(&mut state);
        self.kick();
        result
    }

    /// Like [`Shared::when_idle`], but gives up after `limit`, with nothing changed.
    fn when_idle_within<R>(&self, limit: Duration, change: impl FnOnce(&mut State<D::Backend>) -> R) -> Result<R, String> {
        let state = self.lock();
        if state.busy {
            self.stop.store(true, Ordering::Relaxed);
        }
        let (mut state, waited) = self.idle.wait_timeout_while(state, limit, |state| state.busy).unwrap_or_else(PoisonError::into_inner);
        self.stop.store(false, Ordering::Relaxed);
        if waited.timed_out() {
            // The request may have ended after all, and the thread have stopped because it was asked to.
            self.kick();
            return Err(format!("a request has not ended for {} s", limit.as_secs()));
        }
        let result = change(&mut state);
        self.kick();
        Ok(result)
    }

    fn run(&self) {
        loop {
            match self.kick.read() {
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(_) => return self.interrupt.set_needs_reset(),
            }
            let mut state = self.lock();
            if state.quit {
                return;
            }
            let (mut queue, mut backend) = (state.queue.take(), state.backend.take());
            if let (Some(active), Some(opened)) = (&mut queue, &mut backend) {
                state.busy = true;
                drop(state);
                match self.process(active, opened) {
                    Ok(Stopped::Idle) => {}
                    Ok(Stopped::Held) => backend = None,
                    Err(_) => {
                        self.interrupt.set_needs_reset();
                        queue = None;
                    }
                }
                state = self.lock();
            }
            (state.queue, state.backend, state.busy) = (queue, backend, false);
            self.idle.notify_all();
        }
    }

    /// Works until the queue is empty, the thread is asked to stop, or a request cannot be done.
    fn process(&self, active: &mut ActiveQueue, backend: &D::Backend) -> Result<Stopped, DriverError> {
        let (queue, memory) = (&mut active.queue, self.ram.memory());
        loop {
            queue.disable_notification(memory)?;
            // What is available now is one batch with one notification at its end: a driver that keeps adding does not put it off.
            let available = queue.avail_idx(memory, Ordering::Acquire)?.0.wrapping_sub(queue.next_avail());
            let (mut used, mut held) = (false, false);
            for _ in 0..available {
                if self.stop.load(Ordering::Relaxed) {
                    break;
                }
                let next_avail = queue.next_avail();
                let Some(chain) = queue.iter(memory)?.next() else { break };
                let head = chain.head_index();
                match self.device.process(backend, active.features, memory, chain)? {
                    Processed::Done(written) => queue.add_used(memory, head, written)?,
                    Processed::Held => {
                        // As if it had not been looked at: it is saved with the queue and done again here or at another host.
                        queue.set_next_avail(next_avail);
                        held = true;
                        break;
                    }
                }
                used = true;
            }
            if used && queue.needs_notification(memory)? {
                self.interrupt.used_buffer();
            }
            if held {
                return Ok(Stopped::Held);
            }
            // Whoever stops the thread kicks it afterwards.
            if self.stop.load(Ordering::Relaxed) || !queue.enable_notification(memory)? {
                return Ok(Stopped::Idle);
            }
        }
    }
}
