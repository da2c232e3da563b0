use super::*;

const BODIES: [Body; 2] = [Body::Compressible, Body::Random];

fn stamp(number: u64, generation: u32) -> Stamp {
    Stamp {
        magic: PAGE_MAGIC,
        number,
        generation,
    }
}

fn page(stamp: Stamp, body: Body) -> Words {
    let mut words = [0xdead; WORDS];
    write(&mut words, stamp, body);
    words
}

#[test]
fn a_written_page_checks_and_carries_its_checksum() {
    for body in BODIES {
        let words = page(stamp(7, 3), body);
        assert_eq!(check(&words, stamp(7, 3), body), Ok(()));
        assert_eq!(words[2], checksum(&words));
    }
}

#[test]
fn every_flipped_bit_is_noticed_where_it_is() {
    for body in BODIES {
        let good = page(stamp(7, 3), body);
        for bit in 0..PAGE_SIZE * 8 {
            let mut words = good;
            words[bit / 64] ^= 1 << (bit % 64);
            let damage = check(&words, stamp(7, 3), body).unwrap_err();
            assert_eq!(
                damage,
                Damage::Torn {
                    offset: bit / 64 * 8
                }
            );
        }
    }
}

#[test]
fn whole_pages_that_are_not_the_expected_one_are_named() {
    for body in BODIES {
        let words = page(stamp(7, 3), body);
        assert_eq!(
            check(&words, stamp(7, 4), body),
            Err(Damage::Stale { found: 3 })
        );
        assert_eq!(
            check(&words, stamp(7, 2), body),
            Err(Damage::Ahead { found: 3 })
        );
        assert_eq!(
            check(&words, stamp(8, 3), body),
            Err(Damage::Number { found: 7 })
        );
        let other = Stamp {
            magic: DISK_MAGIC,
            ..stamp(7, 3)
        };
        assert_eq!(
            check(&words, other, body),
            Err(Damage::Magic { found: PAGE_MAGIC })
        );
        assert_eq!(check(&[0; WORDS], stamp(7, 3), body), Err(Damage::Zeroed));
    }
}

#[test]
fn two_generations_in_one_page_are_torn_at_the_seam() {
    for body in BODIES {
        let (old, new) = (page(stamp(7, 3), body), page(stamp(7, 4), body));
        let mut words = new;
        words[100..].copy_from_slice(&old[100..]);
        assert_eq!(
            check(&words, stamp(7, 4), body),
            Err(Damage::Torn { offset: 800 })
        );
        // The old header on a new body, too.
        let mut words = new;
        words[..4].copy_from_slice(&old[..4]);
        assert_eq!(
            check(&words, stamp(7, 4), body),
            Err(Damage::Torn { offset: 8 })
        );
    }
}

#[test]
fn zero_pages() {
    let mut words = [0; WORDS];
    assert_eq!(check_zero(&words), Ok(()));
    words[511] = 1;
    assert_eq!(check_zero(&words), Err(Damage::NotZero { offset: 4088 }));
}

#[test]
fn compressible_repeats_and_random_does_not() {
    let words = page(stamp(1, 1), Body::Compressible);
    assert_eq!(words[8..16], words[504..512]);
    let mut words = page(stamp(7, 3), Body::Random);
    words.sort_unstable();
    assert!(words.windows(2).all(|pair| pair[0] != pair[1]));
}
