//! vCPU threads. Each owns its vCPU for good and does what it is told over a channel: run, pause, or a call on the parked vCPU.

use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, TryRecvError, bounded, unbounded};
use kvm_ioctls::VcpuFd;
use rustix::process::Pid;
use rustix::thread::gettid;

use super::VmError;
use super::events::{EventSink, VmEvent};
use super::exits::{Buses, Outcome, run_once};
use super::kick::{Kickable, kick};
use super::throttle::Throttle;
use crate::memory::dirty_tracker::Tracking;

/// How often a thread that is to end is kicked.
const KICK_INTERVAL: Duration = Duration::from_millis(1);

/// What a vCPU thread can be told. A closed channel tells it to end.
enum Command {
    /// Run the guest until told otherwise.
    Run(Arc<Buses>),
    /// Finish the access in flight, park, and answer.
    Pause(Sender<()>),
    /// Call a function on the parked vCPU.
    Call(Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// A vCPU's thread, created parked. Dropping it ends and joins the thread.
pub struct VcpuThread {
    index: u16,
    id: Pid,
    commands: Option<Sender<Command>>,
    thread: Option<JoinHandle<()>>,
}

/// An answer that a vCPU thread is still working on.
pub struct Pending<T> {
    index: u16,
    answer: Receiver<T>,
}

impl<T> Pending<T> {
    /// Waits for the answer.
    pub fn wait(self) -> Result<T, VmError> {
        self.answer.recv().map_err(|_| VmError::VcpuGone(self.index))
    }

    /// Waits for the answer until `deadline`.
    pub fn wait_until(self, deadline: Instant) -> Result<T, VmError> {
        self.answer.recv_deadline(deadline).map_err(|error| match error {
            RecvTimeoutError::Timeout => VmError::PauseTimeout(self.index),
            RecvTimeoutError::Disconnected => VmError::VcpuGone(self.index),
        })
    }
}

impl VcpuThread {
    /// Starts the thread of vCPU `index`, which will tell `events` how the guest ended, stands still when `throttle` says so, and keeps
    /// its dirty ring in `tracking` from staying full.
    pub fn spawn(index: u16, mut vcpu: VcpuFd, events: EventSink, throttle: Arc<Throttle>, tracking: Tracking) -> Result<Self, VmError> {
        let (commands, inbox) = unbounded();
        let (ready, started) = bounded(1);
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(move || match Kickable::new(&mut vcpu) {
            Ok(kickable) => {
                let _ = ready.send(Ok(gettid()));
                serve(index, &mut vcpu, &inbox, &events, &throttle, &tracking);
                drop(kickable);
            }
            Err(error) => {
                let _ = ready.send(Err(error));
            }
        });
        let failed = |source| VmError::VcpuThread { index, source };
        let thread = thread.map_err(failed)?;
        let id = started.recv().map_err(|_| VmError::VcpuGone(index))?.map_err(failed)?;
        Ok(VcpuThread { index, id, commands: Some(commands), thread: Some(thread) })
    }

    /// The kernel's id of the thread.
    pub fn id(&self) -> Pid {
        self.id
    }

    /// Lets the vCPU run, with devices on `buses`.
    pub fn run(&self, buses: &Arc<Buses>) -> Result<(), VmError> {
        self.tell(Command::Run(buses.clone()))
    }

    /// Parks the vCPU. When the answer comes, no access of its is in flight.
    pub fn pause(&self) -> Result<Pending<()>, VmError> {
        let (sender, answer) = bounded(1);
        self.tell(Command::Pause(sender))?;
        Ok(Pending { index: self.index, answer })
    }

    /// Calls `function` on the parked vCPU, on its own thread, so that all vCPUs can be saved or restored at the same time.
    pub fn call<T: Send + 'static>(&self, function: impl FnOnce(&mut VcpuFd) -> T + Send + 'static) -> Result<Pending<T>, VmError> {
        let (sender, answer) = bounded(1);
        self.tell(Command::Call(Box::new(move |vcpu| {
            let _ = sender.send(function(vcpu));
        })))?;
        Ok(Pending { index: self.index, answer })
    }

    fn tell(&self, command: Command) -> Result<(), VmError> {
        let gone = || VmError::VcpuGone(self.index);
        self.commands.as_ref().ok_or_else(gone)?.send(command).map_err(|_| gone())?;
        // After the send: the thread looks at its commands once it has been kicked.
        self.kick();
        Ok(())
    }

    /// Makes the vCPU leave the guest and look at what it is to do.
    pub fn kick(&self) {
        if let Some(thread) = &self.thread {
            kick(thread);
        }
    }

    /// Tells the thread to end without waiting for it, so that all threads of a machine end at the same time.
    pub fn dismiss(&mut self) {
        self.commands = None;
        self.kick();
    }
}

impl Drop for VcpuThread {
    fn drop(&mut self) {
        self.dismiss();
        // A kick that comes just before the thread blocks, in a write to the console for example, is lost: unlike KVM_RUN, other calls do
        // not look for it.
        while self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) {
            self.kick();
            std::thread::park_timeout(KICK_INTERVAL);
        }
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

/// The thread's life: parked until told to run, running until told to pause.
fn serve(index: u16, vcpu: &mut VcpuFd, inbox: &Receiver<Command>, events: &EventSink, throttle: &Throttle, tracking: &Tracking) {
    let mut running: Option<Arc<Buses>> = None;
    let mut stuck = false;
    loop {
        // A running vCPU only looks, unless it is to stand still for a while; a parked one waits.
        let command = match &running {
            Some(_) => look(vcpu, inbox, throttle.wait()),
            None => inbox.recv().map_err(|_| TryRecvError::Disconnected),
        };
        match command {
            Ok(Command::Run(_)) if stuck => {}
            Ok(Command::Run(buses)) => {
                // Tells a guest that uses kvmclock that it stood still, so that its watchdogs do not take the pause for a hang. Refused
                // (EINVAL) if the guest does not use kvmclock, or not yet. It is written into guest RAM at the next entry: by the side that runs it.
                let _ = vcpu.kvmclock_ctrl();
                running = Some(buses);
            }
            Ok(Command::Pause(answer)) => {
                if let Some(buses) = running.take() {
                    match finish_access(vcpu, &buses, tracking) {
                        Outcome::Handled | Outcome::Interrupted => {}
                        Outcome::Ended(event) => events.send(event),
                        Outcome::Stuck(reason) => {
                            stuck = true;
                            events.send(VmEvent::Crashed { vcpu: index, reason });
                        }
                    }
                }
                let _ = answer.send(());
            }
            Ok(Command::Call(function)) => function(vcpu),
            Err(TryRecvError::Disconnected) => return,
            Err(TryRecvError::Empty) => {
                let Some(buses) = &running else { continue };
                match run_once(vcpu, buses, tracking) {
                    Outcome::Handled => {}
                    // Before the next look at the commands, so that a kick from here on is kept.
                    Outcome::Interrupted => vcpu.set_kvm_immediate_exit(0),
                    Outcome::Ended(event) => events.send(event),
                    Outcome::Stuck(reason) => {
                        stuck = true;
                        running = None;
                        events.send(VmEvent::Crashed { vcpu: index, reason });
                    }
                }
            }
        }
    }
}

/// The next command, if one comes within `wait`.
fn look(vcpu: &mut VcpuFd, inbox: &Receiver<Command>, wait: Duration) -> Result<Command, TryRecvError> {
    if wait.is_zero() {
        return inbox.try_recv();
    }
    match inbox.recv_timeout(wait) {
        Ok(command) => Ok(command),
        Err(RecvTimeoutError::Disconnected) => Err(TryRecvError::Disconnected),
        Err(RecvTimeoutError::Timeout) => {
            // The kick that ends the share of the guest may have come before a thread that was woken late has begun with it. Kept, it would
            // keep the guest from running, window after window. Any other kick comes with a command.
            vcpu.set_kvm_immediate_exit(0);
            inbox.try_recv()
        }
    }
}

/// Completes the port or memory access that the last exit left half done: the registers are right only after KVM_RUN was entered again
/// (KVM API, KVM_RUN). With `immediate_exit` set it finishes the access and runs no guest code. An access of several parts exits once for
/// each, so this goes on until KVM has nothing left to do.
fn finish_access(vcpu: &mut VcpuFd, buses: &Buses, tracking: &Tracking) -> Outcome {
    vcpu.set_kvm_immediate_exit(1);
    let outcome = loop {
        match run_once(vcpu, buses, tracking) {
            Outcome::Handled => {}
            outcome => break outcome,
        }
    };
    vcpu.set_kvm_immediate_exit(0);
    outcome
}
