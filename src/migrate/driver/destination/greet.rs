//! Connections that come to the destination: what they say they are, and who takes them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::super::frames;
use super::Shared;
use super::faults;
use super::session::Session;
use crate::migrate::destination::Outcome;
use crate::migrate::transport::{Connection, Listener, TransportError};
use crate::migrate::wire::{Channel, Frame, Kind};

/// How long a connection may take to say what it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a refused connection is given to take the reason.
const REFUSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at a time, those that say nothing included.
const MAX_CONNECTIONS: usize = 32;
/// How long nobody is accepted after that failed (where the process has no descriptor left, for example).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until the migration is over, and then tells the owner.
pub fn listen(shared: &Arc<Shared>, listener: Listener) {
    let connections = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        loop {
            let connection = match listener.accept(&shared.closing, None) {
                Ok(connection) => connection,
                Err(TransportError::Interrupted) => break,
                Err(error) => {
                    complain(&error.to_string());
                    shared.closing.sleep_until(Instant::now() + ACCEPT_PAUSE);
                    continue;
                }
            };
            if connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
                connections.fetch_sub(1, Ordering::Relaxed);
                complain(&format!("closed a connection from {}: {MAX_CONNECTIONS} are open already", connection.peer()));
                continue;
            }
            let connections = &connections;
            let spawned = std::thread::Builder::new().name("migration-in".into()).spawn_scoped(scope, move || {
                serve(shared, connection);
                connections.fetch_sub(1, Ordering::Relaxed);
            });
            if let Err(error) = spawned {
                connections.fetch_sub(1, Ordering::Relaxed);
                complain(&format!("closed a connection: cannot start a thread: {error}"));
            }
        }
    });
    // Nobody can connect to what nobody serves.
    drop(listener);
    let outcome = shared.outcome.get().cloned();
    shared.owner.ended(outcome.unwrap_or_else(|| Outcome::Abandoned("the migration's thread is gone".into())));
}

/// Finds out what a connection is and serves it to its end.
fn serve(shared: &Arc<Shared>, connection: Connection) {
    let peer = connection.peer().to_owned();
    let (mut reader, mut writer) = connection.split();
    let refusal = match frames::read(&mut reader, |header| header.kind == Kind::Hello, Some(Instant::now() + HELLO_TIMEOUT)) {
        Ok(Frame::Hello(hello)) => {
            let mut engine = shared.engine();
            match (engine.hello(&hello, shared.now()), hello.channel) {
                (Ok(()), Channel::Main) => {
                    drop(engine);
                    return Session::new(shared.clone(), reader, writer).run();
                }
                (Ok(()), Channel::Urgent) => {
                    // Under the engine's lock: no fault is served before it is there.
                    *shared.urgent.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(writer);
                    drop(engine);
                    shared.wake.wake();
                    return faults::receive_urgent(shared, reader);
                }
                (Err(reason), _) => reason,
            }
        }
        Ok(frame) => format!("the first frame must be Hello, not {:?}", frame.kind()),
        Err(error) => error.to_string(),
    };
    if shared.closing.is_raised() {
        return;
    }
    complain(&format!("refused a connection from {peer}: {refusal}"));
    let until = Instant::now() + REFUSE_TIMEOUT;
    // Whoever it is need not take it.
    if frames::send(&mut writer, &Frame::Abort(refusal), Some(until)).is_ok() && writer.finish().is_ok() {
        drain(&mut reader, until);
    }
}

/// Reads away what still comes, so that closing does not reset the connection and destroy what was said last.
pub fn drain(reader: &mut crate::migrate::transport::Reader, until: Instant) {
    let mut rest = [0; 4096];
    while reader.read_exact(&mut rest, Some(until)).is_ok() && Instant::now() < until {}
}

/// Who runs the destination may want to know of strangers; nobody else does.
fn complain(text: &str) {
    eprintln!("ferry: migration: {text}");
}
