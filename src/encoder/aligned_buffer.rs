//! Memory aligned to cache lines.

use std::marker::PhantomData;

/// A cache line, which is also the size of the widest register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Plain numbers. All byte patterns are valid values.
///
/// # Safety
///
/// All bit patterns must be valid, and there must be no padding.
pub(super) unsafe trait Pod: Copy + Send + Sync + 'static {}

// SAFETY: primitive numbers.
unsafe impl Pod for f32 {}
// SAFETY: primitive numbers.
unsafe impl Pod for u16 {}
// SAFETY: primitive numbers.
unsafe impl Pod for u8 {}
// SAFETY: primitive numbers.
unsafe impl Pod for i8 {}
// SAFETY: primitive numbers.
unsafe impl Pod for i16 {}

/// A fixed number of values, aligned to 64 bytes and initially zero.
pub(super) struct Buffer<T: Pod> {
    lines: Vec<Line>,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T: Pod> Buffer<T> {
    /// A buffer of `len` zeros.
    pub(super) fn zeroed(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        Self { lines: vec![Line([0; 64]); lines], len, numbers: PhantomData }
    }

    /// Number of values.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All values.
    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold at least `len` values and are aligned for them, and all bytes are valid.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// All values, for writing.
    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    /// Pointer to the first value.
    pub(super) fn as_ptr(&self) -> *const T {
        self.lines.as_ptr().cast()
    }

    /// Pointer to the first value, for writing.
    pub(super) fn as_mut_ptr(&mut self) -> *mut T {
        self.lines.as_mut_ptr().cast()
    }
}

impl<T: Pod> From<&[T]> for Buffer<T> {
    fn from(numbers: &[T]) -> Self {
        let mut buffer = Self::zeroed(numbers.len());
        buffer.as_mut_slice().copy_from_slice(numbers);
        buffer
    }
}
