//! Pointers to the rows of a tile.

use std::arch::asm;

/// The rows of a tile, as 32-bit words, three for each pointer: x86 adds a pitch and twice a pitch to a
/// pointer as part of the load. Of a single pointer the compiler makes a chain of additions, which on Intel
/// wait for the ports that multiply: a third of the time.
pub(super) struct Rows {
    thirds: [*const i32; 4],
    /// Words from a row to the next.
    pitch: usize,
}

impl Rows {
    /// The first `ROWS` rows, at most 12, from `words` on.
    #[inline(always)]
    pub(super) fn new<const ROWS: usize>(words: *const i32, pitch: usize) -> Self {
        let mut thirds = [words; 4];
        for (third, pointer) in thirds.iter_mut().enumerate() {
            *pointer = opaque(words.wrapping_add(if third * 3 < ROWS { third * 3 * pitch } else { 0 }));
        }
        Self { thirds, pitch }
    }

    /// A word of a row.
    ///
    /// # Safety
    ///
    /// The row must be there, and as deep.
    #[inline(always)]
    pub(super) unsafe fn word(&self, row: usize, depth: usize) -> i32 {
        // SAFETY: the caller's.
        unsafe { self.thirds[row / 3].add(row % 3 * self.pitch + depth).read_unaligned() }
    }

    /// Moves on by four words.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        for pointer in &mut self.thirds {
            *pointer = pointer.wrapping_add(4);
        }
    }
}

/// The same pointer, of which the compiler does not know that: it neither makes it of others that point near, nor
/// holds on to what was read through them.
#[inline(always)]
pub(super) fn opaque<T>(mut pointer: *const T) -> *const T {
    #[allow(clippy::pointers_in_nomem_asm_block, reason = "no instruction, so nothing is read through it")]
    // SAFETY: no instruction at all.
    unsafe {
        asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    pointer
}
