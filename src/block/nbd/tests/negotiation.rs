use super::*;

fn kinds(output: &[u8]) -> Vec<u32> {
    replies(output).iter().map(|(_, kind, _)| *kind).collect()
}

#[test]
fn go_tells_what_the_export_is_and_begins_the_transmission() {
    let bench = Bench::new();
    let input = [hello(3), option(option::GO, &info_request("write", &[info::NAME, info::DESCRIPTION, 77]))].concat();
    let (session, output) = bench.negotiate(input);
    let session = session.unwrap().unwrap();
    assert!(session.export.name == "write" && !session.structured && session.contexts.is_empty());
    let replies = replies(&output);
    let flags = transmission_flag::HAS_FLAGS
        | transmission_flag::SEND_FLUSH
        | transmission_flag::SEND_FUA
        | transmission_flag::SEND_TRIM
        | transmission_flag::SEND_WRITE_ZEROES
        | transmission_flag::CAN_MULTI_CONN;
    let fact = |kind: u16, content: &[u8]| (option::GO, option_reply::INFO, [&kind.to_be_bytes(), content].concat());
    assert_eq!(
        replies,
        [
            fact(info::EXPORT, &[&SIZE.to_be_bytes()[..], &flags.to_be_bytes()].concat()),
            fact(info::BLOCK_SIZE, &[512, 4096, 32 << 20].map(u32::to_be_bytes).concat()),
            fact(info::NAME, b"write"),
            fact(info::DESCRIPTION, b"a disk"),
            (option::GO, option_reply::ACK, Vec::new()),
        ]
    );
}

#[test]
fn what_is_refused_does_not_end_the_handshake() {
    let bench = Bench::new();
    let long = vec![0; 100_000];
    let cases = [
        // STARTTLS, extended headers, and what nobody has defined.
        (5, &[][..], option_reply::ERR_UNSUP),
        (11, &[], option_reply::ERR_UNSUP),
        (0xdead, &[1, 2, 3], option_reply::ERR_UNSUP),
        (option::LIST, &long, option_reply::ERR_TOO_BIG),
        (option::LIST, &[1], option_reply::ERR_INVALID),
        (option::STRUCTURED_REPLY, &[1], option_reply::ERR_INVALID),
        // Not before structured replies.
        (option::SET_META_CONTEXT, &queries("read", &[]), option_reply::ERR_INVALID),
        (option::INFO, &info_request("none", &[]), option_reply::ERR_UNKNOWN),
        (option::GO, &info_request("none", &[]), option_reply::ERR_UNKNOWN),
        (option::GO, &info_request("", &[]), option_reply::ERR_UNKNOWN),
        (option::GO, &[], option_reply::ERR_INVALID),
        (option::GO, &[0xff, 0xff, 0xff, 0xff, 0, 0], option_reply::ERR_INVALID),
        // Fewer and more facts than announced, and no UTF-8.
        (option::GO, &[0, 0, 0, 1, b'x', 0, 2, 0, 0], option_reply::ERR_INVALID),
        (option::GO, &[0, 0, 0, 1, b'x', 0, 0, 0, 0], option_reply::ERR_INVALID),
        (option::GO, &[0, 0, 0, 1, 0xff, 0, 0], option_reply::ERR_INVALID),
    ];
    let mut input = hello(3);
    cases.iter().for_each(|(number, data, _)| input.extend(option(*number, data)));
    input.extend(option(option::ABORT, &[]));
    let (session, output) = bench.negotiate(input);
    assert!(session.unwrap().is_none());
    let expected: Vec<u32> = cases.iter().map(|(_, _, kind)| *kind).chain([option_reply::ACK]).collect();
    assert_eq!(kinds(&output), expected);
}

#[test]
fn exports_are_listed_and_described_without_being_used() {
    let bench = Bench::new();
    let input =
        [hello(3), option(option::LIST, &[]), option(option::INFO, &info_request("read", &[])), option(option::ABORT, &[])].concat();
    let (_, output) = bench.negotiate(input);
    let replies = replies(&output);
    let server = |name| (option::LIST, option_reply::SERVER, [string(name), b"a disk".to_vec()].concat());
    assert_eq!(replies[..3], [server("read"), server("write"), (option::LIST, option_reply::ACK, Vec::new())]);
    assert_eq!(replies[3].2[10..], (0x2u16 | 1 | 4 | 8 | 1 << 8).to_be_bytes());
    assert_eq!(replies.last().unwrap().1, option_reply::ACK);
    bench.catalogue.remove("id-read", super::super::catalogue::RemoveMode::Safe).unwrap();
}

#[test]
fn the_old_way_to_choose_an_export() {
    let bench = Bench::new();
    for (flags, zeroes) in [(3, 0), (1, 124), (0, 124)] {
        let (session, output) = bench.negotiate([hello(flags), option(option::EXPORT_NAME, b"read")].concat());
        assert_eq!(session.unwrap().unwrap().export.name, "read");
        assert_eq!(output.len(), 18 + 10 + zeroes);
        assert_eq!(output[18..26], SIZE.to_be_bytes());
    }
    for name in [&b"none"[..], b"\xff", &[b'x'; 5000]] {
        let (session, _) = bench.negotiate([hello(3), option(option::EXPORT_NAME, name)].concat());
        assert!(matches!(session, Err(ConnectionError::Protocol("no such export"))));
    }
}

#[test]
fn contexts_are_listed_by_group_and_chosen_by_name() {
    let bench = Bench::new();
    let all = ["base:allocation", "qemu:dirty-bitmap:b0"];
    let cases: [(&[&str], &[&str], &[&str]); 7] = [
        (&[], &all, &[]),
        (&["base:"], &all[..1], &[]),
        (&["qemu:"], &all[1..], &[]),
        (&["qemu:dirty-bitmap:"], &all[1..], &[]),
        (&["qemu:dirty-bitmap:b0", "base:allocation", "base:allocation"], &all, &all),
        (&["qemu:dirty-bitmap:b", "base:allocation2", "none", ""], &[], &[]),
        (&["base:allocation"], &all[..1], &all[..1]),
    ];
    for (asked, listed, chosen) in cases {
        let data = queries("read", asked);
        let input = [
            hello(3),
            option(option::STRUCTURED_REPLY, &[]),
            option(option::LIST_META_CONTEXT, &data),
            option(option::SET_META_CONTEXT, &data),
            option(option::GO, &info_request("read", &[])),
        ];
        let (session, output) = bench.negotiate(input.concat());
        let session = session.unwrap().unwrap();
        assert_eq!(session.contexts.iter().map(|context| context.name()).collect::<Vec<_>>(), chosen);
        let names = |of: u32| -> Vec<String> {
            let replies = replies(&output).into_iter().filter(|(option, kind, _)| *option == of && *kind == option_reply::META_CONTEXT);
            replies.map(|(_, _, data)| String::from_utf8(data[4..].to_vec()).unwrap()).collect()
        };
        assert_eq!(names(option::LIST_META_CONTEXT), listed, "{asked:?}");
        assert_eq!(names(option::SET_META_CONTEXT), chosen, "{asked:?}");
    }
}

#[test]
fn contexts_of_another_export_do_not_count() {
    let bench = Bench::new();
    let input = [
        hello(3),
        option(option::STRUCTURED_REPLY, &[]),
        option(option::SET_META_CONTEXT, &queries("read", &["base:allocation"])),
        option(option::GO, &info_request("write", &[])),
    ];
    assert!(bench.negotiate(input.concat()).0.unwrap().unwrap().contexts.is_empty());
}

#[test]
fn what_cannot_be_understood_ends_the_connection() {
    let bench = Bench::new();
    let wrong = [
        hello(4),
        // Fixed newstyle is needed for every option but the old one.
        [hello(0), option(option::LIST, &[])].concat(),
        [hello(3), vec![0; 16]].concat(),
    ];
    for input in wrong {
        assert!(matches!(bench.negotiate(input).0, Err(ConnectionError::Protocol(_))));
    }
    // Any part of a good handshake.
    let whole = [
        hello(3),
        option(option::STRUCTURED_REPLY, &[]),
        option(option::SET_META_CONTEXT, &queries("read", &["base:allocation"])),
        option(option::GO, &info_request("read", &[])),
    ]
    .concat();
    for length in 0..whole.len() {
        assert!(matches!(bench.negotiate(whole[..length].to_vec()).0, Err(ConnectionError::Io(_))), "{length}");
    }
    assert!(bench.negotiate(whole).0.unwrap().is_some());
}
