//! Which dirty bitmaps go along with the guest, and what they are called on the way (QEMU's `block-bitmap-mapping`). The source names disks
//! and bitmaps by aliases, which the destination translates to its own names; without a mapping every bitmap goes under its own name.

use serde::{Deserialize, Serialize};

use crate::block::dirty_bitmap::MAX_NAME;

/// Longest alias in bytes, as in QEMU, where a byte holds its length.
const MAX_ALIAS: usize = 255;

/// What happens to the bitmaps of one disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct NodeMapping {
    /// The disk's id here.
    pub node_name: String,
    /// Its name on the way.
    pub alias: String,
    /// Those of its bitmaps that go along.
    pub bitmaps: Vec<BitmapAlias>,
}

/// What happens to one bitmap.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BitmapAlias {
    /// Its name here.
    pub name: String,
    /// Its name on the way.
    pub alias: String,
    /// What else is to be different when it arrives; for the side that receives it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub transform: Option<BitmapTransform>,
}

/// What a bitmap is to be like where it arrives.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
pub struct BitmapTransform {
    /// Whether it outlives the guest there; as at the source if this is absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub persistent: Option<bool>,
}

/// A disk's bitmap under the names of one side.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BitmapName {
    /// The disk.
    pub disk: String,
    /// The bitmap.
    pub name: String,
    /// What is to be different.
    pub transform: BitmapTransform,
}

/// Which bitmaps go along under what names; `default` is all of them under their own.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BitmapMapping(Option<Vec<NodeMapping>>);

impl BitmapMapping {
    /// Only what `nodes` name. An error where a name comes twice or is no name.
    pub fn new(nodes: Vec<NodeMapping>) -> Result<Self, String> {
        unique("node-name", nodes.iter().map(|node| &node.node_name), MAX_NAME)?;
        unique("alias", nodes.iter().map(|node| &node.alias), MAX_ALIAS)?;
        for NodeMapping { node_name, bitmaps, .. } in &nodes {
            let of_node = |error| format!("{error} among the bitmaps of '{node_name}'");
            unique("name", bitmaps.iter().map(|bitmap| &bitmap.name), MAX_NAME).map_err(of_node)?;
            unique("alias", bitmaps.iter().map(|bitmap| &bitmap.alias), MAX_ALIAS).map_err(of_node)?;
        }
        Ok(BitmapMapping(Some(nodes)))
    }

    /// Whether every bitmap goes along under its own name.
    pub fn is_default(&self) -> bool {
        self.0.is_none()
    }

    /// No bitmap goes along.
    pub fn none() -> Self {
        BitmapMapping(Some(Vec::new()))
    }

    /// What a bitmap of this side is called on the way; nothing if it stays here.
    pub fn outgoing(&self, disk: &str, bitmap: &str) -> Option<BitmapName> {
        let Some(nodes) = &self.0 else { return Some(BitmapName::same(disk, bitmap)) };
        let node = nodes.iter().find(|node| node.node_name == disk)?;
        let found = node.bitmaps.iter().find(|known| known.name == bitmap)?;
        Some(BitmapName { disk: node.alias.clone(), name: found.alias.clone(), transform: BitmapTransform::default() })
    }

    /// What a bitmap that comes under these names is called here. An error if it is not expected.
    pub fn incoming(&self, disk: &str, bitmap: &str) -> Result<BitmapName, String> {
        let Some(nodes) = &self.0 else { return Ok(BitmapName::same(disk, bitmap)) };
        let node = nodes.iter().find(|node| node.alias == disk).ok_or_else(|| format!("no disk is mapped to the alias '{disk}' here"))?;
        let found = node.bitmaps.iter().find(|known| known.alias == bitmap);
        let found = found.ok_or_else(|| format!("no bitmap of disk {} is mapped to the alias '{bitmap}' here", node.node_name))?;
        Ok(BitmapName { disk: node.node_name.clone(), name: found.name.clone(), transform: found.transform.unwrap_or_default() })
    }
}

impl BitmapName {
    fn same(disk: &str, name: &str) -> Self {
        BitmapName { disk: disk.into(), name: name.into(), transform: BitmapTransform::default() }
    }
}

fn unique<'a>(what: &str, names: impl Iterator<Item = &'a String>, longest: usize) -> Result<(), String> {
    let mut seen = std::collections::HashSet::new();
    for name in names {
        if name.is_empty() || name.len() > longest {
            return Err(format!("parameter 'block-bitmap-mapping': a {what} has 1 to {longest} bytes, not {}", name.len()));
        }
        if !seen.insert(name) {
            return Err(format!("parameter 'block-bitmap-mapping': the {what} '{name}' is used twice"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bitmap(name: &str, alias: &str) -> BitmapAlias {
        BitmapAlias { name: name.into(), alias: alias.into(), transform: None }
    }

    fn node(name: &str, alias: &str, bitmaps: Vec<BitmapAlias>) -> NodeMapping {
        NodeMapping { node_name: name.into(), alias: alias.into(), bitmaps }
    }

    #[test]
    fn without_a_mapping_names_stay_as_they_are() {
        let mapping = BitmapMapping::default();
        assert_eq!(mapping.outgoing("d", "b"), Some(BitmapName::same("d", "b")));
        assert_eq!(mapping.incoming("d", "b"), Ok(BitmapName::same("d", "b")));
        assert_eq!(BitmapMapping::none().outgoing("d", "b"), None);
    }

    #[test]
    fn aliases_lead_from_one_side_s_names_to_the_other_s() {
        let here = BitmapMapping::new(vec![node("root", "r", vec![bitmap("daily", "d")]), node("data", "x", vec![])]).unwrap();
        let mut renamed = bitmap("weekly", "d");
        renamed.transform = Some(BitmapTransform { persistent: Some(true) });
        let there = BitmapMapping::new(vec![node("vda", "r", vec![renamed])]).unwrap();
        let name = here.outgoing("root", "daily").unwrap();
        assert_eq!((name.disk.as_str(), name.name.as_str()), ("r", "d"));
        let name = there.incoming(&name.disk, &name.name).unwrap();
        assert_eq!((name.disk.as_str(), name.name.as_str(), name.transform.persistent), ("vda", "weekly", Some(true)));
        for (disk, bitmap) in [("root", "other"), ("data", "daily"), ("swap", "daily")] {
            assert_eq!(here.outgoing(disk, bitmap), None);
        }
        assert!(there.incoming("x", "d").unwrap_err().contains("alias 'x'"));
        assert!(there.incoming("r", "e").unwrap_err().contains("alias 'e'"));
    }

    #[test]
    fn ambiguous_names_are_refused() {
        for nodes in [
            vec![node("a", "x", vec![]), node("a", "y", vec![])],
            vec![node("a", "x", vec![]), node("b", "x", vec![])],
            vec![node("a", "x", vec![bitmap("b", "c"), bitmap("b", "d")])],
            vec![node("a", "x", vec![bitmap("b", "d"), bitmap("c", "d")])],
            vec![node("a", "", vec![])],
            vec![node("a", &"x".repeat(256), vec![])],
        ] {
            let error = BitmapMapping::new(nodes).unwrap_err();
            assert!(error.contains("twice") || error.contains("1 to 255"), "{error}");
        }
    }
}
