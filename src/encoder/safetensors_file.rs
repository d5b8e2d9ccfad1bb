//! Reads weights from a safetensors file.
//!
//! The file is read and never memory-mapped, so that a later change of the file cannot harm a running
//! process.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};

use safetensors::Dtype;
use safetensors::tensor::{Metadata, TensorInfo};

use super::error::Error;

/// Size of the header's length, before the header, in bytes.
const LENGTH: u64 = 8;

/// Maximum size of a header in bytes, as in the safetensors crate.
const MAX_HEADER: u64 = 100_000_000;

/// An open file of named tensors. The header was read and matches the length of the file.
pub(super) struct SafetensorsFile {
    path: PathBuf,
    file: File,
    header: Metadata,
    /// Offset of the numbers in the file.
    start: u64,
    prefix: &'static str,
}

impl SafetensorsFile {
    /// Opens a file and reads its header.
    pub(super) fn open(path: &Path) -> Result<Self, Error> {
        let unreadable = |source| Error::Unreadable { file: path.to_owned(), source };
        let malformed = |why: String| Error::Malformed { file: path.to_owned(), why };
        let file = File::open(path).map_err(unreadable)?;
        let whole = file.metadata().map_err(unreadable)?.len();
        if whole < LENGTH {
            return Err(malformed(format!("a file of {whole} bytes is not a safetensors file")));
        }
        let mut length = [0; LENGTH as usize];
        file.read_exact_at(&mut length, 0).map_err(unreadable)?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER.min(whole - LENGTH) {
            let why = format!("not a safetensors file: header of {length} bytes in a file of {whole} bytes");
            return Err(malformed(why));
        }
        let mut text = vec![0; length as usize];
        file.read_exact_at(&mut text, LENGTH).map_err(unreadable)?;
        // This also checks the offsets: each tensor begins at the end of the tensor before it, and its length
        // matches its shape.
        let header: Metadata =
            serde_json::from_slice(&text).map_err(|error| malformed(format!("bad header: {error}")))?;
        let start = LENGTH + length;
        let promised = header.data_len() as u64;
        if whole - start != promised {
            let why = format!(
                "the file has {} bytes of weights, but its header says {promised}: download the file again",
                whole - start
            );
            return Err(malformed(why));
        }
        let is_prefixed = header.offset_keys().iter().any(|name| name.starts_with("bert."));
        let prefix = if is_prefixed { "bert." } else { "" };
        Ok(Self { path: path.to_owned(), file, header, start, prefix })
    }

    fn malformed(&self, why: String) -> Error {
        Error::Malformed { file: self.path.clone(), why }
    }

    fn find(&self, name: &str) -> Result<(String, &TensorInfo), Error> {
        let name = format!("{}{name}", self.prefix);
        match self.header.info(&name) {
            Some(info) => Ok((name, info)),
            None => Err(self.malformed(format!("the file has no tensor {name}"))),
        }
    }

    /// Checks that the tensor exists and has this shape, before memory is allocated.
    pub(super) fn check(&self, name: &str, shape: &[usize]) -> Result<(), Error> {
        self.shaped(name, shape).map(|_| ())
    }

    /// The tensor, after a check of its shape, and the size of one of its numbers in bytes.
    fn shaped(&self, name: &str, shape: &[usize]) -> Result<(&TensorInfo, usize), Error> {
        let (name, info) = self.find(name)?;
        if info.shape != shape {
            return Err(self.malformed(format!("{name} has shape {:?}, not {shape:?}", info.shape)));
        }
        match size(info.dtype) {
            Some(size) => Ok((info, size)),
            None => Err(self.malformed(format!("{name} has type {:?}, not f32, f16 or bf16", info.dtype))),
        }
    }

    /// The first `length` bytes of a tensor.
    fn bytes(&self, info: &TensorInfo, length: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; length];
        self.file
            .read_exact_at(&mut bytes, self.start + info.data_offsets.0 as u64)
            .map_err(|source| Error::Unreadable { file: self.path.clone(), source })?;
        Ok(bytes)
    }

    /// A tensor of the given shape as `f32`, row by row.
    pub(super) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, Error> {
        let (info, _) = self.shaped(name, shape)?;
        let (start, end) = info.data_offsets;
        Ok(numbers(info.dtype, &self.bytes(info, end - start)?))
    }

    /// The first row of a matrix, as `f32`.
    pub(super) fn read_first_row(&self, name: &str, width: usize) -> Result<Vec<f32>, Error> {
        let (full, info) = self.find(name)?;
        let rows = info.shape.first().copied().unwrap_or(0);
        if rows == 0 {
            return Err(self.malformed(format!("{full} has no rows")));
        }
        let (info, size) = self.shaped(name, &[rows, width])?;
        Ok(numbers(info.dtype, &self.bytes(info, width * size)?))
    }

    /// A matrix in the number type of the file.
    pub(super) fn table(&self, name: &str, shape: [usize; 2]) -> Result<Table, Error> {
        let (info, size) = self.shaped(name, &shape)?;
        let (start, end) = info.data_offsets;
        let bytes = self.bytes(info, end - start)?;
        Ok(Table { bytes, dtype: info.dtype, rows: shape[0], row_bytes: shape[1] * size })
    }
}

/// A matrix whose rows are read one at a time. The numbers keep the type of the file, never larger than
/// `f32`.
pub(super) struct Table {
    bytes: Vec<u8>,
    dtype: Dtype,
    rows: usize,
    row_bytes: usize,
}

impl Table {
    /// Adds a row to the numbers of `to`.
    ///
    /// # Panics
    ///
    /// If the row does not exist.
    #[inline]
    pub(super) fn add_row(&self, row: usize, to: &mut [f32]) {
        assert!(row < self.rows, "a row of the table");
        let from = &self.bytes[row * self.row_bytes..][..self.row_bytes];
        match self.dtype {
            Dtype::F32 => add(to, from, f32::from_le_bytes),
            Dtype::F16 => add(to, from, |bytes| f32_of_f16(u16::from_le_bytes(bytes))),
            _ => add(to, from, |bytes: [u8; 2]| f32_of_bf16(u16::from_le_bytes(bytes))),
        }
    }
}

fn add<const BYTES: usize>(to: &mut [f32], from: &[u8], number: impl Fn([u8; BYTES]) -> f32) {
    for (to, from) in to.iter_mut().zip(from.as_chunks::<BYTES>().0) {
        *to += number(*from);
    }
}

/// Size of a number in bytes, for the supported types.
fn size(dtype: Dtype) -> Option<usize> {
    match dtype {
        Dtype::F32 => Some(4),
        Dtype::F16 | Dtype::BF16 => Some(2),
        _ => None,
    }
}

/// Converts numbers of a type that has a [`size`].
fn numbers(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let halves = || bytes.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes));
    match dtype {
        Dtype::F32 => bytes.as_chunks::<4>().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
        Dtype::F16 => halves().map(f32_of_f16).collect(),
        _ => halves().map(f32_of_bf16).collect(),
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
    fn half_precision_numbers_are_converted_exactly() {
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
