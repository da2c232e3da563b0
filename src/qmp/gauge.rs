//! Counts things that are under way, so that somebody can wait for their end.

use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

/// A count of [`Token`]s. Clones share it.
#[derive(Clone, Debug, Default)]
pub(super) struct Gauge(Arc<(Mutex<usize>, Condvar)>);

/// One of the things counted, until dropped.
#[derive(Debug)]
pub(super) struct Token(Gauge);

impl Gauge {
    /// Counts one more.
    pub fn enter(&self) -> Token {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner) += 1;
        Token(self.clone())
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        *self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until there are none, but not longer than `limit`; whether there are none.
    pub fn wait_for_none(&self, limit: Duration) -> bool {
        let count = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (count, _) = self.0.1.wait_timeout_while(count, limit, |count| *count > 0).unwrap_or_else(PoisonError::into_inner);
        *count == 0
    }
}

impl Drop for Token {
    fn drop(&mut self) {
        let (count, none) = &*self.0.0;
        let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
        *count -= 1;
        if *count == 0 {
            none.notify_all();
        }
    }
}
