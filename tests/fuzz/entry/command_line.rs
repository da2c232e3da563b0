//! Arguments, one a line, and the addresses and serial targets among them that also come from elsewhere.

use ferry::cli::serial::SerialTarget;
use ferry::migrate::transport::Address;

pub fn run(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = ferry::cli::check(std::iter::once("ferry").chain(text.split('\n')).map(Into::into));
    for line in text.split('\n') {
        let _ = line.parse::<SerialTarget>();
        if let Ok(address) = line.parse::<Address>() {
            assert_eq!(address.to_string().parse(), Ok(address));
        }
    }
}
