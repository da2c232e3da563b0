//! Backups of disks as files: full ones, which are plain sparse images, and incremental ones, which say what to change in the backup before.
//!
//! | file | concern |
//! |---|---|
//! | `id` | what tells one backup from another, so that a chain has no wrong link |
//! | `incremental` | the format of an incremental backup |
//! | `sparse` | a new file that appears only when it is whole, without blocks of zeros |
//! | `restore` | a full backup and its incremental ones made an image again |

pub mod id;
pub mod incremental;
pub mod restore;
pub mod sparse;

#[cfg(test)]
mod tests;
