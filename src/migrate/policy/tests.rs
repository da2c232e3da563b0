use super::*;

fn measured(mode: Mode) -> Measured {
    Measured {
        mode,
        downtime_limit: Duration::from_millis(50),
        pass: 2,
        sent_pages: 100_000,
        remaining_pages: 50_000,
        bandwidth: Some(1e9),
        postcopy_requested: false,
    }
}

#[test]
fn a_rest_that_fits_the_limit_is_sent_with_the_guest_stopped() {
    for mode in [Mode::Auto, Mode::Precopy] {
        let (decision, reason) = decide(&Measured { remaining_pages: 10_000, ..measured(mode) });
        assert_eq!(decision, Decision::SwitchPrecopy, "{reason}");
    }
}

#[test]
fn auto_goes_on_while_passes_help_and_then_leaves_the_rest_to_postcopy() {
    assert_eq!(decide(&measured(Mode::Auto)).0, Decision::AnotherPass);
    let (decision, reason) = decide(&Measured { remaining_pages: 90_000, ..measured(Mode::Auto) });
    assert_eq!(decision, Decision::SwitchPostcopy);
    assert!(reason.contains("MB/s") && reason.contains("50 ms"), "{reason}");
}

#[test]
fn precopy_never_switches_to_postcopy() {
    for remaining_pages in [50_000, 90_000, 1_000_000] {
        for postcopy_requested in [false, true] {
            let (decision, _) = decide(&Measured { remaining_pages, postcopy_requested, ..measured(Mode::Precopy) });
            assert_eq!(decision, Decision::AnotherPass);
        }
    }
}

#[test]
fn a_persons_word_counts_at_once() {
    assert_eq!(decide(&measured(Mode::Postcopy)).0, Decision::SwitchPostcopy);
    assert_eq!(decide(&Measured { postcopy_requested: true, ..measured(Mode::Auto) }).0, Decision::SwitchPostcopy);
}

#[test]
fn without_a_measurement_a_slow_link_is_assumed() {
    assert!(expected_downtime(100_000, None) > Duration::from_secs(1));
    assert!(expected_downtime(0, None) < Duration::from_millis(10));
}
