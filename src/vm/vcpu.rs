//! vCPU threads. Each runs its vCPU and lets go of it while it is parked. It is told over a channel to run, to park, or to call a function on
//! the parked vCPU; the last of these others may do themselves, without waking the thread.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
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
    Run {
        /// Where the devices are.
        buses: Arc<Buses>,
        /// The guest stood still for so long that it should be told.
        tell_guest: bool,
    },
    /// Finish the access in flight, park, and answer.
    Pause(Sender<()>),
    /// Call a function on the parked vCPU.
    Call(Box<dyn FnOnce(&mut VcpuFd) + Send>),
}

/// A vCPU's thread, created parked. Dropping it ends and joins the thread.
pub struct VcpuThread {
    index: u16,
    id: Pid,
    /// Held by the thread while the vCPU runs.
    vcpu: Arc<Mutex<VcpuFd>>,
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
    pub fn spawn(index: u16, vcpu: VcpuFd, events: EventSink, throttle: Arc<Throttle>, tracking: Tracking) -> Result<Self, VmError> {
        let (commands, inbox) = unbounded();
        let (ready, started) = bounded(1);
        let vcpu = Arc::new(Mutex::new(vcpu));
        let its_vcpu = vcpu.clone();
        let body = move || {
            let kickable = Kickable::new(&mut lock(&its_vcpu));
            match kickable {
                Ok(kickable) => {
                    let _ = ready.send(Ok(gettid()));
                    become_known(&mut lock(&its_vcpu));
                    serve(index, &its_vcpu, &inbox, &events, &throttle, &tracking);
                    drop(kickable);
                }
                Err(error) => {
                    let _ = ready.send(Err(error));
                }
            }
        };
        let thread = std::thread::Builder::new().name(format!("vcpu{index}")).spawn(body);
        let failed = |source| VmError::VcpuThread { index, source };
        let thread = thread.map_err(failed)?;
        let id = started.recv().map_err(|_| VmError::VcpuGone(index))?.map_err(failed)?;
        Ok(VcpuThread { index, id, vcpu, commands: Some(commands), thread: Some(thread) })
    }

    /// The kernel's id of the thread.
    pub fn id(&self) -> Pid {
        self.id
    }

    /// Lets the vCPU run, with devices on `buses`. `tell_guest` that it stood still, if it looks at that.
    pub fn run(&self, buses: &Arc<Buses>, tell_guest: bool) -> Result<(), VmError> {
        self.tell(Command::Run { buses: buses.clone(), tell_guest })
    }

    /// Parks the vCPU. When the answer comes, no access of its is in flight.
    pub fn pause(&self) -> Result<Pending<()>, VmError> {
        let (sender, answer) = bounded(1);
        self.tell(Command::Pause(sender))?;
        // After the command: the thread looks for it once it has been kicked.
        self.kick();
        Ok(Pending { index: self.index, answer })
    }

    /// Calls `function` on the parked vCPU, on this thread: at the switch, waking another one would take longer than most calls.
    pub fn call_here<T>(&self, function: impl FnOnce(&mut VcpuFd) -> T) -> Result<T, VmError> {
        Ok(function(&mut *self.vcpu.lock().map_err(|_| VmError::VcpuGone(self.index))?))
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
        self.commands.as_ref().ok_or_else(gone)?.send(command).map_err(|_| gone())
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

fn lock(vcpu: &Mutex<VcpuFd>) -> MutexGuard<'_, VcpuFd> {
    vcpu.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Enters KVM_RUN without entering the guest. The first time KVM waits for a thread of its own that it starts for the machine
/// (`kvm-nx-lpage-recovery`), which would take up to 0.1 ms of the blackout of a guest that comes.
fn become_known(vcpu: &mut VcpuFd) {
    vcpu.set_kvm_immediate_exit(1);
    // EINTR. Another error comes again when the guest runs.
    let _ = vcpu.run();
    vcpu.set_kvm_immediate_exit(0);
}

/// The thread's life: parked until it is told to run.
fn serve(index: u16, vcpu: &Mutex<VcpuFd>, inbox: &Receiver<Command>, events: &EventSink, throttle: &Throttle, tracking: &Tracking) {
    let mut stuck = false;
    for command in inbox {
        match command {
            Command::Run { .. } if stuck => {}
            Command::Run { buses, tell_guest } => {
                let mut vcpu = lock(vcpu);
                if tell_guest {
                    // So that its watchdogs do not take the pause for a hang. Refused (EINVAL) if the guest does not use kvmclock, or not
                    // yet. It is written into guest RAM at the next entry: by the side that runs it.
                    let _ = vcpu.kvmclock_ctrl();
                }
                let end = run(&mut vcpu, buses, inbox, events, throttle, tracking);
                drop(vcpu);
                match end {
                    Ran::Parked(answer) => {
                        // Not before others can have the vCPU.
                        let _ = answer.send(());
                    }
                    Ran::Stuck(reason, answer) => {
                        stuck = true;
                        events.send(VmEvent::Crashed { vcpu: index, reason });
                        if let Some(answer) = answer {
                            let _ = answer.send(());
                        }
                    }
                    Ran::Dismissed => return,
                }
            }
            Command::Pause(answer) => {
                let _ = answer.send(());
            }
            Command::Call(function) => function(&mut lock(vcpu)),
        }
    }
}

/// What made a vCPU stop.
enum Ran {
    /// It was told to park, and somebody waits for it.
    Parked(Sender<()>),
    /// KVM cannot go on with it, for this reason; found, perhaps, when it was told to park.
    Stuck(String, Option<Sender<()>>),
    /// The thread is to end.
    Dismissed,
}

/// Runs the guest until told otherwise.
fn run(
    vcpu: &mut VcpuFd,
    mut buses: Arc<Buses>,
    inbox: &Receiver<Command>,
    events: &EventSink,
    throttle: &Throttle,
    tracking: &Tracking,
) -> Ran {
    // A kick that came when the vCPU was parked already is spent. One for a command that is yet to be seen may be lost here, but that command
    // is looked for below.
    vcpu.set_kvm_immediate_exit(0);
    // No access is in flight when a vCPU begins to run, and none when KVM was interrupted: it completes one before it looks for a signal.
    let mut in_flight = false;
    loop {
        match look(vcpu, inbox, throttle.wait()) {
            Ok(Command::Run { buses: new, .. }) => buses = new,
            Ok(Command::Pause(answer)) if !in_flight => return Ran::Parked(answer),
            Ok(Command::Pause(answer)) => match finish_access(vcpu, &buses, tracking) {
                Outcome::Handled | Outcome::Interrupted => return Ran::Parked(answer),
                Outcome::Ended(event) => {
                    events.send(event);
                    return Ran::Parked(answer);
                }
                Outcome::Stuck(reason) => return Ran::Stuck(reason, Some(answer)),
            },
            Ok(Command::Call(function)) => function(vcpu),
            Err(TryRecvError::Disconnected) => return Ran::Dismissed,
            Err(TryRecvError::Empty) => match run_once(vcpu, &buses, tracking) {
                Outcome::Handled => in_flight = true,
                Outcome::Interrupted => {
                    // Before the next look at the commands, so that a kick from here on is kept.
                    vcpu.set_kvm_immediate_exit(0);
                    in_flight = false;
                }
                Outcome::Ended(event) => {
                    in_flight = true;
                    events.send(event);
                }
                Outcome::Stuck(reason) => return Ran::Stuck(reason, None),
            },
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
