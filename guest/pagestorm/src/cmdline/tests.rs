use super::*;

#[test]
fn an_empty_line_gives_the_defaults() {
    assert_eq!(parse(" "), Ok(Config::default()));
}

#[test]
fn every_key() {
    let line = "fill=2G pattern=zero rate=max order=hotcold verify=0 cpus=2 disk=on disk_rate=7 \
                disk_discard=on heartbeat=1 heartbeat_byte=writes stat=off slow=30 idle=spin run=9 tsc_khz=2000000 corrupt=5";
    assert_eq!(
        parse(line),
        Ok(Config {
            fill: Fill::Pages(524_288),
            pattern: Pattern::Zero,
            rate: Rate::Max,
            order: Order::HotCold,
            verify: 0,
            cpus: 2,
            disk: true,
            disk_rate: Rate::PerSecond(7),
            disk_discard: true,
            heartbeat: 1,
            heartbeat_byte: Heartbeat::Writes,
            stat: false,
            slow: 30,
            idle: Idle::Spin,
            run: 9,
            tsc_khz: Some(2_000_000),
            corrupt: Some(5),
        })
    );
}

#[test]
fn sizes() {
    for (text, pages) in [("4096", 1), ("8K", 2), ("1M", 256), ("3G", 786_432)] {
        assert_eq!(fill(text), Some(Fill::Pages(pages)), "{text}");
    }
    assert_eq!(fill("all"), Some(Fill::All));
    for text in [
        "",
        "0",
        "4095",
        "M",
        "1T",
        "-1",
        "+4096",
        "1.5G",
        "99999999999999999999",
        "99999999999G",
    ] {
        assert_eq!(fill(text), None, "{text}");
    }
}

#[test]
fn what_is_not_understood_is_named() {
    assert_eq!(
        parse("fill=1M what=1 cpus=0"),
        Err(Problem::UnknownKey("what=1"))
    );
    assert_eq!(parse("quiet"), Err(Problem::UnknownKey("quiet")));
    for word in [
        "cpus=0",
        "cpus=33",
        "rate=",
        "rate=fast",
        "order=up",
        "pattern=x",
        "disk=yes",
        "idle=no",
        "verify=-1",
        "stat=1",
        "slow=1000001",
        "tsc_khz=0",
        "fill=x",
        "heartbeat=1s",
        "corrupt=",
    ] {
        assert_eq!(parse(word), Err(Problem::BadValue(word)));
    }
}
