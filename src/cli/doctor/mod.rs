//! `ferry doctor`: what this host can do, and what to do about what it cannot.

mod cpu;
mod kvm;
mod memory;
mod userfaultfd;

use std::process::ExitCode;

use serde::Serialize;

/// One thing that a host has or has not.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Check {
    /// What was looked at.
    name: &'static str,
    /// Whether Ferry can use it.
    ok: bool,
    /// Whether Ferry cannot do without it.
    needed: bool,
    /// What was found.
    found: String,
    /// What to do, if it is not there.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn yes(name: &'static str, found: impl Into<String>) -> Self {
        Check { name, ok: true, needed: false, found: found.into(), advice: None }
    }

    fn no(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Check { name, ok: false, needed: false, found: found.into(), advice: Some(advice.into()) }
    }

    fn needed(self) -> Self {
        Check { needed: true, ..self }
    }
}

/// Prints all checks. Exit status 0 when everything is there that Ferry needs.
pub(super) fn doctor(json: bool) -> ExitCode {
    let checks: Vec<_> = [kvm::checks(), cpu::checks(), userfaultfd::checks(), memory::checks()].concat();
    if json {
        println!("{}", serde_json::to_string_pretty(&checks).unwrap_or_default());
    } else {
        print!("{}", list(&checks));
    }
    if is_ready(&checks) { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn is_ready(checks: &[Check]) -> bool {
    checks.iter().all(|check| check.ok || !check.needed)
}

fn list(checks: &[Check]) -> String {
    let mut text = String::new();
    for check in checks {
        let verdict = match (check.ok, check.needed) {
            (true, _) => "yes",
            (false, true) => "NO",
            (false, false) => "no",
        };
        text += &format!("{verdict:<4} {:<32} {}\n", check.name, check.found);
        if let Some(advice) = &check.advice {
            text += &format!("     {:<32} -> {advice}\n", "");
        }
    }
    text += match (is_ready(checks), checks.iter().all(|check| check.ok)) {
        (true, true) => "\nThis host can do all that Ferry makes use of.\n",
        (true, false) => "\nThis host can do all that Ferry needs; what says \"no\" would be of use.\n",
        (false, _) => "\nFerry needs what says \"NO\".\n",
    };
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_needed_decides() {
        let yes = Check::yes("kvm", "/dev/kvm").needed();
        let optional = Check::no("dirty ring", "none", "a newer kernel has it");
        let missing = Check::no("irqfd", "none", "use another host").needed();
        assert!(is_ready(&[yes.clone(), optional.clone()]));
        assert!(!is_ready(&[yes.clone(), missing.clone()]));
        let text = list(&[yes, optional, missing]);
        for line in ["yes  kvm", "no   dirty ring", "NO   irqfd", "-> use another host"] {
            assert!(text.contains(line), "{text}");
        }
    }
}
