//! Blocks that the destination waits for are read by a thread of their own: a slow storage must not hold up the pages that are asked for
//! meanwhile.

use crossbeam_channel::{Receiver, Sender, bounded, unbounded};

use super::super::block_io::BlockIo;
use crate::memory::PageRun;
use crate::migrate::source::Input;
use crate::migrate::transport::Wake;

/// Runs that are read ahead of what was sent.
const AHEAD: usize = 4;

/// Blocks, and their contents.
pub type ReadBlocks = (PageRun, Vec<u8>);

/// Of one urgent connection. The thread ends with it, after the read that it is at. Nobody joins it, because a storage that hangs must not keep
/// the link from being given up; it shares nothing with the next link's but the disks.
pub struct BlockReader {
    asked: Sender<PageRun>,
    read: Receiver<Result<ReadBlocks, Input>>,
    /// Tells of blocks that have been read.
    pub news: Wake,
}

impl BlockReader {
    /// Begins to read what is asked for of `blocks`.
    pub fn start(blocks: BlockIo) -> Result<Self, Input> {
        let failed = |error: std::io::Error| Input::Failed(format!("cannot start a thread: {error}"));
        let news = Wake::new().map_err(failed)?;
        let (asked, to_read) = unbounded::<PageRun>();
        let (done, read) = bounded(AHEAD);
        let wake = news.clone();
        let body = move || {
            for run in to_read {
                let mut contents = Vec::new();
                let result = blocks.read(run, &mut contents).map_err(|error| Input::Failed(error.to_string()));
                // Fails when the connection is gone.
                if done.send(result.map(|()| (run, contents))).is_err() {
                    return;
                }
                wake.wake();
            }
        };
        std::thread::Builder::new().name("migration-blocks".into()).spawn(body).map_err(failed)?;
        Ok(BlockReader { asked, read, news })
    }

    /// Has `run` read; never waits.
    pub fn ask(&self, run: PageRun) {
        // Fails when the thread has died, whose panic was printed when it happened.
        let _ = self.asked.send(run);
    }

    /// What has been read, in the order in which it was asked for.
    pub fn next(&self) -> Option<Result<ReadBlocks, Input>> {
        self.read.try_recv().ok()
    }
}
