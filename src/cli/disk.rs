//! `--disk path=P,id=ID[,readonly=on][,cache=none][,discard=ignore][,werror=stop][,rerror=stop]`.

use std::path::PathBuf;

use crate::vm::config::{CacheMode, DiscardMode, DiskConfig, DiskOptions, ReadErrorAction, WriteErrorAction};

/// Reads a disk of `ferry run`.
pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let mut pairs = Pairs::parse(text)?;
    let readonly = pairs.choice("readonly", &[("off", false), ("on", true)])?;
    let options = DiskOptions {
        cache: pairs.choice("cache", &[("writeback", CacheMode::Writeback), ("none", CacheMode::None)])?,
        discard: pairs.choice("discard", &[("unmap", DiscardMode::Unmap), ("ignore", DiscardMode::Ignore)])?,
        werror: pairs.choice(
            "werror",
            &[("enospc", WriteErrorAction::Enospc), ("report", WriteErrorAction::Report), ("stop", WriteErrorAction::Stop)],
        )?,
        rerror: pairs.choice("rerror", &[("report", ReadErrorAction::Report), ("stop", ReadErrorAction::Stop)])?,
    };
    let (id, path) = pairs.id_and_path()?;
    Ok(DiskConfig { id, path, readonly, options })
}

/// Reads a disk of `ferry receive`.
pub(super) fn parse_mapping(text: &str) -> Result<(String, PathBuf), String> {
    let pairs = Pairs::parse(text)?;
    if let Some((key, _)) = pairs.0.iter().find(|(key, _)| !matches!(*key, "path" | "id")) {
        return Err(format!("a disk's {key} comes from the source; give id and path"));
    }
    pairs.id_and_path()
}

/// An id that comes twice, if there is one.
pub(super) fn duplicate<'a>(ids: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = std::collections::HashSet::new();
    ids.into_iter().find(|id| !seen.insert(*id))
}

/// What a disk has.
const KEYS: [&str; 7] = ["path", "id", "readonly", "cache", "discard", "werror", "rerror"];

struct Pairs(Vec<(&'static str, String)>);

impl Pairs {
    fn parse(text: &str) -> Result<Self, String> {
        let mut pairs: Vec<(&'static str, String)> = Vec::new();
        for pair in split_at_single_commas(text) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("'{pair}' is not KEY=VALUE"))?;
            let known = KEYS.iter().find(|known| **known == key);
            let key = known.ok_or_else(|| format!("a disk has {}, not '{key}'", KEYS.join(", ")))?;
            if pairs.iter().any(|(other, _)| other == key) {
                return Err(format!("'{key}' is given twice"));
            }
            pairs.push((key, value.to_string()));
        }
        Ok(Pairs(pairs))
    }

    fn take(&mut self, key: &str) -> Option<String> {
        let index = self.0.iter().position(|(other, _)| *other == key)?;
        Some(self.0.swap_remove(index).1)
    }

    /// The value that the key's word stands for; without one, the default.
    fn choice<T: Copy + Default>(&mut self, key: &str, choices: &[(&str, T)]) -> Result<T, String> {
        let Some(given) = self.take(key) else { return Ok(T::default()) };
        let found = choices.iter().find(|(word, _)| *word == given).map(|(_, value)| *value);
        found.ok_or_else(|| {
            let words: Vec<_> = choices.iter().map(|(word, _)| *word).collect();
            format!("{key} is {}, not '{given}'", words.join(" or "))
        })
    }

    fn id_and_path(mut self) -> Result<(String, PathBuf), String> {
        let path = self.take("path").filter(|path| !path.is_empty()).ok_or("the path is missing: path=FILE")?;
        let id = self.take("id").ok_or("the id is missing: id=NAME")?;
        if !DiskConfig::is_id(&id) {
            let longest = DiskConfig::MAX_ID;
            return Err(format!("an id has 1 to {longest} letters, digits, '-', '_' or '.', unlike '{id}'"));
        }
        Ok((id, path.into()))
    }
}

/// Splits at commas; two in a row stand for one that belongs to the value, as in QEMU.
fn split_at_single_commas(text: &str) -> Vec<String> {
    let mut parts = vec![String::new()];
    let mut characters = text.chars().peekable();
    while let Some(character) = characters.next() {
        if character == ',' && characters.next_if_eq(&',').is_none() {
            parts.push(String::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(character);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn keys_come_in_any_order() {
        let disk = DiskConfig { id: "root".into(), path: "/a b=c".into(), readonly: true, options: Default::default() };
        assert_eq!(parse_disk("readonly=on,path=/a b=c,id=root"), Ok(disk));
        assert_eq!(parse_mapping("id=x,path=y"), Ok(("x".into(), "y".into())));
        let disk = parse_disk("path=x,rerror=stop,id=y,cache=none,werror=report,discard=ignore").unwrap();
        let DiskOptions { cache, discard, werror, rerror } = disk.options;
        assert_eq!((cache, discard), (CacheMode::None, DiscardMode::Ignore));
        assert_eq!((werror, rerror), (WriteErrorAction::Report, ReadErrorAction::Stop));
    }

    #[test]
    fn malformed_disks_say_what_is_wrong() {
        let bad = [
            ("", "not KEY=VALUE"),
            ("disk.img", "not KEY=VALUE"),
            ("path=x", "id is missing"),
            ("id=x", "path is missing"),
            ("path=,id=x", "path is missing"),
            ("path=x,id=", "1 to 20"),
            ("path=x,id=a/b", "1 to 20"),
            ("path=x,id=a-name-that-is-too-long", "1 to 20"),
            ("path=x,id=y,id=z", "twice"),
            ("path=x,id=y,readonly=yes", "off or on, not 'yes'"),
            ("path=x,id=y,cache=unsafe", "writeback or none, not 'unsafe'"),
            ("path=x,id=y,werror=ignore", "enospc or report or stop"),
            ("path=x,id=y,aio=native", "'aio'"),
            ("path=x,id=y,", "not KEY=VALUE"),
        ];
        for (text, expected) in bad {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse_mapping("id=x,path=y,cache=none").unwrap_err().contains("cache comes from the source"));
        assert_eq!(duplicate(["a", "b", "a"].into_iter()), Some("a"));
    }

    proptest! {
        #[test]
        fn any_path_can_be_written(path in "\\PC+") {
            let text = format!("id=x,path={}", path.replace(',', ",,"));
            prop_assert_eq!(parse_mapping(&text), Ok(("x".to_string(), path.into())));
        }

        #[test]
        fn any_text_is_survived(text in "((path|id|readonly|cache)=)?\\PC*") {
            let _ = parse_disk(&text);
        }
    }
}
