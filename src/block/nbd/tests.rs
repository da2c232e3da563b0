//! What a client sends is written down as bytes, and what it is sent is taken apart again.

use std::io::{self, Cursor, Read, Write};
use std::sync::{Arc, Mutex};

use tempfile::TempDir;

use super::ConnectionError;
use super::catalogue::{Catalogue, Disconnect};
use super::export::Export;
use super::negotiation::{Offer, Session, negotiate};
use super::protocol::*;
use super::transmission::serve;
use crate::block::dirty_bitmap::{BitmapCopy, DirtyBitmaps, Granularity};
use crate::block::disk::Disk;
use crate::vm::config::{DiskConfig, DiskOptions};

mod client;
mod negotiation;
mod server;
mod transmission;

const SIZE: u64 = 4 << 20;

/// A client that says everything at once and hangs up.
struct Script {
    input: Cursor<Vec<u8>>,
    output: Vec<u8>,
}

impl Script {
    fn new(input: Vec<u8>) -> Self {
        Script { input: Cursor::new(input), output: Vec::new() }
    }
}

impl Read for Script {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.input.read(buffer)
    }
}

impl Write for Script {
    fn write(&mut self, buffer: &[u8]) -> io::Result<usize> {
        self.output.write(buffer)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A disk of [`SIZE`] sparse bytes, and its exports `read` and `write` with a bitmap `b0`, of which bytes 4096 to 12288 are dirty.
struct Bench {
    disk: Arc<Disk>,
    catalogue: Arc<Catalogue>,
    deleted: Arc<Mutex<Vec<String>>>,
    directory: TempDir,
}

/// A bitmap in which `length` bytes from `offset` on are dirty.
fn dirty(offset: u64, length: u64) -> BitmapCopy {
    let bitmaps = DirtyBitmaps::new(SIZE);
    bitmaps.add("b0", Granularity::new(512).unwrap(), true).unwrap();
    bitmaps.mark(offset, length);
    bitmaps.copy("b0").unwrap()
}

impl Bench {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.img");
        std::fs::File::create(&path).unwrap().set_len(SIZE).unwrap();
        let disk = Disk::open(DiskConfig { id: "root".into(), path, readonly: false, options: DiskOptions::default() }).unwrap();
        disk.acquire().unwrap();
        let deleted: Arc<Mutex<Vec<String>>> = Arc::default();
        let catalogue = Catalogue::new({
            let deleted = deleted.clone();
            move |id| deleted.lock().unwrap().push(id.to_owned())
        });
        let bench = Bench { disk, catalogue, deleted, directory };
        for writable in [false, true] {
            bench.catalogue.add(bench.export(writable)).unwrap();
        }
        bench
    }

    fn export(&self, writable: bool) -> Export {
        let name = if writable { "write" } else { "read" };
        Export {
            id: format!("id-{name}"),
            node: "root".into(),
            name: name.into(),
            description: Some("a disk".into()),
            source: self.disk.clone(),
            writable: writable.then(|| self.disk.clone()),
            bitmaps: vec![("b0".into(), Arc::new(dirty(4096, 8192)))],
        }
    }

    /// The outcome of a handshake, and what the server said.
    fn negotiate(&self, input: Vec<u8>) -> (Result<Option<Session>, ConnectionError>, Vec<u8>) {
        let mut script = Script::new(input);
        let disconnect: Disconnect = Arc::new(|| {});
        let session = negotiate(&mut script, &Offer { catalogue: &self.catalogue, multi_conn: true }, &disconnect);
        (session, script.output)
    }

    /// A session with the export `name`, its contexts all chosen where replies are structured.
    fn session(&self, name: &str, structured: bool) -> Session {
        let mut input = hello(3);
        if structured {
            input.extend(option(option::STRUCTURED_REPLY, &[]));
            input.extend(option(option::SET_META_CONTEXT, &queries(name, &["base:allocation", "qemu:dirty-bitmap:b0"])));
        }
        input.extend(option(option::GO, &info_request(name, &[])));
        self.negotiate(input).0.unwrap().unwrap()
    }
}

/// The client's flags.
fn hello(flags: u32) -> Vec<u8> {
    flags.to_be_bytes().to_vec()
}

fn option(option: u32, data: &[u8]) -> Vec<u8> {
    [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

fn info_request(name: &str, wanted: &[u16]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((wanted.len() as u16).to_be_bytes());
    data.extend(wanted.iter().flat_map(|kind| kind.to_be_bytes()));
    data
}

fn queries(name: &str, queries: &[&str]) -> Vec<u8> {
    let mut data = string(name);
    data.extend((queries.len() as u32).to_be_bytes());
    data.extend(queries.iter().flat_map(|query| string(query)));
    data
}

/// The server's replies to options, behind its greeting: option, type and data.
fn replies(mut output: &[u8]) -> Vec<(u32, u32, Vec<u8>)> {
    let greeting = [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &3u16.to_be_bytes()].concat();
    output = output.strip_prefix(&greeting[..]).expect("a greeting");
    let mut replies = Vec::new();
    while !output.is_empty() {
        let mut fields = Fields(output);
        assert_eq!(fields.u64(), Some(OPTION_REPLY_MAGIC));
        let (option, kind, length) = (fields.u32().unwrap(), fields.u32().unwrap(), fields.u32().unwrap() as usize);
        replies.push((option, kind, fields.0[..length].to_vec()));
        output = &fields.0[length..];
    }
    replies
}
