//! Pointers to the rows of a tile.

use std::arch::asm;

/// The rows of a tile, as 32-bit words, with one pointer for three rows. An x86 load can add once or twice
/// the pitch to a pointer. With a single pointer the compiler makes a chain of additions, which on Intel
/// compete with the multiplications for ports and cost a third of the time.
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
    /// The row must exist and have this depth.
    #[inline(always)]
    pub(super) unsafe fn word(&self, row: usize, depth: usize) -> i32 {
        // SAFETY: guaranteed by the caller.
        unsafe { self.thirds[row / 3].add(row % 3 * self.pitch + depth).read_unaligned() }
    }

    /// Advances by four words.
    #[inline(always)]
    pub(super) fn advance(&mut self) {
        for pointer in &mut self.thirds {
            *pointer = pointer.wrapping_add(4);
        }
    }
}

/// Returns the same pointer, and hides that fact from the compiler. So the compiler neither computes it from
/// nearby pointers nor keeps values that were read through them.
#[inline(always)]
pub(super) fn opaque<T>(mut pointer: *const T) -> *const T {
    #[allow(clippy::pointers_in_nomem_asm_block, reason = "no instruction, so nothing is read through it")]
    // SAFETY: the assembly contains no instruction.
    unsafe {
        asm!("/* {0} */", inout(reg) pointer, options(pure, nomem, nostack, preserves_flags));
    }
    pointer
}
