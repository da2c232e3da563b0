//! What KVM rests on, the CPU's virtualisation or software; and whether idle processors can be kept awake in a switch.

use std::fs::File;

use super::Check;

const NAME: &str = "virtualisation by the CPU";

pub(super) fn checks() -> Vec<Check> {
    let text = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    vec![check(&text), wake_ups()]
}

fn wake_ups() -> Check {
    let name = "idle processors awake in a switch";
    match File::options().write(true).open("/dev/cpu_dma_latency") {
        Ok(_) => Check::yes(name, "/dev/cpu_dma_latency"),
        Err(error) => {
            let advice = "let Ferry write to it (root may); without it a blackout is longer by some wake-ups";
            Check::no(name, format!("/dev/cpu_dma_latency: {error}"), advice)
        }
    }
}

fn check(cpuinfo: &str) -> Check {
    let flags = cpuinfo.lines().find(|line| line.starts_with("flags")).unwrap_or_default();
    let has = |flag| flags.split_whitespace().any(|word| word == flag);
    if has("vmx") {
        Check::yes(NAME, "Intel VT-x")
    } else if has("svm") {
        Check::yes(NAME, "AMD-V")
    } else {
        let advice =
            "a KVM without it emulates the guest's kernel in software, which Linux guests rarely survive; use a host with VT-x or AMD-V";
        Check::no(NAME, "neither VT-x nor AMD-V", advice)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_are_whole_words() {
        assert!(check("processor : 0\nflags\t\t: fpu vmx sse\n").ok);
        assert!(check("flags : fpu svm\n").ok);
        assert!(!check("flags : fpu svm_lock vmxnet\nmodel name : svm\n").ok);
        assert!(!check("").ok);
    }
}
