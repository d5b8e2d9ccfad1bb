//! Weights out of a memory-mapped safetensors file.

use std::fs::File;
use std::path::{Path, PathBuf};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use super::Error;

/// A mapped file of named tensors.
pub(super) struct Tensors {
    file: PathBuf,
    map: Mmap,
    prefix: &'static str,
}

impl Tensors {
    /// Maps a file and reads its header.
    pub(super) fn open(file: &Path) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { file: file.to_owned(), source };
        let opened = File::open(file).map_err(unreadable)?;
        // SAFETY: the map is read-only. Somebody who writes into the file meanwhile gets wrong vectors, and
        // who cuts it short ends the process, as with any mapped file; models are replaced, not changed.
        let map = unsafe { Mmap::map(&opened) }.map_err(unreadable)?;
        let mut tensors = Self { file: file.to_owned(), map, prefix: "" };
        let view = tensors.view()?;
        if view.names().iter().any(|name| name.starts_with("bert.")) {
            tensors.prefix = "bert.";
        }
        Ok(tensors)
    }

    fn view(&self) -> Result<SafeTensors<'_>, Error> {
        SafeTensors::deserialize(&self.map)
            .map_err(|error| Error::Malformed { file: self.file.clone(), why: error.to_string() })
    }

    /// A tensor as `f32`, row by row. Its shape must be as given.
    pub(super) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let malformed = |why| Error::Malformed { file: self.file.clone(), why };
        let name = format!("{}{name}", self.prefix);
        let view = self.view()?;
        let tensor = view.tensor(&name).map_err(|error| malformed(format!("{name}: {error}")))?;
        if tensor.shape() != shape {
            return Err(malformed(format!("{name} is {:?} large, not {shape:?}", tensor.shape())));
        }
        numbers(tensor.dtype(), tensor.data())
            .ok_or_else(|| malformed(format!("{name} is of type {:?}, not f32, f16 or bf16", tensor.dtype())))
    }

    /// The first row of a tensor of rows, as `f32`.
    pub(super) fn read_first_row(&self, name: &str, width: usize) -> Result<Vec<f32>, Error> {
        let malformed = |why| Error::Malformed { file: self.file.clone(), why };
        let full = format!("{}{name}", self.prefix);
        let view = self.view()?;
        let tensor = view.tensor(&full).map_err(|error| malformed(format!("{full}: {error}")))?;
        let rows = tensor.shape().first().copied().unwrap_or(0);
        if rows == 0 {
            return Err(malformed(format!("{full} has no rows")));
        }
        let mut numbers = self.read(name, &[rows, width])?;
        numbers.truncate(width);
        Ok(numbers)
    }

    /// Where a table of rows lies, to read single rows of it from the map.
    pub(super) fn table(&self, name: &str, shape: [usize; 2]) -> Result<Table, Error> {
        let malformed = |why| Error::Malformed { file: self.file.clone(), why };
        let name = format!("{}{name}", self.prefix);
        let view = self.view()?;
        let tensor = view.tensor(&name).map_err(|error| malformed(format!("{name}: {error}")))?;
        if tensor.shape() != shape {
            return Err(malformed(format!("{name} is {:?} large, not {shape:?}", tensor.shape())));
        }
        let dtype = tensor.dtype();
        let Some(bytes) = size(dtype) else {
            return Err(malformed(format!("{name} is of type {dtype:?}, not f32, f16 or bf16")));
        };
        let start = tensor.data().as_ptr() as usize - self.map.as_ptr() as usize;
        Ok(Table { start, dtype, rows: shape[0], row_bytes: shape[1] * bytes })
    }

    /// Adds a row of a table to as many numbers.
    ///
    /// # Panics
    ///
    /// If the table is not of this file, or has no such row.
    #[inline]
    pub(super) fn add_row(&self, table: &Table, row: usize, to: &mut [f32]) {
        assert!(row < table.rows, "a row of the table");
        let from = &self.map[table.start + row * table.row_bytes..][..table.row_bytes];
        match table.dtype {
            Dtype::F32 => add(to, from, f32::from_le_bytes),
            Dtype::F16 => add(to, from, |bytes| f32_of_f16(u16::from_le_bytes(bytes))),
            _ => add(to, from, |bytes: [u8; 2]| f32_of_bf16(u16::from_le_bytes(bytes))),
        }
    }

    /// Lets go of the pages read so far; they come back from the file when they are wanted.
    pub(super) fn forget_pages(&self) {
        #[cfg(unix)]
        // SAFETY: of a read-only map of a file, which is read again where it is wanted.
        let advised = unsafe { self.map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
        #[cfg(unix)]
        if let Err(error) = advised {
            tracing::debug!(%error, "cannot give back the pages of the weights");
        }
    }
}

/// A table of a mapped file: its place, type and size.
pub(super) struct Table {
    start: usize,
    dtype: Dtype,
    rows: usize,
    row_bytes: usize,
}

fn add<const BYTES: usize>(to: &mut [f32], from: &[u8], number: impl Fn([u8; BYTES]) -> f32) {
    for (to, from) in to.iter_mut().zip(from.as_chunks::<BYTES>().0) {
        *to += number(*from);
    }
}

fn size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

fn numbers(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f32>> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    match dtype {
        Dtype::F32 => Some(bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()),
        Dtype::F16 => Some(halves().map(f32_of_f16).collect()),
        Dtype::BF16 => Some(halves().map(f32_of_bf16).collect()),
        _ => None,
    }
}

fn f32_of_bf16(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

fn f32_of_f16(bits: u16) -> f32 {
    let (sign, exponent, fraction) = (bits >> 15, bits >> 10 & 0x1f, bits & 0x3ff);
    let magnitude = match exponent {
        0 => f32::from(fraction) * 2.0_f32.powi(-24),
        0x1f if fraction == 0 => f32::INFINITY,
        0x1f => f32::NAN,
        _ => f32::from_bits((u32::from(exponent) + 127 - 15) << 23 | u32::from(fraction) << 13),
    };
    if sign == 1 { -magnitude } else { magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn halves_become_the_numbers_they_stand_for() {
        for (bits, number) in [
            (0x0000, 0.0),
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x7bff, 65_504.0),
            (0x0400, 6.103_515_6e-5),
            (0x0001, 5.960_464_5e-8),
            (0x3555, 0.333_251_95),
            (0xfc00, f32::NEG_INFINITY),
        ] {
            assert!((f32_of_f16(bits).to_bits()) == f32::to_bits(number), "{bits:#x}");
        }
        assert!(f32_of_f16(0x7e00).is_nan());
        assert!((f32_of_bf16(0x3fc0) - 1.5).abs() < f32::EPSILON);
    }
}
