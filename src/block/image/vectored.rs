//! preadv and pwritev on guest memory.

use std::fs::File;
use std::io::{Error, ErrorKind, Result};
use std::os::fd::AsRawFd;

use vm_memory::VolatileSlice;
use vm_memory::bitmap::BitmapSlice;

/// At most this many pieces go into one call (`IOV_MAX` of Linux).
const MAX_PIECES: usize = 1024;

/// Total length of `slices` in bytes.
pub(super) fn length<B: BitmapSlice>(slices: &[VolatileSlice<B>]) -> Result<u64> {
    let add = |sum: u64, slice: &VolatileSlice<B>| sum.checked_add(slice.len() as u64);
    slices.iter().try_fold(0, add).ok_or(Error::new(ErrorKind::InvalidInput, "the buffers are longer than any image"))
}

/// Reads until `target` is full, and marks each part of it dirty once it was written.
pub(super) fn read_exact_at<B: BitmapSlice>(file: &File, target: &[VolatileSlice<B>], offset: u64) -> Result<()> {
    let done = transfer(target, offset, |pieces, count, at| {
        // SAFETY: the pieces describe guest memory that stays mapped while `target` is borrowed. Nobody has a reference to it: the guest
        // and vm-memory access it as volatile memory.
        unsafe { libc::preadv(file.as_raw_fd(), pieces, count, at) }
    });
    // Only now: a mark that is harvested before the data is there would lose the data.
    for slice in target.iter().filter(|slice| !slice.is_empty()) {
        slice.bitmap().mark_dirty(0, slice.len());
    }
    done
}

/// Writes all of `source`.
pub(super) fn write_all_at<B: BitmapSlice>(file: &File, source: &[VolatileSlice<B>], offset: u64) -> Result<()> {
    transfer(source, offset, |pieces, count, at| {
        // SAFETY: as for reading; the kernel only reads the pieces' memory.
        unsafe { libc::pwritev(file.as_raw_fd(), pieces, count, at) }
    })
}

/// Copies `bytes` to byte `at` of `target` and what follows.
pub(super) fn scatter<B: BitmapSlice>(target: &[VolatileSlice<B>], at: usize, mut bytes: &[u8]) {
    for slice in from(target, at) {
        slice.copy_from(bytes);
        bytes = bytes.get(slice.len()..).unwrap_or_default();
    }
}

/// Fills `bytes` from byte `at` of `source` on.
pub(super) fn gather<B: BitmapSlice>(source: &[VolatileSlice<B>], at: usize, mut bytes: &mut [u8]) {
    for slice in from(source, at) {
        let copied = slice.copy_to(bytes);
        bytes = bytes.get_mut(copied..).unwrap_or_default();
    }
}

/// What `slices` have from byte `at` on.
fn from<'a, 'm, B: BitmapSlice>(
    slices: &'a [VolatileSlice<'m, B>],
    mut at: usize,
) -> impl Iterator<Item = VolatileSlice<'m, B>> + use<'a, 'm, B> {
    slices.iter().filter_map(move |slice| {
        let skipped = at.min(slice.len());
        at -= skipped;
        slice.offset(skipped).ok().filter(|rest| !rest.is_empty())
    })
}

/// Calls `call` until all of `slices` is done; it may do less than it is asked for.
fn transfer<B: BitmapSlice>(
    slices: &[VolatileSlice<B>],
    mut offset: u64,
    call: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> isize,
) -> Result<()> {
    let to_piece = |slice: &VolatileSlice<B>| libc::iovec { iov_base: slice.ptr_guard_mut().as_ptr().cast(), iov_len: slice.len() };
    let mut pieces: Vec<_> = slices.iter().filter(|slice| !slice.is_empty()).map(to_piece).collect();
    let mut rest = pieces.as_mut_slice();
    while !rest.is_empty() {
        let at = libc::off_t::try_from(offset).map_err(|_| Error::from(ErrorKind::InvalidInput))?;
        let count = rest.len().min(MAX_PIECES) as libc::c_int;
        match call(rest.as_ptr(), count, at) {
            0 => return Err(ErrorKind::UnexpectedEof.into()),
            bytes if bytes > 0 => {
                offset += bytes as u64;
                rest = advance(rest, bytes as usize);
            }
            _ => {
                let error = Error::last_os_error();
                if error.kind() != ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(())
}

/// What is left of `pieces` after the first `bytes` bytes.
fn advance(pieces: &mut [libc::iovec], mut bytes: usize) -> &mut [libc::iovec] {
    let mut whole = 0;
    for piece in pieces.iter_mut() {
        if bytes < piece.iov_len {
            piece.iov_base = piece.iov_base.wrapping_byte_add(bytes);
            piece.iov_len -= bytes;
            break;
        }
        bytes -= piece.iov_len;
        whole += 1;
    }
    pieces.get_mut(whole..).unwrap_or_default()
}
