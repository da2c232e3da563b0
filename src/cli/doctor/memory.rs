//! How the host backs memory.

use super::Check;

const HUGE_PAGES: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

pub(super) fn checks() -> Vec<Check> {
    let setting = std::fs::read_to_string(HUGE_PAGES);
    vec![huge_pages(setting.as_deref().unwrap_or("[never]"))]
}

fn huge_pages(setting: &str) -> Check {
    const NAME: &str = "transparent huge pages";
    let chosen = setting.split_whitespace().find_map(|word| word.strip_prefix('[')?.strip_suffix(']')).unwrap_or("never");
    match chosen {
        "always" | "madvise" => Check::yes(NAME, chosen),
        _ => Check::no(NAME, chosen, format!("`echo madvise > {HUGE_PAGES}` as root makes guests faster")),
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
}
