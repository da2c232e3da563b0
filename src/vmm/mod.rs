//! The process that owns one guest: boots or receives it, does what QMP, signals and the console ask, gives it away, and ends when the
//! guest does.
//!
//! | file | concern |
//! |---|---|
//! | `build` | a machine from its configuration |
//! | `disks` | what QMP does with disks, and their end |
//! | `exports` | disks for NBD's clients |
//! | `guest` | who may run the guest now |
//! | `monitor` | QMP's commands |
//! | `outgoing` | giving the guest to another host |
//! | `incoming` | receiving it from one |
//! | `signals` | SIGTERM and its like |
//! | `snapshots` | frozen points in time of its disks |

mod build;
pub mod disks;
mod exports;
mod guest;
mod incoming;
mod monitor;
mod outgoing;
mod signals;
mod snapshots;

use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crossbeam_channel::{Receiver, Sender, select, unbounded};
use thiserror::Error;

use crate::block::disk::{Disk, DiskError};
use crate::block::io_error::BlockIoError;
use crate::block::nbd::server::NbdServer;
use crate::cli::console::{Console, ConsoleError};
use crate::cli::options::{ReceiveOptions, RunOptions};
use crate::memory::dirty_tracker::TrackerChoice;
use crate::memory::ram::RamError;
use crate::migrate::driver::destination::DestinationMigration;
use crate::migrate::transport::{Address, AddressError, Listener, TransportError};
use crate::qmp::event::{Event, ShutdownReason};
use crate::qmp::socket::SocketError;
use crate::qmp::{Events, Server};
use crate::vm::empty::EmptyVm;
use crate::vm::{Built, Vm, VmError, VmEvent};
use build::Machine;
use guest::Guest;
use signals::Signals;

/// How long a process whose guest has moved away waits for its control socket's clients to see it.
const LINGER: Duration = Duration::from_secs(2);
/// Why a process whose guest has moved does not end yet.
const STILL_NEEDED: &str = "ferry: the guest has moved, but its destination still needs pages from here; this ends when it has them";
/// Why a process whose guest has come does not end yet.
const STILL_COMING: &str = "ferry: the guest is here, but its disks are still coming from the source; this can end when they are";
/// How long a client has to take the last events.
const FLUSH: Duration = Duration::from_millis(500);

/// Why a guest could not be run to its end: one sentence.
#[derive(Debug, Error)]
#[expect(missing_docs, reason = "the messages say it")]
pub enum VmmError {
    #[error(transparent)]
    Vm(#[from] VmError),
    #[error(transparent)]
    Ram(#[from] RamError),
    #[error(transparent)]
    Disk(#[from] DiskError),
    #[error(transparent)]
    Console(#[from] ConsoleError),
    #[error(transparent)]
    Qmp(#[from] SocketError),
    #[error(transparent)]
    Address(#[from] AddressError),
    #[error(transparent)]
    Transport(#[from] TransportError),
    #[error("cannot attach disk {id}: {reason}")]
    Attach { id: String, reason: String },
    #[error("cannot set up signals: {0}")]
    Signals(std::io::Error),
    #[error("vCPU {vcpu} of the guest cannot go on: {reason}")]
    Crashed { vcpu: u16, reason: String },
    #[error("ended by a signal; the guest did not power off")]
    Signal,
    #[error(
        "ended by a signal while the destination still needed pages from here: the guest is there and waits when it touches one of them"
    )]
    SignalWhileNeeded,
    #[error("no guest was received: {0}")]
    NotReceived(String),
    #[error("{0}")]
    Incomplete(String),
    #[error("the guest asked to restart, which needs its kernel on this host: {0}")]
    Restart(VmError),
    #[error("the guest asked to restart while pages of it are missing")]
    RestartIncomplete,
    #[error("the guest ended while it was being moved: {0}")]
    Moving(String),
}

/// What ends the main loop, or asks it to act.
#[derive(Debug)]
enum Message {
    /// A person ends it.
    Quit(ShutdownReason),
    /// The guest runs elsewhere and all of it is there.
    MovedAway,
    /// The link to the other side was lost when the guest was, or may have been, handed over; with what to tell.
    Lost(String),
    /// A link that was lost has been replaced, or is about to be.
    Recovering,
    /// The migration to here has ended, the guest is whole.
    Received,
    /// Nobody meant to send a guest yet.
    DryRun,
    /// No guest came, and none will.
    NotReceived(String),
    /// A disk's image failed a request.
    DiskFailed(BlockIoError),
}

/// The owner of one guest, shared by the main loop, QMP's clients and migrations.
struct Vmm {
    guest: Mutex<Guest>,
    machine: Machine,
    disks: Mutex<Vec<Arc<Disk>>>,
    transactions: disks::Transactions,
    nbd: NbdServer,
    events: Events,
    messages: Sender<Message>,
    outgoing: Mutex<outgoing::Outgoing>,
    outgoing_ended: Condvar,
    incoming: incoming::Incoming,
}

/// Locks `mutex`; a thread that panicked with it held left nothing half-done that matters more than going on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Boots a guest and runs it until it powers off or has moved away.
pub fn run(options: RunOptions) -> Result<(), VmmError> {
    // First of all: every thread started later inherits the blocked signals.
    let signals = Signals::block().map_err(VmmError::Signals)?;
    let console = Console::open(&options.serial)?;
    let (vmm, mut main) = Main::new(console, options.tracker, incoming::Incoming::default(), signals)?;
    let booted = boot(&vmm, &options).and_then(|guest| {
        main.listen(&vmm, options.qmp.as_deref())?;
        Ok(guest)
    });
    match booted.and_then(|guest| Ok(guest.start()?)) {
        Ok(guest) => *lock(&vmm.guest) = Guest::Running(guest),
        Err(error) => {
            disks::close(&vmm.all_disks());
            return Err(error);
        }
    }
    main.run(&vmm)
}

/// The guest before its first instruction, and its disks.
fn boot(vmm: &Vmm, options: &RunOptions) -> Result<Vm<Built>, VmmError> {
    let config = &options.config;
    let disks = config.disks.iter().cloned().map(Disk::open).collect::<Result<Vec<_>, _>>()?;
    lock(&vmm.disks).clone_from(&disks);
    for disk in &disks {
        disk.acquire_for_boot()?.iter().for_each(|warning| eprintln!("ferry: {warning}\r"));
    }
    let ram = config.allocate_ram()?;
    if config.lock_memory {
        ram.lock()?;
    }
    let mut vm = vmm.machine.build(EmptyVm::create()?, config, ram, &disks)?;
    vm.load_kernel()?;
    Ok(vm)
}

/// Waits for a guest, receives it and runs it until it powers off or has moved on.
pub fn receive(options: ReceiveOptions) -> Result<(), VmmError> {
    let signals = Signals::block().map_err(VmmError::Signals)?;
    let console = Console::open(&options.serial)?;
    let listener = Listener::bind(&options.listen.parse::<Address>()?)?;
    let (vmm, mut main) = Main::new(console, options.tracker, incoming::Incoming::expecting(options.disks), signals)?;
    main.listen(&vmm, options.qmp.as_deref())?;
    eprintln!("ferry: waiting for a guest at {}\r", listener.address());
    let migration = DestinationMigration::start(listener, Arc::new(vmm.clone())).map_err(VmmError::NotReceived)?;
    vmm.incoming.began(migration);
    main.run(&vmm)
}

/// The main loop's own things.
struct Main {
    console: Console,
    messages: Receiver<Message>,
    vm_events: Receiver<VmEvent>,
    signals: Signals,
    server: Option<Server>,
    /// What the guest did to end itself before all of it was here: its source is let go first.
    ended_early: Option<VmEvent>,
    /// A first signal has asked the guest to power off.
    signalled: bool,
    /// A first signal has come since the guest was given up.
    signalled_while_needed: bool,
    lost: Option<String>,
}

impl Main {
    fn new(console: Console, tracker: TrackerChoice, incoming: incoming::Incoming, signals: Signals) -> Result<(Arc<Vmm>, Self), VmmError> {
        let (sender, messages) = unbounded();
        let (vm_sender, vm_events) = unbounded();
        let events = Events::default();
        let exports = events.clone();
        let failures = sender.clone();
        let on_disk_error = move |error| {
            let _ = failures.send(Message::DiskFailed(error));
        };
        let vmm = Arc::new(Vmm {
            guest: Mutex::new(Guest::None),
            machine: Machine::new(console.output()?, tracker, vm_sender, on_disk_error),
            disks: Mutex::default(),
            transactions: disks::Transactions::default(),
            nbd: NbdServer::new(move |id| exports.emit(&Event::BlockExportDeleted { id: id.to_owned() })),
            events,
            messages: sender,
            outgoing: Mutex::default(),
            outgoing_ended: Condvar::new(),
            incoming,
        });
        let mut main = Main {
            console,
            messages,
            vm_events,
            signals,
            server: None,
            ended_early: None,
            signalled: false,
            signalled_while_needed: false,
            lost: None,
        };
        let (input, quit) = (vmm.clone(), vmm.messages.clone());
        main.console.start_input(
            move |bytes| input.machine.console_input(bytes),
            move || {
                let _ = quit.send(Message::Quit(ShutdownReason::HostUi));
            },
        )?;
        Ok((vmm, main))
    }

    fn listen(&mut self, vmm: &Arc<Vmm>, qmp: Option<&Path>) -> Result<(), VmmError> {
        self.server = qmp.map(|path| Server::start(path, Arc::new(vmm.clone()), vmm.events.clone())).transpose()?;
        Ok(())
    }

    fn run(mut self, vmm: &Arc<Vmm>) -> Result<(), VmmError> {
        let result = loop {
            let next = select! {
                recv(self.messages) -> message => message.map_or(Ok(Some(())), |message| self.on_message(vmm, message)),
                recv(self.vm_events) -> event => event.map_or(Ok(None), |event| self.on_vm_event(vmm, event)),
                recv(self.signals.received()) -> _ => self.on_signal(vmm),
            };
            match next {
                Ok(None) => {}
                Ok(Some(())) => break Ok(()),
                Err(error) => break Err(error),
            }
        };
        vmm.machine.close();
        vmm.incoming.close();
        // Removes its socket's path; an error is that there is no server.
        let _ = vmm.nbd.stop();
        // vCPUs stop before the console and the disks go.
        let guest = std::mem::take(&mut *lock(&vmm.guest));
        if vmm.incoming.is_active() {
            // A thread of an incomplete guest may wait for a page that never comes. It ends with the process, and until then nothing must
            // take the missing page for zeros and write them to a disk.
            std::mem::forget(guest);
        } else {
            drop(guest);
        }
        disks::close(&vmm.all_disks());
        if let Some(server) = &self.server {
            server.flush(FLUSH);
        }
        result
    }

    fn shutdown(&self, vmm: &Vmm, reason: ShutdownReason) {
        vmm.events.emit(&Event::Shutdown(reason.into()));
    }

    fn on_message(&mut self, vmm: &Arc<Vmm>, message: Message) -> Result<Option<()>, VmmError> {
        match message {
            Message::Quit(reason) => {
                if !vmm.cancel_outgoing() {
                    eprintln!("{STILL_NEEDED}\r");
                    return Ok(None);
                }
                if self.lost.is_none() && vmm.incomplete_images().is_some() {
                    eprintln!("{STILL_COMING}\r");
                    return Ok(None);
                }
                self.shutdown(vmm, reason);
                return self.incomplete(vmm).map_or(Ok(Some(())), Err);
            }
            Message::MovedAway => {
                if let Some(server) = &self.server {
                    server.flush(FLUSH);
                    server.wait_for_clients_to_leave(LINGER);
                }
                return Ok(Some(()));
            }
            Message::DiskFailed(error) => vmm.disk_failed(error),
            Message::DryRun => vmm.wait_again()?,
            Message::NotReceived(reason) => {
                self.shutdown(vmm, ShutdownReason::HostError);
                return Err(VmmError::NotReceived(reason));
            }
            Message::Lost(text) => {
                eprintln!("ferry: {text}\r");
                self.lost = Some(text);
                match self.ended_early.take() {
                    Some(event) if vmm.incomplete_images().is_some() => self.wait_for_disks(event),
                    Some(VmEvent::Reset) => return Err(VmmError::RestartIncomplete),
                    Some(event) => return self.on_guest_end(vmm, event),
                    None => {}
                }
            }
            Message::Recovering => self.lost = None,
            Message::Received => {
                self.lost = None;
                if let Some(event) = self.ended_early.take() {
                    return self.on_guest_end(vmm, event);
                }
            }
        }
        Ok(None)
    }

    /// While pages are still to come, the end of the guest waits for them: otherwise the source would take it for a loss, and pages would
    /// land in a restarted guest.
    fn on_vm_event(&mut self, vmm: &Arc<Vmm>, event: VmEvent) -> Result<Option<()>, VmmError> {
        if vmm.incoming.is_active() && self.lost.is_none() {
            self.ended_early = Some(event);
            return Ok(None);
        }
        if vmm.incomplete_images().is_some() {
            self.wait_for_disks(event);
            return Ok(None);
        }
        self.on_guest_end(vmm, event)
    }

    /// The guest has ended without its source. Its missing pages have gone with it, but its disks are half here and half there.
    fn wait_for_disks(&mut self, event: VmEvent) {
        eprintln!("ferry: the guest has ended ({event}), but not all of its disks has come: this process waits for `ferry recover`\r");
        self.ended_early = Some(event);
    }

    /// What is missing because a person does not want to wait for it, and where the rest is.
    fn incomplete(&mut self, vmm: &Vmm) -> Option<VmmError> {
        let images = vmm
            .incomplete_images()
            .map(|images| format!("not all of its disks has come; what has, and what the guest has written, is in {images}"));
        let parts: Vec<_> = self.lost.take().into_iter().chain(images).collect();
        (!parts.is_empty()).then(|| VmmError::Incomplete(parts.join("; ")))
    }

    fn on_guest_end(&mut self, vmm: &Arc<Vmm>, event: VmEvent) -> Result<Option<()>, VmmError> {
        // For a restart, too: emptied RAM is not in the dirty log, and the machine is another one.
        vmm.guest_ended_outgoing(&event);
        match event {
            VmEvent::PowerOff => {
                self.shutdown(vmm, ShutdownReason::GuestShutdown);
                Ok(Some(()))
            }
            VmEvent::Crashed { vcpu, reason } => {
                self.shutdown(vmm, ShutdownReason::GuestPanic);
                Err(VmmError::Crashed { vcpu, reason })
            }
            VmEvent::Reset => {
                vmm.events.emit(&Event::Reset(ShutdownReason::GuestReset.into()));
                if vmm.incoming.is_active() {
                    return Err(VmmError::RestartIncomplete);
                }
                self.restart(vmm)
            }
        }
    }

    /// Builds the machine anew over the same RAM and disks and boots it.
    fn restart(&mut self, vmm: &Arc<Vmm>) -> Result<Option<()>, VmmError> {
        let mut guest = lock(&vmm.guest);
        let Some((config, ram)) = guest.end() else {
            return Err(VmmError::Moving("it asked to restart".into()));
        };
        ram.unlock();
        ram.clear()?;
        if config.lock_memory {
            ram.lock()?;
        }
        let disks = lock(&vmm.disks).clone();
        let mut vm = vmm.machine.build(EmptyVm::create()?, &config, ram, &disks)?;
        vm.load_kernel().map_err(VmmError::Restart)?;
        *guest = Guest::Running(vm.start()?);
        Ok(None)
    }

    /// The first signal presses the power button; the second, or the first where no guest runs that could hear it, ends at once. Where the
    /// guest has moved and not all of it is there yet, also while the link is lost, the first one only says so.
    fn on_signal(&mut self, vmm: &Arc<Vmm>) -> Result<Option<()>, VmmError> {
        if !vmm.is_needed_by_destination() {
            if !std::mem::replace(&mut self.signalled, true) && vmm.power_button().is_ok() {
                eprintln!("ferry: asked the guest to power off; a second signal ends it at once\r");
                return Ok(None);
            }
            vmm.cancel_outgoing();
        }
        // Asked again: it may have been given up when it could not be cancelled any more.
        let needed = vmm.is_needed_by_destination();
        if needed && !std::mem::replace(&mut self.signalled_while_needed, true) {
            eprintln!("{STILL_NEEDED}; a second signal ends it at once\r");
            return Ok(None);
        }
        self.shutdown(vmm, ShutdownReason::HostSignal);
        if let Some(error) = self.incomplete(vmm) {
            return Err(error);
        }
        Err(if needed { VmmError::SignalWhileNeeded } else { VmmError::Signal })
    }
}
