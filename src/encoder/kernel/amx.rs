//! AMX kernels: bf16 and bytes, in tiles of 32 rows by 32 columns in eight registers of 1 KiB.
//!
//! Four registers hold sums, two hold left squares, and two hold right squares. The rows of a tile are the
//! operand that stays: 16 lines far apart are slow to load from anywhere but the nearest cache, while the
//! lines of a panel are neighbours and stream well (measured: twice the speed). Stable Rust has no intrinsics
//! for tile registers, so each tile is one block of assembly. No other code uses these registers.

use std::arch::asm;
use std::arch::x86_64::{__cpuid_count, _xgetbv};
use std::sync::OnceLock;

use super::super::simd::Simd;
use super::super::simd::avx512::Avx512;
use super::{
    Accumulators, Kernel, LeftMatrix, Quantization, RightPanel, WithSimd, encode_bf16, encode_int8, quantize,
    unquantized,
};

/// Rows of a tile register.
const SIDE: usize = 16;

/// Columns of a panel: two tile registers.
const COLUMNS: usize = 2 * SIDE;

/// Whether CPU and system have AMX, and this process may use it. On Linux a process must ask for permission
/// first, so that the kernel has room for a thread's tiles.
pub(crate) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| has_instructions() && has_permission())
}

fn has_instructions() -> bool {
    const TILE: u32 = 1 << 24;
    const BF16: u32 = 1 << 22;
    const INT8: u32 = 1 << 25;
    const OSXSAVE: u32 = 1 << 27;
    const TILE_STATE: u64 = 1 << 17 | 1 << 18;
    let wanted = TILE | BF16 | INT8;
    if __cpuid_count(0, 0).eax < 7 || __cpuid_count(1, 0).ecx & OSXSAVE == 0 {
        return false;
    }
    // SAFETY: OSXSAVE means that `xgetbv` exists.
    let states = unsafe { saved_states() };
    __cpuid_count(7, 0).edx & wanted == wanted && states & TILE_STATE == TILE_STATE
}

#[target_feature(enable = "xsave")]
unsafe fn saved_states() -> u64 {
    // SAFETY: the caller has checked OSXSAVE; register 0 always exists.
    unsafe { _xgetbv(0) }
}

#[cfg(target_os = "linux")]
fn has_permission() -> bool {
    /// `ARCH_REQ_XCOMP_PERM` of the kernel's x86 `asm/prctl.h`.
    const REQUEST: nix::libc::c_long = 0x1023;
    /// The state component of the tiles' data.
    const TILE_DATA: nix::libc::c_long = 18;
    // SAFETY: the call takes two numbers and accesses no memory of this process.
    unsafe { nix::libc::syscall(nix::libc::SYS_arch_prctl, REQUEST, TILE_DATA) == 0 }
}

#[cfg(not(target_os = "linux"))]
fn has_permission() -> bool {
    false
}

/// Operand of `ldtilecfg`: all eight registers have 16 rows of 64 bytes.
#[repr(C, align(64))]
struct Configuration {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIGURATION: Configuration = Configuration {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

/// The configured tile registers. Released on drop, so that context switches of the thread stay cheap.
struct Tiles;

impl Tiles {
    /// # Safety
    ///
    /// [`is_available`] must be true.
    unsafe fn set_up() -> Self {
        // SAFETY: the instruction reads 64 bytes, the size of the configuration.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIGURATION, options(nostack, readonly)) };
        Self
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        // SAFETY: the registers were configured, so the instruction exists.
        unsafe { asm!("tilerelease", options(nostack, nomem)) };
    }
}

/// One block of assembly. The first argument is `one` or `two` squares of rows, `$product` is the
/// instruction.
///
/// Registers 0 to 3 hold sums: low and high columns of the first rows, then of the second rows. Registers 4
/// and 5 hold rows, 6 and 7 hold columns.
macro_rules! multiply {
    (two, $product:literal, $left:expr, $right:expr, $steps:expr, $sums:expr) => {
        asm!(
            "test {add}, {add}",
            "jz 3f",
            "tileloadd tmm0, [{sums} + {stride}*1]",
            "tileloadd tmm1, [{sums} + {stride}*1 + 64]",
            "tileloadd tmm2, [{below} + {stride}*1]",
            "tileloadd tmm3, [{below} + {stride}*1 + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm6, [{columns} + {panel}*1]",
            "tileloadd tmm4, [{words} + {pitch}*1]",
            concat!($product, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{columns} + {panel}*1 + 64]",
            concat!($product, " tmm1, tmm4, tmm7"),
            "tileloadd tmm5, [{words_below} + {pitch}*1]",
            concat!($product, " tmm2, tmm5, tmm6"),
            concat!($product, " tmm3, tmm5, tmm7"),
            "add {words}, 64",
            "add {words_below}, 64",
            "add {columns}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {stride}*1], tmm0",
            "tilestored [{sums} + {stride}*1 + 64], tmm1",
            "tilestored [{below} + {stride}*1], tmm2",
            "tilestored [{below} + {stride}*1 + 64], tmm3",
            add = in(reg) u64::from($sums.add),
            sums = in(reg) $sums.data,
            below = in(reg) $sums.data.add(SIDE * $sums.stride),
            stride = in(reg) $sums.stride * 4,
            words = inout(reg) $left.0 => _,
            words_below = inout(reg) $left.0.add(SIDE * $left.1) => _,
            pitch = in(reg) $left.1,
            columns = inout(reg) $right => _,
            panel = in(reg) 128_usize,
            steps = inout(reg) $steps => _,
            options(nostack),
        )
    };
    (one, $product:literal, $left:expr, $right:expr, $steps:expr, $sums:expr) => {
        asm!(
            "test {add}, {add}",
            "jz 3f",
            "tileloadd tmm0, [{sums} + {stride}*1]",
            "tileloadd tmm1, [{sums} + {stride}*1 + 64]",
            "jmp 2f",
            "3:",
            "tilezero tmm0",
            "tilezero tmm1",
            "2:",
            "tileloadd tmm6, [{columns} + {panel}*1]",
            "tileloadd tmm4, [{words} + {pitch}*1]",
            concat!($product, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{columns} + {panel}*1 + 64]",
            concat!($product, " tmm1, tmm4, tmm7"),
            "add {words}, 64",
            "add {columns}, 2048",
            "dec {steps}",
            "jnz 2b",
            "tilestored [{sums} + {stride}*1], tmm0",
            "tilestored [{sums} + {stride}*1 + 64], tmm1",
            add = in(reg) u64::from($sums.add),
            sums = in(reg) $sums.data,
            stride = in(reg) $sums.stride * 4,
            words = inout(reg) $left.0 => _,
            pitch = in(reg) $left.1,
            columns = inout(reg) $right => _,
            panel = in(reg) 128_usize,
            steps = inout(reg) $steps => _,
            options(nostack),
        )
    };
}

/// bf16 products, added as `f32`.
pub(crate) struct Bf16;

impl Kernel for Bf16 {
    type Simd = Avx512<true>;
    type Element = u16;
    type Operand = u16;
    type Weight = u16;
    const GROUP: usize = 2;
    const ROWS: usize = 2 * SIDE;
    const STEP: usize = SIDE;
    const COLUMNS: usize = COLUMNS;
    const DEPTH: usize = 32;
    const KEEPS_ROWS: bool = true;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe {
            let _tiles = Tiles::set_up();
            op.run()
        }
    }

    fn encode(column: &[f32], to: &mut [u16]) -> f32 {
        encode_bf16(column, to)
    }

    #[inline(always)]
    fn left(elements: *const u16, width: usize, _: *const u16, _: *const Quantization) -> LeftMatrix<Self> {
        unquantized(elements, width)
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        let bytes = (left.data.cast::<u8>(), left.stride * 2);
        // SAFETY: guaranteed by the caller; rows up to the next multiple of 16 are slack. The compiler never
        // uses tile registers, so the assembly overwrites nothing.
        unsafe {
            if rows > SIDE {
                multiply!(two, "tdpbf16ps", bytes, right.data, right.depth / 32, sums);
            } else {
                multiply!(one, "tdpbf16ps", bytes, right.data, right.depth / 32, sums);
            }
        }
    }
}

/// Products of bytes, added as whole numbers.
pub(crate) struct Int8;

impl Kernel for Int8 {
    type Simd = Avx512<true>;
    type Element = u16;
    type Operand = u8;
    type Weight = i8;
    const QUANTIZED: bool = true;
    const GROUP: usize = 4;
    const ROWS: usize = 2 * SIDE;
    const STEP: usize = SIDE;
    const COLUMNS: usize = COLUMNS;
    const DEPTH: usize = 64;
    const KEEPS_ROWS: bool = true;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,fma")]
    unsafe fn vectorize<O: WithSimd>(op: O) -> O::Output {
        // SAFETY: the caller has checked the CPU features.
        unsafe {
            let _tiles = Tiles::set_up();
            op.run()
        }
    }

    fn encode(column: &[f32], to: &mut [i8]) -> f32 {
        encode_int8(column, to)
    }

    fn units(weight: i8) -> f32 {
        f32::from(weight)
    }

    #[inline(always)]
    unsafe fn prepare(
        elements: *const u16,
        rows: usize,
        width: usize,
        operands: *mut u8,
        quantizations: *mut Quantization,
    ) {
        // SAFETY: guaranteed by the caller.
        unsafe { quantize::<u16, u8, Self::Simd>(elements, rows, width, operands, quantizations) }
    }

    #[inline(always)]
    fn left(
        _: *const u16,
        width: usize,
        data: *const u8,
        quantizations: *const Quantization,
    ) -> LeftMatrix<Self> {
        LeftMatrix { data, stride: width, quantizations }
    }

    #[inline(always)]
    unsafe fn tile(left: LeftMatrix<Self>, rows: usize, right: &RightPanel<Self>, sums: Accumulators) {
        /// Sums as whole numbers.
        #[repr(C, align(64))]
        struct Products(std::mem::MaybeUninit<[[i32; COLUMNS]; 2 * SIDE]>);
        let mut products = Products(std::mem::MaybeUninit::uninit());
        let products = products.0.as_mut_ptr().cast::<i32>();
        let bytes = (left.data, left.stride);
        let whole = Accumulators { data: products.cast(), stride: COLUMNS, add: false };
        // SAFETY: as for bf16; only products that were written before are read.
        unsafe {
            if rows > SIDE {
                multiply!(two, "tdpbusd", bytes, right.data, right.depth / 64, whole);
            } else {
                multiply!(one, "tdpbusd", bytes, right.data, right.depth / 64, whole);
            }
            for half in [0, SIDE] {
                let scales = Self::Simd::load(right.scales.add(half));
                let units = Self::Simd::load(right.sums.add(half));
                for row in 0..rows {
                    let Quantization { scale, least } = *left.quantizations.add(row);
                    let least = units.mul(Self::Simd::splat(least));
                    let numbers = Self::Simd::load_i32(products.add(row * COLUMNS + half));
                    let numbers = numbers.mul_add(Self::Simd::splat(scale), least);
                    let to = sums.data.add(row * sums.stride + half);
                    if sums.add {
                        numbers.mul_add(scales, Self::Simd::load(to)).store(to);
                    } else {
                        numbers.mul(scales).store(to);
                    }
                }
            }
        }
    }
}
