//! Exports of a running guest's disk, with real clients and hostile ones.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};

use ferry::block::nbd::protocol::{IHAVEOPT, Request, command, option};
use rustix::process::Signal;
use serde_json::json;

use super::ferry::{Ferry, wait_for_event};
use super::guest::Guest;
use super::lab::{Hardware, Lab, Transport};
use super::nbd_client::{Answer, RawClient, connect, map, tool};
use super::output::LIMIT;
use super::process::{End, Process};

const SIZE: u64 = 64 << 20;
const GRANULARITY: u64 = 4096;
const ALLOCATION: &str = "base:allocation";

/// `ferry export` as a person calls it, and the address that it printed.
fn export(ferry: &Ferry, arguments: &[&str]) -> (Process, String) {
    let mut process = Process::ferry(["export", "--qmp", ferry.qmp.to_str().unwrap(), "root"].iter().chain(arguments));
    let uri = process.stdout.as_mut().unwrap().wait_for("\n").trim_end().to_owned();
    (process, uri)
}

/// The socket beside the control socket.
fn socket(ferry: &Ferry) -> PathBuf {
    let mut path = ferry.qmp.clone().into_os_string();
    path.push(".nbd");
    path.into()
}

fn free_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// Numbers of the blocks in which two images differ.
fn changed(before: &[u8], now: &[u8]) -> BTreeSet<u64> {
    let block = GRANULARITY as usize;
    let pairs = (0u64..).zip(before.chunks(block).zip(now.chunks(block)));
    pairs.filter(|(_, (before, now))| before != now).map(|(number, _)| number).collect()
}

/// Numbers of the blocks in the extents of a kind.
fn blocks(extents: &[(u64, u64, u64)], kind: u64) -> BTreeSet<u64> {
    let of_kind = extents.iter().filter(|(_, _, of)| *of == kind);
    of_kind.flat_map(|(offset, length, _)| offset / GRANULARITY..(offset + length).div_ceil(GRANULARITY)).collect()
}

fn assert_same(image: &Path, copy: &Path) {
    assert!(std::fs::read(image).unwrap() == std::fs::read(copy).unwrap(), "the copy differs from the image");
}

#[test]
fn debian_s_clients_read_the_disk_of_a_guest_that_writes() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let hardware = Hardware { memory: "128M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut ferry = lab.run(&hardware, "fill=16M rate=1000 disk=on disk_rate=400");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(100);
    ferry.ask("stop");
    let before = std::fs::read(&disk.path).unwrap();
    ferry.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "b0", "granularity": GRANULARITY })).unwrap();
    ferry.ask("cont");
    guest.writes_blocks(100);
    let (unix, tcp) = (socket(&ferry), format!("tcp:127.0.0.1:{}", free_port()));
    for (listen, socket) in [(&["--bitmap", "b0"][..], Some(&unix)), (&["--bitmap", "b0", "--listen", &tcp], None)] {
        ferry.ask("stop");
        let (mut process, uri) = export(&ferry, listen);
        let now = std::fs::read(&disk.path).unwrap();
        assert_eq!(blocks(&map(&uri, "qemu:dirty-bitmap:b0", SIZE), 1), changed(&before, &now));
        let holes = blocks(&map(&uri, ALLOCATION, SIZE), 3);
        let zeros = vec![0; now.len()];
        assert!(!holes.is_empty() && holes.is_disjoint(&changed(&zeros, &now)));

        let copies = [lab.path("copy"), lab.path("copy"), lab.path("copy")];
        tool("nbdcopy", &[&uri, &copies[0]]);
        tool("nbdcopy", &[&"--no-extents", &uri, &copies[1]]);
        tool("qemu-img", &[&"convert", &"-f", &"raw", &"-O", &"raw", &uri, &copies[2]]);
        copies.iter().for_each(|copy| assert_same(&disk.path, copy));
        tool("qemu-img", &[&"compare", &"-f", &"raw", &"-F", &"raw", &uri, &copies[0]]);
        let allocated: Vec<serde_json::Value> =
            serde_json::from_str(&tool("qemu-img", &[&"map", &"-f", &"raw", &"--output=json", &uri])).unwrap();
        let allocated: u64 = allocated.iter().filter(|part| part["data"] == true).map(|part| part["length"].as_u64().unwrap()).sum();
        assert_eq!(allocated, SIZE - holes.len() as u64 * GRANULARITY);

        // The guest goes on under its readers, and what it writes is read next.
        ferry.ask("cont");
        let running = lab.path("copy");
        tool("nbdcopy", &[&uri, &running]);
        guest.writes_blocks(50);
        ferry.ask("stop");
        let copy = lab.path("copy");
        tool("nbdcopy", &[&uri, &copy]);
        assert_same(&disk.path, &copy);
        // The exported bitmap is of the moment at which it was exported.
        assert_eq!(blocks(&map(&uri, "qemu:dirty-bitmap:b0", SIZE), 1), changed(&before, &now));
        ferry.ask("cont");

        process.signal(Signal::INT);
        assert_eq!(process.ends_within(LIMIT), Some(End::Status(0)), "{}", process.stderr.text_so_far());
        assert_eq!(ferry.ask("query-block-exports"), json!([]));
        assert!(socket.is_none_or(|path| !path.exists()));
    }
}

#[test]
fn writes_of_clients_are_in_the_image_and_in_the_dirty_bitmaps() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let hardware = Hardware { memory: "64M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut ferry = lab.run(&hardware, "fill=16M rate=1000");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.beats(1);
    ferry.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "b0", "granularity": GRANULARITY })).unwrap();
    let before = std::fs::read(&disk.path).unwrap();
    let (_process, uri) = export(&ferry, &["--writable", "--name", "a disk"]);
    let commands = ["write -P 0x5a 1M 2M", "discard 2M 64k", "write -z 3068k 8k", "write -P 0x77 60M 512", "flush"];
    tool(
        "qemu-io",
        &[&"-f", &"raw", &"-c", &commands[0], &"-c", &commands[1], &"-c", &commands[2], &"-c", &commands[3], &"-c", &commands[4], &uri],
    );
    let now = std::fs::read(&disk.path).unwrap();
    let mut expected = before;
    expected[1 << 20..3 << 20].fill(0x5a);
    expected[2 << 20..(2 << 20) + 65536].fill(0);
    expected[3068 << 10..3076 << 10].fill(0);
    expected[60 << 20..(60 << 20) + 512].fill(0x77);
    assert!(now == expected);
    // One block of the zeros lies beyond what was written before.
    let dirty = ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0]["count"].as_u64().unwrap();
    assert_eq!(dirty, (2 << 20) + 4096 + 4096);

    let source = lab.path("source");
    std::fs::write(&source, (0..SIZE / 8).flat_map(u64::to_le_bytes).collect::<Vec<u8>>()).unwrap();
    tool("nbdcopy", &[&"--flush", &source, &uri]);
    assert_same(&disk.path, &source);
    assert_eq!(ferry.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0]["count"], SIZE);
}

#[test]
fn no_write_of_a_client_is_lost_or_late_when_the_guest_moves() {
    for mode in ["precopy", "postcopy"] {
        let lab = Lab::new();
        let disk = lab.disk(SIZE);
        let hardware = Hardware { memory: "128M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
        let mut here = lab.run(&hardware, "fill=32M rate=2000 heartbeat=20");
        let mut guest = Guest::booting_at(&mut here);
        guest.beats(1);
        here.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "b0", "granularity": GRANULARITY })).unwrap();
        let (mut export, _) = export(&here, &["--writable"]);
        let socket = socket(&here);
        let (mut writer, mut reader) = (RawClient::connect(&socket, "root"), RawClient::connect(&socket, "root"));
        let mut there = lab.receive(Transport::Unix);
        let migration = lab.migrate(&here, &there.address, &["--mode", mode, "--postcopy-bandwidth", "16M"]);
        let (written, refusal) = std::thread::scope(|scope| {
            scope.spawn(|| {
                // Large ones, so that the switch finds one in flight.
                let mut buffer = vec![0; 8 << 20];
                while reader.read(8 << 20, &mut buffer) == Answer::Done {}
            });
            // Each block is written once, so that every one that was acknowledged must be there.
            let mut written = 0;
            let refusal = loop {
                match writer.write(written % (SIZE / GRANULARITY) * GRANULARITY, &[(written % 255) as u8 + 1; GRANULARITY as usize]) {
                    Answer::Done => written += 1,
                    other => break other,
                }
            };
            (written, refusal)
        });
        // ESHUTDOWN, or the old host's end.
        assert!(matches!(refusal, Answer::Error(108) | Answer::Disconnected), "{refusal:?}");
        assert!(written > 0);
        migration.succeeds();
        here.ends_with(0);
        assert_eq!(export.ends_within(LIMIT), Some(End::Status(1)));
        let said = export.stderr.text_to_end();
        assert!(said.contains("the export has ended: the guest has moved away"), "{said}");
        guest.moved_to(&mut there);
        let now = std::fs::read(&disk.path).unwrap();
        let block = |number: u64| &now[(number % (SIZE / GRANULARITY) * GRANULARITY) as usize..][..GRANULARITY as usize];
        let last = written - 1;
        assert!(block(last).iter().all(|byte| *byte == (last % 255) as u8 + 1), "a write that was acknowledged is lost");
        if let Answer::Error(_) = refusal {
            assert!(block(written).iter().all(|byte| *byte != (written % 255) as u8 + 1), "a write that was refused is there");
        }
        let dirty = there.ask("query-block")[0]["inserted"]["dirty-bitmaps"][0]["count"].as_u64().unwrap();
        assert_eq!(dirty, written.min(SIZE / GRANULARITY) * GRANULARITY);
        guest.checks_every_page();
    }
}

#[test]
fn hostile_clients_harm_nobody() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let hardware = Hardware { memory: "64M", cpus: 1, disk: Some(&disk), ..Hardware::default() };
    let mut ferry = lab.run(&hardware, "fill=16M rate=1000 disk=on disk_rate=400");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.writes_blocks(1);
    let (_process, uri) = export(&ferry, &["--writable"]);
    let path = socket(&ferry);
    let option_head = |option: u32, length: u32| [&IHAVEOPT.to_be_bytes()[..], &option.to_be_bytes(), &length.to_be_bytes()].concat();
    let request = |command, length| Request { flags: 0, command, cookie: 1, offset: 0, length }.encode();
    let disconnected = |stream: &mut std::os::unix::net::UnixStream| {
        let ended = std::io::copy(stream, &mut std::io::sink());
        assert!(ended.is_ok() || ended.unwrap_err().kind() == std::io::ErrorKind::ConnectionReset);
    };

    // They stay connected to the end of the test.
    let mut waiting = Vec::new();
    for _ in 0..4 {
        // Says nothing; says half an option; announces 4 GiB of an option.
        waiting.push(connect(&path));
        for bytes in [&option_head(option::GO, 100)[..7], &option_head(option::LIST, u32::MAX)] {
            let mut stream = connect(&path);
            stream.write_all(bytes).unwrap();
            waiting.push(stream);
        }
    }
    let mut lurking = Vec::new();
    for bytes in
        [request(command::WRITE, 32 << 20), request(command::WRITE, 4096)[..20].to_vec(), request(command::READ, 32 << 20).repeat(50)]
    {
        let mut client = RawClient::connect(&path, "root");
        client.stream().write_all(&bytes).unwrap();
        lurking.push(client);
    }
    for bytes in [vec![0xff; 28], request(command::WRITE, u32::MAX)] {
        let mut client = RawClient::connect(&path, "root");
        client.stream().write_all(&bytes).unwrap();
        disconnected(client.stream());
    }
    let mut wrong_magic = connect(&path);
    wrong_magic.write_all(&[0; 16]).unwrap();
    disconnected(&mut wrong_magic);

    // The others notice nothing.
    let mut good = RawClient::connect(&path, "root");
    assert_eq!(good.read(0, &mut [0; 4096]), Answer::Done);
    assert_eq!(good.read(SIZE, &mut [0; 512]), Answer::Error(22));
    assert_eq!(good.read(0, &mut [0; 4096]), Answer::Done);
    assert!(tool("nbdinfo", &[&"--size", &uri]).contains(&SIZE.to_string()));
    guest.writes_blocks(50);
    // The handshakes that never end are ended.
    for stream in &mut waiting {
        let mut byte = [0];
        assert!(
            matches!(stream.read(&mut byte), Ok(0))
                || stream.read(&mut byte).is_err_and(|error| error.kind() != std::io::ErrorKind::WouldBlock)
        );
    }
    assert_eq!(good.read(0, &mut [0; 4096]), Answer::Done);
    drop(lurking);
}

#[test]
fn qmp_refuses_as_qemu_does() {
    let lab = Lab::new();
    let disk = lab.disk(SIZE);
    let mut ferry = lab.run(&Hardware { memory: "64M", cpus: 1, disk: Some(&disk), readonly: true }, "fill=16M rate=1000");
    let mut guest = Guest::booting_at(&mut ferry);
    guest.beats(1);
    let path = lab.path("nbd");
    let start = json!({ "addr": { "type": "unix", "data": { "path": path } }, "max-connections": 2 });
    let add = |more: serde_json::Value| {
        let mut arguments = json!({ "type": "nbd", "id": "e0", "node-name": "root" });
        arguments.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        arguments
    };
    assert_eq!(ferry.refusal("nbd-server-stop", json!({})), "NBD server not running");
    assert_eq!(ferry.refusal("block-export-add", add(json!({}))), "NBD server not running");
    ferry.execute("nbd-server-start", start.clone()).unwrap();
    assert_eq!(ferry.refusal("nbd-server-start", start), "NBD server already running");
    assert_eq!(ferry.refusal("block-export-add", add(json!({ "writable": true }))), "Cannot export read-only node as writable");
    assert_eq!(ferry.refusal("block-export-add", add(json!({ "id": "0" }))), "Invalid block export id");
    assert_eq!(ferry.refusal("block-export-add", add(json!({ "bitmaps": ["b9"] }))), "Bitmap 'b9' is not found");
    assert!(ferry.refusal("block-export-add", add(json!({ "node-name": "none" }))).contains("'none'"));
    assert!(ferry.refusal("block-export-add", add(json!({ "type": "fuse" }))).contains("fuse"));
    ferry.execute("block-dirty-bitmap-add", json!({ "node": "root", "name": "b0" })).unwrap();
    let bitmaps = json!([{ "node": "root", "name": "b0" }]);
    ferry.execute("block-export-add", add(json!({ "name": "r", "bitmaps": bitmaps, "description": "all of it" }))).unwrap();
    assert_eq!(ferry.refusal("block-export-add", add(json!({}))), "Block export id 'e0' is already in use");
    let exports = json!([{ "id": "e0", "type": "nbd", "node-name": "root", "shutting-down": false }]);
    assert_eq!(ferry.ask("query-block-exports"), exports);

    let mut reader = RawClient::connect(&path, "r");
    assert_eq!(reader.read(0, &mut [0; 512]), Answer::Done);
    assert_eq!(reader.write(0, &[0; 512]), Answer::Error(1));
    assert!(ferry.refusal("block-export-del", json!({ "id": "e0" })).starts_with("export 'e0' still in use"));
    assert_eq!(ferry.refusal("block-export-del", json!({ "id": "e1" })), "Export 'e1' is not found");
    let mut client = ferry.client();
    ferry.execute("block-export-del", json!({ "id": "e0", "mode": "hard" })).unwrap();
    wait_for_event(&mut client, "BLOCK_EXPORT_DELETED", |event| event["event"] == "BLOCK_EXPORT_DELETED" && event["data"]["id"] == "e0");
    assert_eq!(reader.read(0, &mut [0; 512]), Answer::Disconnected);
    assert_eq!(ferry.ask("query-block-exports"), json!([]));
    ferry.ask("nbd-server-stop");
    assert!(!path.exists());
}
