use super::*;

fn parse(line: &str) -> Result<Subcommand, clap::Error> {
    Arguments::try_parse_from(line.split_whitespace()).map(|arguments| arguments.command)
}

#[test]
fn definition_is_consistent() {
    Arguments::command().debug_assert();
}

#[test]
fn run_becomes_a_guest_configuration() {
    let line =
        "ferry run --kernel k --initrd i --cpus 2 --memory 1G --disk path=a.img,id=a --disk path=b,id=b,readonly=on --serial null --qmp q";
    let Subcommand::Run(arguments) = parse(line).unwrap() else { panic!("not run") };
    let options = arguments.into_options();
    assert_eq!((options.serial, options.qmp), (SerialTarget::Null, Some("q".into())));
    assert_eq!((options.config.cpus, options.config.memory), (2, 1 << 30));
    // Whatever the working directory of a later host is.
    let here = std::env::current_dir().unwrap();
    assert_eq!((options.config.kernel, options.config.initrd), (here.join("k"), Some(here.join("i"))));
    assert_eq!(options.config.disks[0].path, here.join("a.img"));
    let disks: Vec<_> = options.config.disks.iter().map(|disk| (disk.id.as_str(), disk.readonly)).collect();
    assert_eq!(disks, [("a", false), ("b", true)]);
}

#[test]
fn receive_maps_disks_by_id() {
    let line = "ferry receive --listen tcp:[::1]:4444 --disk id=a,path=/x --disk id=b,path=y --dirty-tracking ring";
    let Subcommand::Receive(arguments) = parse(line).unwrap() else { panic!("not receive") };
    let options = arguments.into_options();
    let there = std::env::current_dir().unwrap().join("y");
    assert_eq!(options.disks, [("a".to_string(), PathBuf::from("/x")), ("b".to_string(), there)]);
    assert_eq!((options.listen.as_str(), options.tracker), ("tcp:[::1]:4444", TrackerChoice::Ring));
}

#[test]
fn sockets_are_told_to_other_processes_by_their_whole_paths() {
    let uri = |line: &str| match parse(line).unwrap() {
        Subcommand::Migrate(arguments) => arguments.uri,
        Subcommand::Recover(arguments) => arguments.uri.or(arguments.listen).unwrap(),
        _ => panic!("neither migrate nor recover"),
    };
    let whole = format!("unix:{}", std::env::current_dir().unwrap().join("s").display());
    for line in ["ferry migrate --qmp q unix:s", "ferry recover --qmp q unix:s", "ferry recover --qmp q --listen unix:s"] {
        assert_eq!(uri(line), whole);
    }
    assert_eq!(uri("ferry migrate --qmp q tcp:h:1"), "tcp:h:1");
}

#[test]
fn wrong_usage_has_exit_status_2() {
    let wrong = [
        "ferry",
        "ferry backup",
        "ferry backup --qmp q root --bitmap b --to f --full --incremental",
        "ferry backup --qmp q root restore --to i f",
        "ferry backup restore --to i",
        "ferry run",
        "ferry run --kernel k --cpus 0",
        "ferry run --kernel k --memory 1M",
        "ferry run --kernel k --memory much",
        "ferry run --kernel k --disk path=x",
        "ferry run --kernel k --serial tty",
        "ferry run --kernel k --dirty-tracking bitmap",
        "ferry receive --listen 4444",
        "ferry receive --listen tcp:host:99999",
        "ferry migrate --qmp q",
        "ferry migrate --qmp q tcp:h:1 --downtime 5",
        "ferry migrate --qmp q tcp:h:1 --mode fast",
        "ferry migrate --qmp q tcp:h:1 --max-bandwidth -1",
        "ferry status",
        "ferry recover --qmp q",
    ];
    for line in wrong {
        assert_eq!(parse(line).map(|_| 0).map_err(|error| error.exit_code()), Err(2), "{line}");
    }
}
