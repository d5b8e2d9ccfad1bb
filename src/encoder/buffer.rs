//! Memory that begins at a cache line.

use std::marker::PhantomData;

/// A cache line, and the widest register.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([u8; 64]);

/// Plain numbers, of which any bytes are a valid value.
///
/// # Safety
///
/// All bit patterns must be valid, and there must be no padding.
pub(super) unsafe trait Plain: Copy + Send + Sync + 'static {}

// SAFETY: primitive numbers.
unsafe impl Plain for f32 {}
// SAFETY: primitive numbers.
unsafe impl Plain for u16 {}
// SAFETY: primitive numbers.
unsafe impl Plain for u8 {}
// SAFETY: primitive numbers.
unsafe impl Plain for i8 {}
// SAFETY: primitive numbers.
unsafe impl Plain for i16 {}

/// A fixed number of zeros to begin with, aligned to 64 bytes.
pub(super) struct Buffer<T: Plain> {
    lines: Vec<Line>,
    len: usize,
    numbers: PhantomData<T>,
}

impl<T: Plain> Buffer<T> {
    /// Room for `len` numbers, all zero.
    pub(super) fn zeroed(len: usize) -> Self {
        let lines = (len * size_of::<T>()).div_ceil(size_of::<Line>());
        Self { lines: vec![Line([0; 64]); lines], len, numbers: PhantomData }
    }

    /// How many numbers.
    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// All of them.
    pub(super) fn as_slice(&self) -> &[T] {
        // SAFETY: the lines hold at least `len` numbers, are aligned for them, and any bytes are valid.
        unsafe { std::slice::from_raw_parts(self.lines.as_ptr().cast(), self.len) }
    }

    /// All of them, to be written.
    pub(super) fn as_mut_slice(&mut self) -> &mut [T] {
        // SAFETY: as above, and borrowed exclusively.
        unsafe { std::slice::from_raw_parts_mut(self.lines.as_mut_ptr().cast(), self.len) }
    }

    /// The first of them.
    pub(super) fn as_ptr(&self) -> *const T {
        self.lines.as_ptr().cast()
    }

    /// The first of them, to be written.
    pub(super) fn as_mut_ptr(&mut self) -> *mut T {
        self.lines.as_mut_ptr().cast()
    }
}

impl<T: Plain> From<&[T]> for Buffer<T> {
    fn from(numbers: &[T]) -> Self {
        let mut buffer = Self::zeroed(numbers.len());
        buffer.as_mut_slice().copy_from_slice(numbers);
        buffer
    }
}
