//! Ctrl-A, with which a person at the console speaks to Ferry instead of the guest. The keys are QEMU's.

const CTRL_A: u8 = 1;

/// What Ctrl-A H shows.
pub(super) const HELP: &str = "\r\nCtrl-A X       end the guest\r\nCtrl-A H       this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n";

/// What a byte from the keyboard is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Input {
    /// For the guest.
    Guest(u8),
    /// End the guest.
    Quit,
    /// Show help.
    Help,
    /// The first half of one of them, or an unknown one.
    Nothing,
}

/// Remembers whether the last byte was Ctrl-A.
#[derive(Debug, Default)]
pub(super) struct Escape {
    pending: bool,
}

impl Escape {
    pub fn push(&mut self, byte: u8) -> Input {
        if !std::mem::take(&mut self.pending) {
            self.pending = byte == CTRL_A;
            return if self.pending { Input::Nothing } else { Input::Guest(byte) };
        }
        match byte {
            b'x' | b'X' => Input::Quit,
            b'h' | b'H' | b'?' => Input::Help,
            CTRL_A => Input::Guest(CTRL_A),
            _ => Input::Nothing,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ctrl_a_takes_the_next_key() {
        let mut escape = Escape::default();
        let inputs: Vec<_> = b"a\x01\x01x\x01zb\x01h\x01X".iter().map(|byte| escape.push(*byte)).collect();
        use Input::*;
        let expected = [Guest(b'a'), Nothing, Guest(1), Guest(b'x'), Nothing, Nothing, Guest(b'b'), Nothing, Help, Nothing, Quit];
        assert_eq!(inputs, expected);
    }
}
