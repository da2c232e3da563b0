//! Compression of pages, and whether it pays.

use thiserror::Error;

use super::wire::Method;

/// Zstandard's level. The lowest of the ordinary ones: pages are many, and the guest dirties them again meanwhile.
const ZSTD_LEVEL: i32 = 1;

/// What came does not decompress.
#[derive(Clone, Copy, Debug, Error, PartialEq, Eq)]
#[error("its contents do not decompress to its length")]
pub struct Malformed;

/// Compresses pages by one method. Keeps what the method needs between two calls.
pub struct Compressor {
    method: Method,
    zstd: Option<zstd::bulk::Compressor<'static>>,
    output: Vec<u8>,
}

impl Compressor {
    /// A compressor by `method`; nothing where there is no memory for it.
    pub fn new(method: Method) -> Option<Self> {
        let zstd = match method {
            Method::Lz4 => None,
            Method::Zstd => Some(zstd::bulk::Compressor::new(ZSTD_LEVEL).ok()?),
        };
        Some(Compressor { method, zstd, output: Vec::new() })
    }

    /// How it compresses.
    pub fn method(&self) -> Method {
        self.method
    }

    /// `contents` compressed; nothing where that would be no shorter.
    pub fn compress(&mut self, contents: &[u8]) -> Option<&[u8]> {
        // Room for what is not worth it, without which LZ4 does not begin.
        self.output.resize(lz4_flex::block::get_maximum_output_size(contents.len()), 0);
        let length = match &mut self.zstd {
            None => lz4_flex::block::compress_into(contents, &mut self.output).ok()?,
            Some(zstd) => zstd.compress_to_buffer(contents, &mut self.output[..]).ok()?,
        };
        self.output.get(..length).filter(|output| output.len() < contents.len())
    }
}

/// Decompresses what any [`Compressor`] has made.
#[derive(Default)]
pub struct Decompressor {
    zstd: Option<zstd::bulk::Decompressor<'static>>,
}

impl Decompressor {
    /// Fills `into` with what `compressed` holds, if it is exactly as long.
    pub fn decompress(&mut self, method: Method, compressed: &[u8], into: &mut [u8]) -> Result<(), Malformed> {
        let length = match method {
            Method::Lz4 => lz4_flex::block::decompress_into(compressed, into).map_err(|_| Malformed)?,
            Method::Zstd => {
                let zstd = match &mut self.zstd {
                    Some(zstd) => zstd,
                    none => none.insert(zstd::bulk::Decompressor::new().map_err(|_| Malformed)?),
                };
                zstd.decompress_to_buffer(compressed, into).map_err(|_| Malformed)?
            }
        };
        if length == into.len() { Ok(()) } else { Err(Malformed) }
    }
}

/// How much of the past counts when the next batch does.
const MEMORY: f64 = 0.5;
/// After so many batches the other way is tried again; after each time that it pays less, twice as many, up to a limit. A busy host makes
/// either look bad for a moment.
const PROBE: u32 = 4;
const MAX_PROBE: u32 = 32;
/// At first both ways take turns for so many batches: the first of each is no measure, because memory for it is being touched.
const TURNS: u32 = 8;

/// Which of two ways to send pages takes less time, by trying both: what a batch costs on its way through processor, link and destination
/// shows in how long it took.
#[derive(Clone, Copy, Debug)]
pub struct Payoff {
    batches: u32,
    /// What pays, as things are.
    compresses: bool,
    /// Batches until the other way is tried, and how many that are each time.
    probe_in: u32,
    interval: u32,
    plain: Cost,
    compressed: Cost,
}

impl Default for Payoff {
    fn default() -> Self {
        let (plain, compressed) = (Cost::default(), Cost::default());
        Payoff { batches: 0, compresses: true, probe_in: PROBE, interval: PROBE, plain, compressed }
    }
}

/// Seconds and bytes of contents, the past fading.
#[derive(Clone, Copy, Debug, Default)]
struct Cost {
    seconds: f64,
    bytes: f64,
}

impl Cost {
    fn add(&mut self, seconds: f64, bytes: u64) {
        self.seconds = self.seconds * MEMORY + seconds;
        self.bytes = self.bytes * MEMORY + bytes as f64;
    }

    /// Seconds a byte; zero where nothing is known.
    fn rate(self) -> f64 {
        if self.bytes > 0.0 { self.seconds / self.bytes } else { 0.0 }
    }
}

impl Payoff {
    /// Whether the next batch is to be compressed.
    pub fn is_to_compress(&mut self) -> bool {
        self.batches = self.batches.wrapping_add(1);
        if self.batches <= TURNS {
            return self.batches.is_multiple_of(2);
        }
        let compresses = self.compressed.rate() <= self.plain.rate();
        if compresses != self.compresses {
            (self.compresses, self.interval, self.probe_in) = (compresses, PROBE, PROBE);
        }
        self.probe_in -= 1;
        if self.probe_in > 0 {
            return compresses;
        }
        self.interval = (self.interval * 2).min(MAX_PROBE);
        self.probe_in = self.interval;
        !compresses
    }

    /// A batch of `bytes` of contents took `seconds`.
    pub fn observe(&mut self, was_compressed: bool, bytes: u64, seconds: f64) {
        let cost = if was_compressed { &mut self.compressed } else { &mut self.plain };
        cost.add(seconds, bytes);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const METHODS: [Method; 2] = [Method::Lz4, Method::Zstd];

    /// Pages of which `noise` in a hundred bytes cannot be foretold.
    fn contents(length: usize, noise: u64) -> Vec<u8> {
        let mut state = 7u64;
        (0..length)
            .map(|index| {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                if (state >> 33) % 100 < noise { (state >> 40) as u8 } else { index as u8 & 7 }
            })
            .collect()
    }

    #[test]
    fn what_was_compressed_comes_back_and_what_would_not_be_shorter_is_left() {
        for method in METHODS {
            let (mut compressor, mut decompressor) = (Compressor::new(method).unwrap(), Decompressor::default());
            for length in [4096, 64 << 10, 2 << 20] {
                let contents = contents(length, 10);
                let compressed = compressor.compress(&contents).unwrap().to_vec();
                assert!(compressed.len() < length / 2, "{method:?}: {} of {length}", compressed.len());
                let mut back = vec![1; length];
                decompressor.decompress(method, &compressed, &mut back).unwrap();
                assert_eq!(back, contents);
                for wrong in [length - 1, length + 1] {
                    assert_eq!(decompressor.decompress(method, &compressed, &mut vec![0; wrong]), Err(Malformed));
                }
            }
            assert_eq!(compressor.compress(&contents(64 << 10, 100)), None, "{method:?}");
        }
    }

    proptest! {
        #[test]
        fn nonsense_is_refused_and_harms_nobody(bytes in prop::collection::vec(any::<u8>(), 0..5000)) {
            for method in METHODS {
                let _ = Decompressor::default().decompress(method, &bytes, &mut vec![0; 4096]);
            }
        }
    }

    /// What a thousand batches of 1 MB take over a link of `link` MB/s if compressing goes at `speed` MB/s to `ratio`, beside what they
    /// would take without, and with all compressed.
    fn times(link: f64, speed: f64, ratio: f64) -> (f64, f64, f64) {
        let mut payoff = Payoff::default();
        let (plain, compressed) = (1.0 / link, 1.0 / speed + ratio / link);
        let mut total = 0.0;
        for _ in 0..1000 {
            let compress = payoff.is_to_compress();
            let seconds = if compress { compressed } else { plain };
            payoff.observe(compress, 1_000_000, seconds);
            total += seconds;
        }
        (total, 1000.0 * plain, 1000.0 * compressed)
    }

    #[test]
    fn compression_is_left_off_where_it_does_not_pay() {
        for (link, speed, ratio) in
            [(100.0, 500.0, 0.4), (3000.0, 500.0, 0.4), (100.0, 500.0, 1.0), (10.0, 100.0, 0.1), (400.0, 600.0, 0.5)]
        {
            let (total, plain, compressed) = times(link, speed, ratio);
            let (best, worst) = (plain.min(compressed), plain.max(compressed));
            assert!(total <= best + (worst - best) / 25.0, "{link} {speed} {ratio}: {total} of {best}");
        }
    }

    #[test]
    fn a_slow_beginning_is_forgotten() {
        let mut payoff = Payoff::default();
        let mut first = true;
        let compressed = (0..40).filter(|_| {
            let compress = payoff.is_to_compress();
            // Twenty times as long as any other, which takes a fourth of what it takes without.
            let seconds = if !compress {
                0.02
            } else if std::mem::take(&mut first) {
                0.1
            } else {
                0.005
            };
            payoff.observe(compress, 1_000_000, seconds);
            compress
        });
        assert!(compressed.count() > 30);
    }

    #[test]
    fn a_link_that_changes_changes_the_choice() {
        let mut payoff = Payoff::default();
        let mut choose = |link: f64| {
            let mut compressed = 0;
            for batch in 0..400 {
                let compress = payoff.is_to_compress();
                payoff.observe(compress, 1_000_000, if compress { 0.002 + 0.5 / link } else { 1.0 / link });
                compressed += u32::from(compress && batch >= 200);
            }
            compressed
        };
        assert!(choose(2000.0) < 20);
        assert!(choose(50.0) > 180);
        assert!(choose(2000.0) < 20);
    }
}
