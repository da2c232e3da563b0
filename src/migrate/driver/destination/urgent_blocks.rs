//! Blocks that come on the urgent connection are written to their image by a thread of their own: a slow storage must not hold up the pages
//! that come behind them.

use std::sync::Arc;
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, bounded};

use super::super::block_io::BlockIo;
use super::Shared;
use crate::memory::PageRun;
use crate::migrate::destination::Input;

/// Runs of each disk that may wait to be written: more than its guest's device asks for at a time.
const WAITING: usize = 64;

/// Of one urgent connection.
pub struct UrgentBlocks {
    /// Ends the thread when it is dropped.
    runs: Option<Sender<(PageRun, Vec<u8>)>>,
    thread: Option<JoinHandle<()>>,
}

impl UrgentBlocks {
    /// Begins to write what comes to `blocks`.
    pub fn start(shared: &Arc<Shared>, blocks: BlockIo) -> Result<Self, Input> {
        let (runs, taken) = bounded(WAITING * blocks.disks().count());
        let shared = shared.clone();
        let thread = std::thread::Builder::new().name("migration-blocks".into()).spawn(move || write(&shared, &blocks, &taken));
        let thread = thread.map_err(|error| Input::Failed(format!("cannot start a thread: {error}")))?;
        Ok(UrgentBlocks { runs: Some(runs), thread: Some(thread) })
    }

    /// The `contents` of `run` have come.
    pub fn place(&self, run: PageRun, contents: Vec<u8>) {
        if let Some(runs) = &self.runs {
            // Fails when the thread has ended, which it has reported.
            let _ = runs.send((run, contents));
        }
    }
}

impl Drop for UrgentBlocks {
    fn drop(&mut self) {
        self.runs = None;
        if let Some(thread) = self.thread.take() {
            // A panic of the thread was printed when it happened.
            let _ = thread.join();
        }
    }
}

fn write(shared: &Shared, blocks: &BlockIo, runs: &Receiver<(PageRun, Vec<u8>)>) {
    for (run, contents) in runs {
        if let Err(error) = blocks.place(run, Some(&contents)) {
            return shared.handle(Input::Failed(error.to_string()));
        }
        shared.engine().placed(run, shared.now());
        shared.wake.wake();
    }
}
