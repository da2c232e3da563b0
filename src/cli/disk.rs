//! `--disk path=P,id=ID[,readonly=on]`.

use std::path::PathBuf;

use crate::vm::config::DiskConfig;

/// Reads a disk of `ferry run`.
pub(super) fn parse_disk(text: &str) -> Result<DiskConfig, String> {
    let pairs = Pairs::parse(text)?;
    let readonly = match pairs.readonly.as_deref() {
        None | Some("off") => false,
        Some("on") => true,
        Some(other) => return Err(format!("readonly is on or off, not '{other}'")),
    };
    let (id, path) = pairs.id_and_path()?;
    Ok(DiskConfig { id, path, readonly })
}

/// Reads a disk of `ferry receive`.
pub(super) fn parse_mapping(text: &str) -> Result<(String, PathBuf), String> {
    let pairs = Pairs::parse(text)?;
    if pairs.readonly.is_some() {
        return Err("whether a disk is read-only comes from the source; give id and path".into());
    }
    pairs.id_and_path()
}

/// An id that comes twice, if there is one.
pub(super) fn duplicate<'a>(ids: impl Iterator<Item = &'a str>) -> Option<&'a str> {
    let mut seen = std::collections::HashSet::new();
    ids.into_iter().find(|id| !seen.insert(*id))
}

#[derive(Default)]
struct Pairs {
    path: Option<String>,
    id: Option<String>,
    readonly: Option<String>,
}

impl Pairs {
    fn parse(text: &str) -> Result<Self, String> {
        let mut pairs = Pairs::default();
        for pair in split_at_single_commas(text) {
            let (key, value) = pair.split_once('=').ok_or_else(|| format!("'{pair}' is not KEY=VALUE"))?;
            let slot = match key {
                "path" => &mut pairs.path,
                "id" => &mut pairs.id,
                "readonly" => &mut pairs.readonly,
                _ => return Err(format!("a disk has path, id and readonly, not '{key}'")),
            };
            if slot.replace(value.to_string()).is_some() {
                return Err(format!("'{key}' is given twice"));
            }
        }
        Ok(pairs)
    }

    fn id_and_path(self) -> Result<(String, PathBuf), String> {
        let path = self.path.filter(|path| !path.is_empty()).ok_or("the path is missing: path=FILE")?;
        let id = self.id.ok_or("the id is missing: id=NAME")?;
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
        let disk = DiskConfig { id: "root".into(), path: "/a b=c".into(), readonly: true };
        assert_eq!(parse_disk("readonly=on,path=/a b=c,id=root"), Ok(disk));
        assert_eq!(parse_mapping("id=x,path=y"), Ok(("x".into(), "y".into())));
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
            ("path=x,id=y,readonly=yes", "on or off"),
            ("path=x,id=y,cache=none", "'cache'"),
            ("path=x,id=y,", "not KEY=VALUE"),
        ];
        for (text, expected) in bad {
            let error = parse_disk(text).unwrap_err();
            assert!(error.contains(expected), "{text}: {error}");
        }
        assert!(parse_mapping("id=x,path=y,readonly=on").is_err());
        assert_eq!(duplicate(["a", "b", "a"].into_iter()), Some("a"));
    }

    proptest! {
        #[test]
        fn any_path_can_be_written(path in "\\PC+") {
            let text = format!("id=x,path={}", path.replace(',', ",,"));
            prop_assert_eq!(parse_mapping(&text), Ok(("x".to_string(), path.into())));
        }

        #[test]
        fn any_text_is_survived(text in "((path|id|readonly)=)?\\PC*") {
            let _ = parse_disk(&text);
        }
    }
}
