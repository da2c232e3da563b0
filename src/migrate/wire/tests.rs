use proptest::prelude::*;

use super::*;
use crate::memory::HostPage;

fn run() -> impl Strategy<Value = PageRun> {
    (any::<u64>(), any::<u64>()).prop_map(|(first, count)| PageRun::new(first, count))
}

fn text() -> impl Strategy<Value = String> {
    "\\PC{0,40}"
}

fn frame() -> impl Strategy<Value = Frame> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..300);
    let totals = || (any::<u64>(), any::<u64>()).prop_map(|(normal, zero)| Totals { normal, zero });
    let channel = prop_oneof![Just(Channel::Main), Just(Channel::Urgent), any::<u8>().prop_map(Channel::Pages)];
    let flags = (any::<bool>(), any::<bool>()).prop_map(|(enabled, persistent)| BitmapFlags { enabled, persistent });
    let bitmap = (text(), text(), any::<u32>(), any::<u64>(), flags).prop_map(|(disk, name, granularity, bits, flags)| BitmapInfo {
        disk,
        name,
        granularity,
        bits,
        flags,
    });
    let words = prop::collection::vec(any::<u64>(), 1..MAX_BITMAP_WORDS as usize);
    let bitmap_run =
        prop_oneof![(1..u64::MAX).prop_map(BitmapRun::Zeroes), (1..u64::MAX).prop_map(BitmapRun::Ones), words.prop_map(BitmapRun::Words)];
    let package = (totals(), any::<bool>(), prop::collection::vec(run(), 0..20), prop::collection::vec(bitmap, 0..4), bytes())
        .prop_map(|(sent, postcopy, missing, bitmaps, machine)| Package { sent, postcopy, missing, bitmaps, machine });
    let host_page = prop::sample::select(vec![HostPage::SMALL, HostPage::HUGE]);
    let disks = prop::collection::vec(any::<u64>(), 0..3);
    let setup = (any::<u64>(), host_page, prop::collection::vec(run(), 0..20), any::<bool>(), any::<u8>(), bytes(), disks).prop_map(
        |(ram_pages, host_page, huge, postcopy, page_channels, machine, disks)| Setup {
            ram_pages,
            host_page,
            huge,
            postcopy,
            page_channels,
            machine,
            disks,
        },
    );
    prop_oneof![
        (channel, any::<u128>(), any::<u32>(), text()).prop_map(|(channel, session, link, program)| Frame::Hello(Hello {
            channel,
            session,
            link,
            program,
            version: VERSION
        })),
        (any::<u16>(), text()).prop_map(|(version, program)| Frame::Welcome { version, program }),
        text().prop_map(Frame::Abort),
        setup.prop_map(Frame::Setup),
        (any::<u64>(), 1..=MAX_RUN, prop::sample::select(vec![Method::Lz4, Method::Zstd]), bytes()).prop_map(
            |(first, count, method, contents)| Frame::Compressed(Compressed { run: PageRun::new(first, count), method, contents })
        ),
        (any::<u64>(), 1..=MAX_RUN).prop_map(|(first, count)| Frame::Pages(PageRun::new(first, count))),
        prop::collection::vec(run(), 0..20).prop_map(Frame::Zero),
        totals().prop_map(Frame::PassEnd),
        package.prop_map(Frame::Switchover),
        (any::<u64>(), prop::collection::vec(text(), 0..4)).prop_map(|(load_us, warnings)| Frame::Ready { load_us, warnings }),
        any::<u64>().prop_map(Frame::Running),
        run().prop_map(Frame::Request),
        (any::<u32>(), any::<u64>(), bitmap_run).prop_map(|(index, first, run)| Frame::Bitmap { index, first, run }),
        any::<u32>().prop_map(Frame::BitmapComplete),
        prop::sample::select(vec![Frame::Prepared, Frame::PassAck, Frame::Commit, Frame::End, Frame::Goodbye]),
        (any::<u64>(), prop::collection::vec(text(), 0..4), any::<Option<u64>>()).prop_map(|(requested, warnings, waited)| Frame::Done {
            faults: Box::new(Faults { requested, ..Faults::default() }),
            warnings,
            block_waits: waited.map(|waited| Box::new(BlockWaits { waited, ..BlockWaits::default() })),
        }),
        (any::<bool>(), prop::collection::vec(run(), 0..20), any::<u32>(), any::<u64>()).prop_map(|(committed, missing, index, words)| {
            Frame::Holding(Holding { committed, missing, bitmaps: BitmapPlace { index, words } })
        }),
    ]
}

fn decode(bytes: &[u8]) -> Result<Frame, WireError> {
    let (header, body) = bytes.split_at(HEADER_SIZE);
    let header = Header::decode(header.try_into().unwrap())?;
    Frame::decode(header, body)
}

proptest! {
    #[test]
    fn every_frame_survives_its_encoding(frame in frame()) {
        let bytes = frame.encode().unwrap();
        prop_assert_eq!(decode(&bytes), Ok(frame));
    }

    #[test]
    fn a_cut_or_lengthened_body_is_refused(frame in frame(), cut in any::<prop::sample::Index>()) {
        // Of these the contents have no form of their own here.
        prop_assume!(!matches!(frame, Frame::Pages(_) | Frame::Compressed(_)));
        let mut bytes = frame.encode().unwrap();
        if bytes.len() > HEADER_SIZE {
            let cut = HEADER_SIZE + cut.index(bytes.len() - HEADER_SIZE);
            // Some may lack all that version 3 has added, and are as version 2 had them.
            if let Ok(older) = decode(&bytes[..cut]) {
                prop_assert!([Kind::Setup, Kind::Done].contains(&frame.kind()));
                prop_assert_eq!(&older.encode().unwrap()[HEADER_SIZE..], &bytes[HEADER_SIZE..cut]);
            }
        }
        bytes.push(0);
        prop_assert!(decode(&bytes).is_err());
    }

    #[test]
    fn any_bytes_are_a_frame_or_an_error(bytes in prop::collection::vec(any::<u8>(), HEADER_SIZE..2000)) {
        if let Ok(frame) = decode(&bytes) {
            prop_assert!(bytes.len() - HEADER_SIZE <= frame.kind().max_length());
        }
    }

    #[test]
    fn any_body_of_a_known_kind_is_a_frame_or_an_error(kind in prop::sample::select(&Kind::ALL[..]), body in prop::collection::vec(any::<u8>(), 0..2000)) {
        let _ = Frame::decode(Header { kind, length: body.len(), page: 0 }, &body);
    }
}

#[test]
fn strangers_and_other_versions_are_told_so() {
    let hello =
        Frame::Hello(Hello { channel: Channel::Main, session: 1, link: 0, program: "ferry".into(), version: VERSION }).encode().unwrap();
    let (newer, older) = (WireError::Version { oldest: 6, newest: 5 }, WireError::Version { oldest: 1, newest: 0 });
    for (at, byte, told) in [(0, b'X', WireError::NotFerry), (8, 6, newer), (10, 0, older)] {
        let mut other = hello.clone();
        other[HEADER_SIZE + at] = byte;
        assert_eq!(decode(&other), Err(told), "byte {at}");
    }
    // One that speaks newer versions as well is understood.
    let mut both = hello.clone();
    both[HEADER_SIZE + 10] = 7;
    assert_eq!(decode(&both), decode(&hello));
    // With one that knows only the last version, that is what both speak.
    both[HEADER_SIZE + 10] = 1;
    assert!(matches!(decode(&both), Ok(Frame::Hello(Hello { version: 1, .. }))));
    let http = *b"GET / HTTP/1.1\r\n";
    assert!(Header::decode(http).is_err());
}

#[test]
fn lengths_are_bounded_before_anything_is_read() {
    for kind in Kind::ALL {
        let mut header = Header { kind, length: kind.max_length() + 1, page: 0 }.encode();
        assert!(Header::decode(header).is_err(), "{kind:?}");
        header[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(Header::decode(header), Err(WireError::Length { kind, length: u64::from(u32::MAX) }));
    }
    assert!(Header::decode(Header { kind: Kind::Pages, length: 4095, page: 0 }.encode()).is_err());
    assert!(Header::decode(Header { kind: Kind::Pages, length: 0, page: 0 }.encode()).is_err());
}

#[test]
fn long_texts_are_clipped_to_what_the_other_side_accepts() {
    let bytes = Frame::Abort("é".repeat(MAX_TEXT)).encode().unwrap();
    assert!(matches!(decode(&bytes), Ok(Frame::Abort(text)) if text.len() > MAX_TEXT - 8));
}

#[test]
fn texts_give_no_orders_to_a_terminal() {
    let encoded = Frame::Abort("no \u{1b}[2J\u{9b}disk\r\n".into()).encode().unwrap();
    let (header, body) = encoded.split_first_chunk().unwrap();
    assert_eq!(Frame::decode(Header::decode(*header).unwrap(), body), Ok(Frame::Abort("no ?[2J?disk??".into())));
}
