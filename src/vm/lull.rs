//! The moment at which a guest goes to sleep: the best one to stop it. What it waits for, most often its timer, is then as far away as it
//! will ever be, and a blackout that is over by then it does not notice at all; and it stands in no burst of work that would fault its way
//! through a memory that has not come yet. KVM tells who sleeps among its statistics (kernel document virt/kvm/api, KVM_GET_STATS_FD).

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvm_bindings::{KVMIO, kvm_stats_desc, kvm_stats_header};
use kvm_ioctls::VcpuFd;
use zerocopy::IntoBytes;

const KVM_GET_STATS_FD: libc::c_ulong = rustix::ioctl::opcode::none(KVMIO as u8, 0xce) as libc::c_ulong;
const _: () = assert!(size_of::<kvm_stats_header>() == 24 && size_of::<kvm_stats_desc>() == 16);

/// 1 while a vCPU is blocked in HLT, since Linux 5.17.
const BLOCKING: &[u8] = b"blocking";
/// How often it has executed HLT.
const HALTS: &[u8] = b"halt_exits";
/// Far more than any kernel has: a bound for what is read here.
const MAX_STATISTICS: u32 = 4096;
const MAX_NAME: u32 = 256;
/// Longest that a lull is waited for: a little more than the time between two ticks of the busiest usual timer. A guest that sleeps all that
/// time sleeps deeply, and one that never does has no better moment.
const PATIENCE: Duration = Duration::from_micros(1200);

/// The statistics of a vCPU.
pub struct Statistics(File);

impl Statistics {
    /// Of `vcpu`; nothing where KVM has none.
    pub fn of(vcpu: &VcpuFd) -> Option<Self> {
        // SAFETY: without an argument, it returns a new descriptor, or -1.
        let descriptor = unsafe { libc::ioctl(vcpu.as_raw_fd(), KVM_GET_STATS_FD) };
        // SAFETY: the descriptor is nobody else's.
        (descriptor >= 0).then(|| Statistics(unsafe { File::from_raw_fd(descriptor) }))
    }

    /// Where the values of these names are: there is a header, then a descriptor with a name for each value, then the values.
    fn places<const N: usize>(&self, names: [&[u8]; N]) -> Option<[u64; N]> {
        let mut header = [0u32; size_of::<kvm_stats_header>() / 4];
        self.0.read_exact_at(header.as_mut_bytes(), 0).ok()?;
        let [_flags, name_size, count, _id, descriptors, values] = header;
        if name_size > MAX_NAME || count > MAX_STATISTICS {
            return None;
        }
        let size = size_of::<kvm_stats_desc>() + name_size as usize;
        let mut all = vec![0; size * count as usize];
        self.0.read_exact_at(&mut all, descriptors.into()).ok()?;
        let place = |wanted: &[u8]| {
            let found = all.chunks_exact(size).find(|descriptor| {
                let name = descriptor.get(size_of::<kvm_stats_desc>()..).unwrap_or_default();
                name.strip_prefix(wanted).is_some_and(|end| end.first() == Some(&0))
            })?;
            // Behind flags (32 bits), exponent and size (16 bits each).
            let offset = found.get(8..12)?.try_into().ok()?;
            Some(u64::from(values) + u64::from(u32::from_ne_bytes(offset)))
        };
        let mut places = [0; N];
        for (to, name) in places.iter_mut().zip(names) {
            *to = place(name)?;
        }
        Some(places)
    }

    fn value(&self, place: u64) -> Option<u64> {
        let mut value = 0u64;
        self.0.read_exact_at(value.as_mut_bytes(), place).ok().map(|()| value)
    }
}

/// For waiting until a guest sleeps. It does not keep the guest.
#[derive(Clone)]
pub struct Lull(Arc<[Statistics]>);

impl Lull {
    /// Of a guest with these vCPUs. Where KVM does not tell of one there is no lull to wait for.
    pub fn of(vcpus: Option<Vec<Statistics>>) -> Self {
        Lull(vcpus.unwrap_or_default().into())
    }

    /// Returns when the last vCPU that was awake goes to sleep, when all sleep deeply, or when neither is to be expected: after a good
    /// millisecond at most. Meanwhile it keeps looking: a pause of its own would outlast the moment.
    pub fn wait(&self) {
        let begin = Instant::now();
        let Some(sleepers) = self.sleepers() else { return };
        let halts = sleepers.halts();
        let mut was_awake = false;
        while begin.elapsed() < PATIENCE {
            let asleep = sleepers.all_sleep();
            // A vCPU that shares this thread's processor is never seen awake: while it runs, nobody looks.
            if asleep && (was_awake || sleepers.halts() != halts) {
                return;
            }
            was_awake |= !asleep;
            std::thread::yield_now();
        }
    }

    /// Nothing where KVM does not tell who sleeps.
    pub(super) fn sleepers(&self) -> Option<Sleepers<'_>> {
        let places = self.0.iter().map(|vcpu| Some((vcpu, vcpu.places([BLOCKING, HALTS])?))).collect::<Option<Vec<_>>>()?;
        (!places.is_empty()).then_some(Sleepers(places))
    }
}

/// All vCPUs, and where the statistics of each have [`BLOCKING`] and [`HALTS`].
pub(super) struct Sleepers<'a>(Vec<(&'a Statistics, [u64; 2])>);

impl Sleepers<'_> {
    /// Whether all vCPUs are in HLT.
    pub fn all_sleep(&self) -> bool {
        self.0.iter().all(|(vcpu, [blocking, _])| vcpu.value(*blocking).is_some_and(|blocking| blocking != 0))
    }

    /// How often they have gone there, all together.
    fn halts(&self) -> u64 {
        self.0.iter().filter_map(|(vcpu, [_, halts])| vcpu.value(*halts)).fold(0, u64::wrapping_add)
    }
}
