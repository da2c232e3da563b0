//! Page faults of the guest that has come before its pages.

use std::collections::BTreeSet;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};

use super::super::frames;
use super::Shared;
use crate::memory::uffd::{MissingPages, UffdError, Userfaultfd};
use crate::memory::{GuestRam, PageNumber, PageRun};
use crate::migrate::destination::{Input, Placement};
use crate::migrate::pages::FaultAnswer;
use crate::migrate::transport::{Interrupt, Reader, Writer};
use crate::migrate::wire::{Channel, Frame, Kind};

/// The pages that are missing, and the thread that asks for those somebody touches.
pub struct FaultService {
    pub pages: MissingPages,
    ram: GuestRam,
    stop: Interrupt,
    /// Lost pages that the owner was told of.
    told: Mutex<BTreeSet<PageNumber>>,
}

impl FaultService {
    /// Discards `missing`, and from then on asks over `urgent` for what is touched. Comes before anything of the guest is restored.
    pub fn start(shared: &Arc<Shared>, uffd: Userfaultfd, ram: &GuestRam, missing: &[PageRun], urgent: Writer) -> Result<(), String> {
        let error = |error: UffdError| error.to_string();
        let pages = uffd.register(ram.clone()).map_err(error)?;
        // After the registration, which keeps huge pages from filling what is discarded, and before anybody looks.
        missing.iter().try_for_each(|run| pages.discard(*run)).map_err(error)?;
        let stop = Interrupt::new().map_err(|error| format!("cannot serve page faults: {error}"))?;
        let service = FaultService { pages, ram: ram.clone(), stop, told: Mutex::default() };
        if shared.faults.set(service).is_err() {
            return Err("page faults are served already".into());
        }
        let shared = shared.clone();
        let thread = std::thread::Builder::new().name("migration-faults".into()).spawn(move || serve_faults(&shared, urgent));
        thread.map(drop).map_err(|error| format!("cannot start a thread: {error}"))
    }

    /// Ends the service; faults wait from then on.
    pub fn stop(&self) {
        self.stop.raise();
    }

    /// Somebody waits for `page`, which the source will not send any more. A guest that was never committed will never run either, so
    /// that zeros do it no harm and let its restore end; a guest that lives here waits, and its owner is told.
    pub fn unanswered(&self, shared: &Shared, page: PageNumber) {
        if !shared.engine().is_committed() {
            // Fails only with the address space.
            let _ = self.pages.place_zero(PageRun::single(page));
        } else if self.told.lock().unwrap_or_else(PoisonError::into_inner).insert(page) {
            let address = self.ram.guest_address(page).map_or(0, |address| address.0);
            shared.owner.waits_for_lost_page(format!(
                "the guest waits for {page} (guest address {address:#x}), which the source did not send before it was lost"
            ));
        }
    }
}

fn serve_faults(shared: &Arc<Shared>, mut urgent: Writer) {
    let Some(service) = shared.faults.get() else { return };
    loop {
        let page = match service.pages.next_fault(&service.stop) {
            Ok(Some(page)) => page,
            Ok(None) => return,
            Err(error) => return shared.handle(Input::Failed(error.to_string())),
        };
        let answer = shared.engine().fault(page, shared.now());
        match answer {
            FaultAnswer::Wait => {}
            FaultAnswer::Zero(run) => {
                if let Err(error) = service.pages.place_zero(run) {
                    return shared.handle(Input::Failed(error.to_string()));
                }
            }
            FaultAnswer::Request(_) if shared.source_gone.load(Ordering::SeqCst) => service.unanswered(shared, page),
            FaultAnswer::Request(run) => {
                if let Err(error) = frames::send(&mut urgent, &Frame::Request(run), None) {
                    shared.handle(Input::Lost(Channel::Urgent, error.to_string()));
                }
            }
        }
    }
}

/// Receives the answers until the urgent connection ends.
pub fn receive_urgent(shared: &Arc<Shared>, mut reader: Reader) {
    let input = loop {
        match frames::read(&mut reader, |header| header.kind == Kind::Pages, None) {
            Ok(Frame::Pages(run)) => {
                if let Err(input) = receive_pages(shared, Channel::Urgent, run, &mut reader) {
                    break input;
                }
                shared.wake.wake();
            }
            Ok(frame) => break Input::Frame(Channel::Urgent, frame),
            Err(error) => break Input::Lost(Channel::Urgent, error.to_string()),
        }
    };
    shared.handle(input);
}

/// Reads the contents of `run` and places them. An error is what to tell the engine.
pub fn receive_pages(shared: &Shared, channel: Channel, run: PageRun, reader: &mut Reader) -> Result<(), Input> {
    let placement = shared.engine().pages(channel, run).map_err(Input::Failed)?;
    let (Placement::Fault, Some(service)) = (placement, shared.faults.get()) else {
        return Err(Input::Failed(format!("{run} came on the {channel:?} connection before the guest")));
    };
    // Bounded by the engine.
    let mut contents = vec![0; run.bytes() as usize];
    let deadline = std::time::Instant::now() + frames::FRAME_TIMEOUT;
    reader.read_exact(&mut contents, Some(deadline)).map_err(|error| Input::Lost(channel, error.to_string()))?;
    service.pages.place(run, &contents).map_err(|error| Input::Failed(error.to_string()))?;
    // Only now are they no longer missing.
    shared.engine().placed(run, shared.now());
    Ok(())
}
