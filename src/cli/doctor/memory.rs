//! How the host backs memory.

use super::Check;
use crate::memory::hugetlb::{COUNTS, Pool};

const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

pub(super) fn checks() -> Vec<Check> {
    let setting = std::fs::read_to_string(HUGE_PAGES);
    vec![huge_pages(setting.as_deref().unwrap_or("[never]")), hugetlb(Pool::read())]
}

fn huge_pages(setting: &str) -> Check {
    const NAME: &str = "transparent huge pages";
    let chosen = setting.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']')).unwrap_or("never");
    match chosen {
        "always" | "madvise" => Check::yes(NAME, chosen),
        _ => Check::no(NAME, chosen, format!("`echo madvise > {HUGE_PAGES}` as root makes guests faster")),
    }
}

fn hugetlb(pool: Option<Pool>) -> Check {
    const NAME: &str = "hugetlb pages of 2 MiB";
    match pool {
        Some(Pool { total, free }) if free > 0 => Check::yes(NAME, format!("{free} of {total} free: up to {} MiB", free * 2)),
        Some(Pool { total, .. }) => {
            let advice = format!("`echo N > {COUNTS}/nr_hugepages` as root sets N aside, for guests with --memory SIZE,hugepages=2M");
            Check::no(NAME, format!("0 of {total} free"), advice)
        }
        None => Check::no(NAME, "absent", "guests with --memory SIZE,hugepages=2M need a kernel with CONFIG_HUGETLBFS"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chosen_setting_is_the_one_in_brackets() {
        assert!(huge_pages("always [madvise] never\n").ok);
        assert!(!huge_pages("always madvise [never]\n").ok);
        assert!(!huge_pages("").ok);
    }

    #[test]
    fn hugetlb_pages_count_if_they_are_free() {
        let some = hugetlb(Some(Pool { total: 300, free: 256 }));
        assert!(some.ok && some.found.contains("512 MiB"), "{some:?}");
        assert!(!hugetlb(Some(Pool { total: 300, free: 0 })).ok);
        assert!(!hugetlb(None).ok);
    }
}
