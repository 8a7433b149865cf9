//! The allocator: size classes carved from small chunks, whole pages for the rest.
//!
//! The agent is measured by its anonymous memory, so that nothing is taken early and big buffers go back: blocks of up
//! to 4 KiB live in free lists per size class, bigger ones are mappings of their own (a power of two long, of which only
//! what is touched is memory). One of each length is kept for reuse until [`trim`]: making and unmaking a mapping for
//! every piece of a container's output costs more than moving the piece, page faults under software emulation above all.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::null_mut;

use crate::syscall;

const CLASSES: [usize; 16] = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096];
const MAX_SMALL: usize = 4096;
/// The shortest mapping, as a power of two.
const MIN_SHIFT: u32 = 13;
/// Address space asked for at a time; its pages count only once touched.
const CHUNK: usize = 256 << 10;
/// Mappings from 8 KiB to 4 MiB are kept, one of each length.
const KEPT: usize = 10;

struct Heap {
    /// Heads of singly linked lists of free blocks.
    free: [*mut u8; CLASSES.len()],
    bump: usize,
    end: usize,
    /// Addresses of freed mappings of 8 KiB << index; 0 = none.
    kept: [usize; KEPT],
}

pub struct Allocator;

struct Shared(UnsafeCell<Heap>);

// SAFETY: the agent has one thread and no signal handlers.
unsafe impl Sync for Shared {}

static HEAP: Shared =
    Shared(UnsafeCell::new(Heap { free: [null_mut(); CLASSES.len()], bump: 0, end: 0, kept: [0; KEPT] }));

fn class_of(size: usize) -> usize {
    CLASSES.iter().position(|c| size <= *c).unwrap_or(CLASSES.len() - 1)
}

/// The length of the mapping for a block, and its place among the kept ones.
fn mapping_of(size: usize) -> (usize, usize) {
    let len = size.next_power_of_two().max(1 << MIN_SHIFT);
    (len, (len.trailing_zeros() - MIN_SHIFT) as usize)
}

fn map(len: usize) -> usize {
    // SAFETY: a new private anonymous mapping touches nothing that exists.
    let got = unsafe {
        syscall!(
            libc::SYS_mmap,
            0,
            len,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            -1isize,
            0
        )
    };
    got.unwrap_or(0)
}

fn unmap(at: usize, len: usize) {
    // SAFETY: the range came from `map` and nobody uses it any more.
    let _ = unsafe { syscall!(libc::SYS_munmap, at, len) };
}

impl Heap {
    fn small(&mut self, size: usize, align: usize) -> *mut u8 {
        let class = class_of(size.max(align));
        let head = self.free[class];
        if !head.is_null() {
            // SAFETY: a free block holds the address of the next one in its first bytes (every class is >= 16).
            self.free[class] = unsafe { head.cast::<*mut u8>().read() };
            return head;
        }
        let block = CLASSES[class];
        // Blocks of a power of two are aligned to themselves, so that `align` (a power of two <= the class) holds for
        // these; the classes in between are multiples of 16 and are only used for alignments up to 16.
        let align = if block.is_power_of_two() { block } else { 16 };
        let mut at = (self.bump + align - 1) & !(align - 1);
        if at + block > self.end {
            let chunk = map(CHUNK);
            if chunk == 0 {
                return null_mut();
            }
            if chunk != self.end {
                self.bump = chunk;
                at = chunk;
            }
            self.end = chunk + CHUNK;
        }
        self.bump = at + block;
        at as *mut u8
    }

    fn large(&mut self, size: usize) -> *mut u8 {
        let (len, index) = mapping_of(size);
        match self.kept.get_mut(index).map(core::mem::take) {
            Some(at) if at != 0 => at as *mut u8,
            _ => map(len) as *mut u8,
        }
    }

    fn has_kept(&self, size: usize) -> bool {
        self.kept.get(mapping_of(size).1).is_some_and(|at| *at != 0)
    }

    fn drop_large(&mut self, at: usize, size: usize) {
        let (len, index) = mapping_of(size);
        match self.kept.get_mut(index) {
            Some(slot) if *slot == 0 => *slot = at,
            _ => unmap(at, len),
        }
    }
}

fn is_small(layout: Layout) -> bool {
    layout.size() <= MAX_SMALL && layout.align() <= MAX_SMALL
}

/// A class in between powers of two cannot promise more than 16.
fn small_size(layout: Layout) -> usize {
    if layout.align() > 16 {
        layout.size().max(layout.align()).next_power_of_two()
    } else {
        layout.size()
    }
}

// SAFETY: blocks are disjoint, big enough and aligned (see `small`; mappings are page-aligned, and no type of ours has
// a bigger alignment).
unsafe impl GlobalAlloc for Allocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // SAFETY: one thread, and no call below comes back here.
        let heap = unsafe { &mut *HEAP.0.get() };
        if is_small(layout) {
            heap.small(small_size(layout), 1)
        } else {
            heap.large(layout.size())
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as above.
        let heap = unsafe { &mut *HEAP.0.get() };
        if is_small(layout) {
            let class = class_of(small_size(layout));
            // SAFETY: the block is free now and at least 16 bytes long.
            unsafe { block.cast::<*mut u8>().write(heap.free[class]) };
            heap.free[class] = block;
        } else {
            heap.drop_large(block as usize, layout.size());
        }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        // SAFETY: the caller vouches for a valid size.
        let new_layout = unsafe { Layout::from_size_align_unchecked(new_size, layout.align()) };
        match (is_small(layout), is_small(new_layout)) {
            (true, true) if class_of(small_size(layout)) == class_of(small_size(new_layout)) => block,
            (false, false) => {
                let (old, new) = (mapping_of(layout.size()).0, mapping_of(new_size).0);
                if old == new {
                    return block;
                }
                // SAFETY: one thread, and nothing below comes back here.
                let heap = unsafe { &mut *HEAP.0.get() };
                if heap.has_kept(new_size) {
                    // Its pages are there already: copying is cheaper than touching new ones.
                    let fresh = heap.large(new_size);
                    // SAFETY: both mappings are valid for the smaller of the sizes and do not overlap.
                    unsafe { core::ptr::copy_nonoverlapping(block, fresh, layout.size().min(new_size)) };
                    heap.drop_large(block as usize, layout.size());
                    return fresh;
                }
                // SAFETY: the block is a mapping of `old` bytes of ours; the kernel moves it if it must.
                let moved = unsafe { syscall!(libc::SYS_mremap, block, old, new, libc::MREMAP_MAYMOVE) };
                moved.unwrap_or(0) as *mut u8
            }
            _ => {
                // SAFETY: both blocks are valid for the smaller of the sizes and do not overlap.
                unsafe {
                    let fresh = self.alloc(new_layout);
                    if !fresh.is_null() {
                        core::ptr::copy_nonoverlapping(block, fresh, layout.size().min(new_size));
                        self.dealloc(block, layout);
                    }
                    fresh
                }
            }
        }
    }
}

/// Gives the kept mappings back: called when the event loop has nothing to do.
pub fn trim() {
    // SAFETY: one thread, called from the event loop, not from inside the allocator.
    let heap = unsafe { &mut *HEAP.0.get() };
    for (index, slot) in heap.kept.iter_mut().enumerate() {
        let at = core::mem::take(slot);
        if at != 0 {
            unmap(at, 1 << (MIN_SHIFT + index as u32));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_keep_their_bytes_through_growth_and_reuse() {
        let heap = Allocator;
        let mut live = vec![];
        let mut seed = 7u32;
        for round in 0..2000usize {
            seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let size = 1 + (seed >> 8) as usize % if round % 50 == 0 { 300_000 } else { 5000 };
            let align = 1 << (seed % 7);
            let layout = Layout::from_size_align(size, align).unwrap();
            // SAFETY: non-zero size; the block is used within its layout and freed once.
            unsafe {
                let block = heap.alloc(layout);
                assert!(!block.is_null() && block as usize % align == 0);
                block.write_bytes((round % 251) as u8, size);
                live.push((block, layout, (round % 251) as u8));
                if round % 3 == 0 {
                    let at = seed as usize % live.len();
                    let (block, layout, byte) = live.swap_remove(at);
                    let grown = layout.size() * 3;
                    let block = heap.realloc(block, layout, grown);
                    assert!((0..layout.size()).all(|i| *block.add(i) == byte));
                    heap.dealloc(block, Layout::from_size_align(grown, layout.align()).unwrap());
                }
            }
        }
        for (block, layout, byte) in live {
            // SAFETY: still allocated, freed once.
            unsafe {
                assert!((0..layout.size()).all(|i| *block.add(i) == byte));
                heap.dealloc(block, layout);
            }
        }
        trim();
    }
}
