//! What the kernel's command line asks for.

use std::path::Path;
use std::time::Duration;

/// The `agent.*` keys of the kernel's command line.
#[derive(Debug, PartialEq, Eq)]
pub struct Options {
    /// `agent.memory=MIB`: memory to fill, dirty and check; 0 for none. Default 64.
    pub memory_mib: usize,
    /// `agent.threads=N`: threads that share that memory out among them. Default 1.
    pub threads: usize,
    /// `agent.rate=PAGES`: pages of 4 KiB dirtied a second, by all threads together; 0 for as many as
    /// possible. Default 2000.
    pub rate: u64,
    /// `agent.disk=DEVICE|off`: block device with an ext4 file system. Default /dev/vda where it exists.
    pub disk: Option<String>,
    /// `agent.run=SECONDS`: end by itself after that time. Default: until asked to.
    pub run: Option<Duration>,
}

impl Options {
    /// Reads the keys from `command_line`; the error names the key that is wrong.
    pub fn parse(command_line: &str) -> Result<Self, String> {
        let mut options = Options {
            memory_mib: 64,
            threads: 1,
            rate: 2000,
            disk: Path::new("/dev/vda").exists().then(|| "/dev/vda".to_owned()),
            run: None,
        };
        for word in command_line.split_whitespace() {
            let Some(setting) = word.strip_prefix("agent.") else {
                continue;
            };
            let (key, value) = setting.split_once('=').unwrap_or((setting, ""));
            let number = || {
                value
                    .parse::<u32>()
                    .map_err(|_| format!("{word}: the value is not a number"))
            };
            match key {
                "memory" => options.memory_mib = number()? as usize,
                "threads" => options.threads = (number()? as usize).max(1),
                "rate" => options.rate = u64::from(number()?),
                "disk" if value == "off" => options.disk = None,
                "disk" => options.disk = Some(value.to_owned()),
                "run" => options.run = Some(Duration::from_secs(u64::from(number()?))),
                _ => return Err(format!("{word}: no such key")),
            }
        }
        Ok(options)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_its_own_keys_and_leaves_the_kernels() {
        let options =
            Options::parse("console=ttyS0 agent.memory=8 agent.rate=0 agent.disk=off agent.run=3 quiet\n")
                .unwrap();
        assert_eq!(
            options,
            Options {
                memory_mib: 8,
                threads: 1,
                rate: 0,
                disk: None,
                run: Some(Duration::from_secs(3))
            }
        );
    }

    #[test]
    fn names_the_key_that_is_wrong() {
        assert!(Options::parse("agent.memory=lots")
            .unwrap_err()
            .contains("agent.memory=lots"));
        assert!(Options::parse("agent.memroy=1")
            .unwrap_err()
            .contains("agent.memroy"));
    }
}
