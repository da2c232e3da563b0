//! Connections that come to the destination: what they say they are, and who takes them.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::super::frames;
use super::Shared;
use super::pages;
use super::session::Session;
use crate::migrate::report::Status;
use crate::migrate::transport::{Connection, Interrupt, Listener, Reader, TransportError, Writer};
use crate::migrate::wire::{Channel, Frame, Hello, Kind};

/// How long a connection may take to say what it is.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// How long a refused connection is given to take the reason.
const REFUSE_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections at a time, those that say nothing included.
const MAX_CONNECTIONS: usize = 32;
/// How long nobody is accepted after that failed (where the process has no descriptor left, for example).
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Accepts connections until the migration is over; gives the listener back.
pub fn listen(shared: &Arc<Shared>, listener: Listener) -> Listener {
    loop {
        let connection = match listener.accept(&shared.closing, None) {
            Ok(connection) => connection,
            Err(TransportError::Interrupted) => return listener,
            Err(error) => {
                complain(&error.to_string());
                shared.closing.sleep_until(Instant::now() + ACCEPT_PAUSE);
                continue;
            }
        };
        if shared.connections.fetch_add(1, Ordering::Relaxed) >= MAX_CONNECTIONS {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            complain(&format!("closed a connection from {}: {MAX_CONNECTIONS} are open already", connection.peer()));
            continue;
        }
        let theirs = shared.clone();
        let spawned = std::thread::Builder::new().name("migration-in".into()).spawn(move || {
            serve(&theirs, connection);
            theirs.connections.fetch_sub(1, Ordering::Relaxed);
        });
        if let Err(error) = spawned {
            shared.connections.fetch_sub(1, Ordering::Relaxed);
            complain(&format!("closed a connection: cannot start a thread: {error}"));
        }
    }
}

/// Finds out what a connection is and serves it to its end.
fn serve(shared: &Arc<Shared>, connection: Connection) {
    let peer = connection.peer().to_owned();
    let (mut reader, mut writer) = connection.split();
    let hello = frames::read(&mut reader, |header| header.kind == Kind::Hello, Some(Instant::now() + HELLO_TIMEOUT));
    let refusal = match hello {
        Ok(Frame::Hello(hello)) => match accept(shared, &hello, reader, writer) {
            Ok(()) => return,
            Err((reason, its_reader, its_writer)) => {
                (reader, writer) = (its_reader, its_writer);
                reason
            }
        },
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

/// Hands a connection that has said what it is to those who use it, and serves it to its end if that is this thread's. What is refused is
/// given back with the reason.
fn accept(shared: &Arc<Shared>, hello: &Hello, reader: Reader, writer: Writer) -> Result<(), (String, Reader, Writer)> {
    let interrupt = match Interrupt::new() {
        Ok(interrupt) => interrupt,
        Err(error) => return Err((format!("the destination cannot take the connection: {error}"), reader, writer)),
    };
    let mut engine = shared.engine();
    let is_first = engine.status() == Status::None;
    let link = match engine.hello(hello, shared.now()) {
        Ok(link) => link,
        Err(reason) => {
            drop(engine);
            // It may have ended something, all the same.
            shared.wake.wake();
            return Err((reason, reader, writer));
        }
    };
    // Under the engine's lock: whoever is told of the connection finds it.
    let mut links = shared.links();
    if hello.channel != Channel::Main {
        let interrupt = links.current.as_ref().map_or(interrupt, |(_, current)| current.clone());
        if hello.channel == Channel::Urgent {
            links.urgent = Some((link, writer.interrupted_by(&interrupt)));
        }
        drop((links, engine));
        if let Some(faults) = shared.faults.get() {
            faults.renew();
        }
        shared.wake.wake();
        pages::receive(shared, link, hello.channel, reader.interrupted_by(&interrupt));
        return Ok(());
    }
    let old = links.current.replace((link, interrupt.clone()));
    links.main = Some((reader.interrupted_by(&interrupt), writer.interrupted_by(&interrupt)));
    drop((links, engine));
    if let Some((_, interrupt)) = old {
        interrupt.raise();
    }
    if is_first {
        Session::new(shared.clone(), link).run();
    } else {
        shared.wake.wake();
    }
    Ok(())
}

/// Reads away what still comes, so that closing does not reset the connection and destroy what was said last.
pub fn drain(reader: &mut Reader, until: Instant) {
    let mut rest = [0; 4096];
    while reader.read_exact(&mut rest, Some(until)).is_ok() && Instant::now() < until {}
}

/// Who runs the destination may want to know of strangers; nobody else does.
fn complain(text: &str) {
    eprintln!("ferry: migration: {text}");
}
