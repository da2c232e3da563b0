use super::*;
use crate::block::dirty_bitmap::Granularity;
use crate::block::export_source::{ExportSource, Extent, ExtentKind};

fn request(command: u16, flags: u16, offset: u64, length: u32) -> Vec<u8> {
    Request { flags, command, cookie: 0x1234, offset, length }.encode()
}

/// How the transmission ended, and what the server said.
fn converse(session: &Session, input: Vec<u8>) -> (Result<(), ConnectionError>, Vec<u8>) {
    let mut script = Script::new(input);
    let ended = serve(&mut script, session);
    (ended, script.output)
}

/// What the server says to requests before a goodbye.
fn answers(session: &Session, requests: &[Vec<u8>]) -> Vec<u8> {
    let (ended, output) = converse(session, [&requests.concat()[..], &request(command::DISC, 0, 0, 0)].concat());
    ended.unwrap();
    output
}

#[derive(Debug, PartialEq, Eq)]
struct Chunk {
    done: bool,
    kind: u16,
    payload: Vec<u8>,
}

fn chunks(mut output: &[u8]) -> Vec<Chunk> {
    let mut chunks = Vec::new();
    while !output.is_empty() {
        let mut fields = Fields(output);
        assert_eq!(fields.u32(), Some(STRUCTURED_REPLY_MAGIC));
        let (flags, kind) = (fields.u16().unwrap(), fields.u16().unwrap());
        assert_eq!(fields.u64(), Some(0x1234));
        let length = fields.u32().unwrap() as usize;
        chunks.push(Chunk { done: flags == chunk::DONE, kind, payload: fields.0[..length].to_vec() });
        output = &fields.0[length..];
    }
    chunks
}

/// What the chunks of a whole reply to a read of the range say, and how many of each kind of content there are.
fn content(chunks: &[Chunk], offset: u64, length: usize) -> (Vec<u8>, usize, usize) {
    let (last, parts) = chunks.split_last().unwrap();
    assert_eq!(*last, Chunk { done: true, kind: chunk::NONE, payload: Vec::new() });
    let mut content = Vec::new();
    let (mut data, mut holes) = (0, 0);
    for part in parts {
        let mut fields = Fields(&part.payload);
        assert_eq!(fields.u64(), Some(offset + content.len() as u64));
        if part.kind == chunk::OFFSET_DATA {
            data += 1;
            content.extend(fields.0);
        } else {
            assert_eq!(part.kind, chunk::OFFSET_HOLE);
            holes += 1;
            content.resize(content.len() + fields.u32().unwrap() as usize, 0);
        }
    }
    assert_eq!(content.len(), length);
    (content, data, holes)
}

/// The only thing in a reply is this error.
fn assert_error(output: &[u8], error: RequestError) {
    let payload = [&(error as u32).to_be_bytes()[..], &[0, 0]].concat();
    assert_eq!(chunks(output), [Chunk { done: true, kind: chunk::ERROR, payload }]);
}

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|index| (index % 251) as u8 + 1).collect()
}

fn put(bench: &Bench, offset: u64, mut data: Vec<u8>) {
    bench.catalogue.find("write").unwrap().write(&mut data, offset).unwrap();
}

#[test]
fn reads_are_data_and_holes() {
    let bench = Bench::new();
    let written = pattern(1_200_000 / 4096 * 4096);
    put(&bench, 1 << 20, written.clone());
    let session = bench.session("read", true);
    let output = answers(&session, &[request(command::READ, 0, 0, SIZE as u32)]);
    let (content, data, holes) = content(&chunks(&output), 0, SIZE as usize);
    let mut expected = vec![0; SIZE as usize];
    expected[1 << 20..][..written.len()].copy_from_slice(&written);
    assert!(content == expected);
    // Data comes in pieces of 1 MiB.
    assert_eq!((data, holes), (2, 2));
}

#[test]
fn a_read_that_must_not_be_cut_is_one_chunk() {
    let bench = Bench::new();
    put(&bench, 4096, pattern(4096));
    let session = bench.session("read", true);
    let output = answers(&session, &[request(command::READ, command_flag::DF, 0, 65536)]);
    let (content, data, holes) = content(&chunks(&output), 0, 65536);
    assert!((data, holes) == (1, 0) && content[4096..8192] == pattern(4096)[..]);
    let output = answers(&session, &[request(command::READ, command_flag::DF, 0, 2 << 20)]);
    assert_error(&output, RequestError::Overflow);
}

#[test]
fn reads_without_structured_replies() {
    let bench = Bench::new();
    let written = pattern(3 << 20);
    put(&bench, 0, written.clone());
    let session = bench.session("read", false);
    let output = answers(&session, &[request(command::READ, 0, 0, 3 << 20), request(command::READ, command_flag::DF, 0, 512)]);
    assert_eq!(output[..16], simple_reply(0x1234, None));
    assert!(output[16..16 + written.len()] == written);
    assert_eq!(output[16 + written.len()..], simple_reply(0x1234, Some(RequestError::Inval)));
}

#[test]
fn senseless_requests_are_answered() {
    use RequestError::{Inval, NoSpc, Perm};
    let bench = Bench::new();
    let (end, short) = (SIZE, 512);
    let cases = [
        ("write", request(command::READ, 0, end, short), Inval),
        ("write", request(command::READ, 0, end - 512, 1024), Inval),
        ("write", request(command::READ, 0, u64::MAX - 511, short), Inval),
        ("write", request(command::READ, 0, 1, short), Inval),
        ("write", request(command::READ, 0, 0, 511), Inval),
        ("write", request(command::READ, 0, 0, 0), Inval),
        ("write", request(command::READ, 0, 0, u32::MAX), Inval),
        ("write", request(command::READ, command_flag::REQ_ONE, 0, short), Inval),
        ("write", request(command::TRIM, 0, end, short), Inval),
        ("write", request(command::TRIM, 0x100, 0, short), Inval),
        ("write", request(command::WRITE_ZEROES, 0, end, short), NoSpc),
        ("write", request(command::WRITE_ZEROES, 0, 0, 7), Inval),
        ("write", request(command::BLOCK_STATUS, 0, end, short), Inval),
        ("write", request(command::BLOCK_STATUS, command_flag::DF, 0, short), Inval),
        ("write", [request(command::WRITE, 0, end, 512), vec![1; 512]].concat(), NoSpc),
        ("write", [request(command::WRITE, command_flag::DF, 0, 512), vec![1; 512]].concat(), Inval),
        ("write", request(99, 0, 0, 0), Inval),
        ("read", [request(command::WRITE, 0, 0, 3 << 20), vec![1; 3 << 20]].concat(), Perm),
        ("read", request(command::TRIM, 0, 0, short), Perm),
        ("read", request(command::WRITE_ZEROES, 0, 0, short), Perm),
    ];
    for (name, bytes, error) in cases {
        let session = bench.session(name, true);
        // The next request is understood, so that nothing of the refused one was left over.
        let output = answers(&session, &[bytes.clone(), request(command::FLUSH, command_flag::FUA, 0, 0)]);
        let end = output.len() - chunk_head(0, 0, 0, 0).len();
        assert_eq!(chunks(&output[end..])[0].kind, chunk::NONE);
        assert_error(&output[..end], error);
        let simple = answers(&bench.session(name, false), &[bytes]);
        assert_eq!(simple, simple_reply(0x1234, Some(error)));
    }
    let mut all = vec![0; SIZE as usize];
    bench.disk.read_at(&mut all, 0).unwrap();
    assert!(all.iter().all(|byte| *byte == 0), "what was refused was done");
}

#[test]
fn what_cannot_be_understood_ends_the_connection() {
    let bench = Bench::new();
    let session = bench.session("write", true);
    let mut wrong = request(command::FLUSH, 0, 0, 0);
    wrong[0] ^= 1;
    let too_long = request(command::WRITE, 0, 0, MAX_REQUEST + 512);
    for input in [wrong, too_long] {
        assert!(matches!(converse(&session, input), (Err(ConnectionError::Protocol(_)), output) if output.is_empty()));
    }
    let whole = [request(command::WRITE, 0, 0, 512), vec![1; 512]].concat();
    for length in 0..whole.len() {
        assert!(matches!(converse(&session, whole[..length].to_vec()), (Err(ConnectionError::Io(_)), output) if output.is_empty()));
    }
}

#[test]
fn changes_are_made_and_recorded_in_the_disk_s_bitmaps() {
    let bench = Bench::new();
    bench.disk.bitmaps().add("live", Granularity::new(512).unwrap(), true).unwrap();
    let session = bench.session("write", true);
    let data = pattern(2 << 20);
    let requests = [
        [request(command::WRITE, command_flag::FUA, 1 << 20, 2 << 20), data.clone()].concat(),
        request(command::TRIM, 0, 2 << 20, 4096),
        request(command::WRITE_ZEROES, command_flag::NO_HOLE, 0, 4096),
        request(command::WRITE_ZEROES, 0, (2 << 20) + 8192, 8192),
        request(command::FLUSH, 0, 0, 0),
    ];
    let output = answers(&session, &requests);
    assert!(chunks(&output).iter().all(|chunk| chunk.kind == chunk::NONE) && chunks(&output).len() == requests.len());
    let mut now = vec![0; 2 << 20];
    bench.disk.read_at(&mut now, 1 << 20).unwrap();
    let mut expected = data;
    expected[1 << 20..][..4096].fill(0);
    expected[(1 << 20) + 8192..][..8192].fill(0);
    assert!(now == expected);
    assert_eq!(bench.disk.bitmaps().dirty_ranges("live").unwrap(), [0..4096, 1 << 20..3 << 20]);
    let kind = |offset| bench.disk.allocation(offset, 4096).unwrap().kind;
    assert_eq!([kind(2 << 20), kind((2 << 20) + 8192), kind(1 << 20)], [ExtentKind::Hole, ExtentKind::Hole, ExtentKind::Data]);
}

/// Context id and extents of each chunk.
fn statuses(output: &[u8]) -> Vec<(u32, Vec<(u32, u32)>)> {
    let chunks = chunks(output);
    assert_eq!(chunks.last().unwrap().kind, chunk::NONE);
    let status = chunks.iter().filter(|chunk| chunk.kind == chunk::BLOCK_STATUS).map(|chunk| {
        let mut fields = Fields(&chunk.payload);
        let id = fields.u32().unwrap();
        (id, std::iter::from_fn(|| Some((fields.u32()?, fields.u32()?))).collect())
    });
    status.collect()
}

#[test]
fn block_status_tells_allocation_and_dirty_bitmaps() {
    let bench = Bench::new();
    put(&bench, 4096, pattern(8192));
    let session = bench.session("read", true);
    let status = |flags, offset, length| statuses(&answers(&session, &[request(command::BLOCK_STATUS, flags, offset, length)]));
    let hole = state::HOLE | state::ZERO;
    let rest = SIZE as u32 - 12288;
    assert_eq!(
        status(0, 0, SIZE as u32),
        [(0, vec![(4096, hole), (8192, 0), (rest, hole)]), (1, vec![(4096, 0), (8192, state::DIRTY), (rest, 0)])]
    );
    assert_eq!(status(command_flag::REQ_ONE, 0, SIZE as u32), [(0, vec![(4096, hole)]), (1, vec![(4096, 0)])]);
    assert_eq!(status(0, 8192, 8192), [(0, vec![(4096, 0), (4096, hole)]), (1, vec![(4096, state::DIRTY), (4096, 0)])]);
    assert_eq!(status(0, 8192, 512), [(0, vec![(512, 0)]), (1, vec![(512, state::DIRTY)])]);
    let without = bench.session("read", false);
    let output = answers(&without, &[request(command::BLOCK_STATUS, 0, 0, 512)]);
    assert_eq!(output, simple_reply(0x1234, Some(RequestError::Inval)));
}

#[test]
fn a_disk_that_was_given_up_is_an_error_and_one_that_is_taken_back_goes_on() {
    let bench = Bench::new();
    let session = bench.session("write", true);
    bench.disk.release().unwrap();
    let zeroes = request(command::WRITE_ZEROES, 0, 0, 512);
    let write = [request(command::WRITE, 0, 0, 512), vec![1; 512]].concat();
    for bytes in [request(command::READ, 0, 0, 512), request(command::BLOCK_STATUS, 0, 0, 512), zeroes, write] {
        assert_error(&answers(&session, &[bytes]), RequestError::Shutdown);
    }
    assert_eq!(
        answers(&bench.session("read", false), &[request(command::READ, 0, 0, 512)]),
        simple_reply(0x1234, Some(RequestError::Shutdown))
    );
    bench.disk.acquire().unwrap();
    content(&chunks(&answers(&session, &[request(command::READ, 0, 0, 512)])), 0, 512);
}

/// Fails from 1 MiB on.
struct Broken;

impl ExportSource for Broken {
    fn size(&self) -> u64 {
        SIZE
    }

    fn block_size(&self) -> u32 {
        512
    }

    fn read_at(&self, _: &mut [u8], offset: u64) -> io::Result<()> {
        if offset < 1 << 20 { Ok(()) } else { Err(io::Error::from_raw_os_error(libc::EIO)) }
    }

    fn allocation(&self, _: u64, length: u64) -> io::Result<Extent> {
        Ok(Extent { length, kind: ExtentKind::Data })
    }
}

#[test]
fn a_read_that_fails_half_way_is_never_taken_for_data() {
    let bench = Bench::new();
    bench.catalogue.remove("id-read", Default::default()).unwrap();
    bench.catalogue.add(Export { source: Arc::new(Broken), ..bench.export(false) }).unwrap();
    let read = request(command::READ, 0, 0, 2 << 20);
    let output = answers(&bench.session("read", true), std::slice::from_ref(&read));
    assert_eq!(chunks(&output).iter().map(|chunk| chunk.kind).collect::<Vec<_>>(), [chunk::OFFSET_DATA, chunk::ERROR]);
    let (ended, output) = converse(&bench.session("read", false), read);
    assert!(matches!(ended, Err(ConnectionError::HalfRead)) && output.len() == 16 + (1 << 20));
}
