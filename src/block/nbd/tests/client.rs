//! The client with this server, and with servers that lie.

use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;

use super::super::client::{Client, ClientError, RangeKind};
use super::*;

/// What `with` finds, connected to the bench's server.
fn connected<T>(bench: &Bench, with: impl FnOnce(UnixStream) -> T) -> T {
    let (here, mut there) = UnixStream::pair().unwrap();
    std::thread::scope(|scope| {
        scope.spawn(move || {
            let disconnect: Disconnect = Arc::new(|| {});
            // The client ends it, however it likes.
            if let Ok(Some(session)) = negotiate(&mut there, &Offer { catalogue: &bench.catalogue, multi_conn: true }, &disconnect) {
                let _ = serve(&mut there, &session);
            }
        });
        with(here)
    })
}

fn image(bench: &Bench) -> std::fs::File {
    std::fs::File::options().write(true).open(bench.directory.path().join("disk.img")).unwrap()
}

#[test]
fn what_is_dirty_and_holds_data_is_told_and_read() {
    let bench = Bench::new();
    image(&bench).write_all_at(&[7; 4096], 8192).unwrap();
    connected(&bench, |stream| {
        let mut client = Client::negotiate(stream, "read", Some("b0")).unwrap();
        assert_eq!(client.size(), SIZE);
        let clean_hole_data_clean =
            [(0..4096, RangeKind::Clean), (4096..8192, RangeKind::Zero), (8192..12288, RangeKind::Data), (12288..SIZE, RangeKind::Clean)];
        assert_eq!(client.status(0).unwrap(), clean_hole_data_clean);
        assert_eq!(client.status(8704).unwrap(), [(8704..12288, RangeKind::Data), (12288..SIZE, RangeKind::Clean)]);
        let mut bytes = [9; 8192];
        client.read(&mut bytes, 4608).unwrap();
        assert!(bytes[..3584].iter().all(|byte| *byte == 0) && bytes[3584..7680].iter().all(|byte| *byte == 7));
        assert!(bytes[7680..].iter().all(|byte| *byte == 0));
    });
    connected(&bench, |stream| {
        let mut client = Client::negotiate(stream, "read", None).unwrap();
        let all = [(0..8192, RangeKind::Zero), (8192..12288, RangeKind::Data), (12288..SIZE, RangeKind::Zero)];
        assert_eq!(client.status(0).unwrap(), all);
        bench.disk.release().unwrap();
        // ESHUTDOWN.
        assert!(matches!(client.status(0), Err(ClientError::Request(108))));
        assert!(matches!(client.read(&mut [0; 512], 0), Err(ClientError::Request(108))));
    });
}

#[test]
fn what_the_server_does_not_have_is_an_error() {
    let bench = Bench::new();
    let refusal = |export, bitmap| connected(&bench, |stream| Client::negotiate(stream, export, bitmap).unwrap_err());
    assert!(matches!(refusal("none", None), ClientError::Option { .. }));
    assert!(matches!(refusal("read", Some("b1")), ClientError::NoContext(name) if name == "qemu:dirty-bitmap:b1"));
}

/// What a server says up to the end of the handshake: `base:allocation` is 5, the bitmap `b` 6, and the export has `size` bytes.
fn handshake(size: u64) -> Vec<u8> {
    let context = |id: u32, name: &str| {
        option_reply(option::SET_META_CONTEXT, super::option_reply::META_CONTEXT, &[&id.to_be_bytes(), name.as_bytes()].concat())
    };
    [
        [&NBDMAGIC.to_be_bytes()[..], &IHAVEOPT.to_be_bytes(), &[0, 3]].concat(),
        option_reply(option::STRUCTURED_REPLY, super::option_reply::ACK, &[]),
        context(5, "base:allocation"),
        context(6, "qemu:dirty-bitmap:b"),
        option_reply(option::SET_META_CONTEXT, super::option_reply::ACK, &[]),
        option_reply(option::GO, super::option_reply::INFO, &[&info::EXPORT.to_be_bytes()[..], &size.to_be_bytes(), &[0, 3]].concat()),
        option_reply(option::GO, super::option_reply::ACK, &[]),
    ]
    .concat()
}

/// A client whose server says `answers` behind the handshake.
fn told(answers: &[Vec<u8>]) -> Client<Script> {
    Client::negotiate(Script::new([handshake(65536), answers.concat()].concat()), "r", Some("b")).unwrap()
}

fn chunk(flags: u16, kind: u16, cookie: u64, payload: &[u8]) -> Vec<u8> {
    [&chunk_head(flags, kind, cookie, payload.len() as u32)[..], payload].concat()
}

#[test]
fn a_handshake_that_lies_is_refused() {
    let good = handshake(65536);
    for length in 0..good.len() {
        let refused = Client::negotiate(Script::new(good[..length].to_vec()), "r", Some("b")).err().unwrap();
        assert!(matches!(refused, ClientError::Io(_)), "{length} bytes: {refused}");
    }
    for size in [u64::MAX, 1 << 63] {
        assert!(matches!(Client::negotiate(Script::new(handshake(size)), "r", Some("b")), Err(ClientError::Protocol(_))));
    }
    let mut endless = good[..18].to_vec();
    (0..1000).for_each(|_| endless.extend(option_reply(option::STRUCTURED_REPLY, super::option_reply::INFO, &[])));
    assert!(matches!(Client::negotiate(Script::new(endless), "r", None), Err(ClientError::Protocol("too many replies to an option"))));
    let mut long = good[..18].to_vec();
    long.extend([&OPTION_REPLY_MAGIC.to_be_bytes()[..], &[0, 0, 0, 8, 0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]].concat());
    assert!(matches!(Client::negotiate(Script::new(long), "r", None), Err(ClientError::Protocol("a reply that is too long"))));
}

#[test]
fn a_status_that_lies_is_refused() {
    let status =
        |numbers: &[u32]| chunk(0, chunk::BLOCK_STATUS, 1, &numbers.iter().flat_map(|number| number.to_be_bytes()).collect::<Vec<_>>());
    let done = chunk(chunk::DONE, chunk::NONE, 1, &[]);
    let good = [status(&[5, 65536, 0]), status(&[6, u32::MAX, 1]), done.clone()];
    assert_eq!(told(&good).status(0).unwrap(), [(0..65536, RangeKind::Data)]);
    for (wrong, why) in [
        (vec![good[0].clone(), done.clone()], "a status without the dirty bitmap"),
        (vec![good[1].clone(), done.clone()], "a status without allocation"),
        (vec![status(&[7, 512, 0])], "a status of a context that was not asked for"),
        (vec![status(&[5])], "malformed extents"),
        (vec![status(&[5, 512])], "malformed extents"),
        (vec![status(&[5, 0, 0])], "an extent that is empty or out of place"),
        (vec![status(&[5, 65536, 0, 512, 0])], "an extent that is empty or out of place"),
        (vec![status(&[])], "a status without a context"),
        (vec![chunk(0, chunk::OFFSET_DATA, 1, &[0; 9])], "a wrong kind of answer to a status request"),
        (vec![chunk(0, chunk::NONE, 1, &[])], "an empty chunk in the middle of a reply"),
        (vec![chunk(0, chunk::BLOCK_STATUS, 2, &[0; 12])], "no reply to the request"),
        (vec![vec![0; 20]], "no reply to the request"),
        (vec![chunk_head(0, chunk::BLOCK_STATUS, 1, u32::MAX).to_vec()], "a reply that is too long"),
    ] {
        let refused = told(&wrong).status(0).unwrap_err();
        assert!(matches!(refused, ClientError::Protocol(reason) if reason == why), "{refused}");
    }
}

#[test]
fn a_read_that_lies_is_refused() {
    let data = |offset: u64, length: usize| chunk(0, chunk::OFFSET_DATA, 1, &[&offset.to_be_bytes()[..], &vec![7; length]].concat());
    let hole =
        |flags, offset: u64, length: u32| chunk(flags, chunk::OFFSET_HOLE, 1, &[&offset.to_be_bytes()[..], &length.to_be_bytes()].concat());
    let done = chunk(chunk::DONE, chunk::NONE, 1, &[]);
    let read = |answers: &[Vec<u8>]| {
        let mut bytes = [9; 1024];
        told(answers).read(&mut bytes, 4096).map(|()| bytes)
    };
    // In any order, and the last chunk can say that it is the last.
    let bytes = read(&[data(4608, 512), hole(chunk::DONE, 4096, 512)]).unwrap();
    assert!(bytes[..512] == [0; 512] && bytes[512..] == [7; 512]);
    const OUTSIDE: &str = "data from outside the range that was asked for";
    const PART: &str = "a read that was not answered as a whole";
    for (wrong, why) in [
        (vec![done.clone()], PART),
        (vec![data(4096, 512), done.clone()], PART),
        (vec![data(4096, 1024), data(4096, 512), done.clone()], PART),
        (vec![data(4096, 600), hole(0, 4608, 512), done.clone()], PART),
        (vec![data(4096, 1025)], OUTSIDE),
        (vec![data(4095, 512)], OUTSIDE),
        (vec![data(u64::MAX, 512)], OUTSIDE),
        (vec![data(4096, 0)], OUTSIDE),
        (vec![hole(0, 4608, u32::MAX)], OUTSIDE),
        (vec![chunk(0, chunk::OFFSET_HOLE, 1, &[0; 7])], OUTSIDE),
        (vec![chunk(0, chunk::BLOCK_STATUS, 1, &4096u64.to_be_bytes())], "a wrong kind of answer to a read"),
        (vec![chunk_head(0, chunk::OFFSET_DATA, 1, 2 << 20).to_vec()], "a reply that is too long"),
    ] {
        let refused = read(&wrong).unwrap_err();
        assert!(matches!(refused, ClientError::Protocol(reason) if reason == why), "{refused}");
    }
    let error = chunk(chunk::DONE, chunk::ERROR, 1, &[0, 0, 0, 5, 0, 0]);
    assert!(matches!(read(&[error]), Err(ClientError::Request(5))));
}
