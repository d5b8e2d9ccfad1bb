//! AMX for tests on CPUs without it: a handler of SIGILL that does the work of tile instructions.
//!
//! It knows the instructions and operands that the kernels use, and nothing else. Any other illegal
//! instruction ends the process as usual. Semantics: Intel's Software Developer's Manual, volume 2.

use std::cell::UnsafeCell;
use std::ffi::{c_int, c_void};
use std::sync::Once;

use nix::libc::{
    REG_R8, REG_R9, REG_R10, REG_R11, REG_R12, REG_R13, REG_R14, REG_R15, REG_RAX, REG_RBP, REG_RBX, REG_RCX,
    REG_RDI, REG_RDX, REG_RIP, REG_RSI, REG_RSP, SA_NODEFER, SA_SIGINFO, SIG_DFL, SIGILL, sigaction,
    siginfo_t, ucontext_t,
};

/// Rows of a tile, and 32-bit words of a row.
const SIDE: usize = 16;

/// General registers in the order of their numbers in instructions.
const REGISTERS: [c_int; 16] = [
    REG_RAX, REG_RCX, REG_RDX, REG_RBX, REG_RSP, REG_RBP, REG_RSI, REG_RDI, REG_R8, REG_R9, REG_R10, REG_R11,
    REG_R12, REG_R13, REG_R14, REG_R15,
];

type Tile = [[u32; SIDE]; SIDE];

thread_local! {
    static TILES: UnsafeCell<[Tile; 8]> = const { UnsafeCell::new([[[0; SIDE]; SIDE]; 8]) };
}

/// Makes tile instructions work in this process. Always true.
pub(crate) fn install() -> bool {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        // SAFETY: an all-zero `sigaction` is valid. The handler uses no lock and allocates no memory.
        unsafe {
            let mut action: sigaction = std::mem::zeroed();
            action.sa_sigaction = handle as *const () as usize;
            action.sa_flags = SA_SIGINFO | SA_NODEFER;
            assert_eq!(sigaction(SIGILL, &raw const action, std::ptr::null_mut()), 0);
        }
    });
    true
}

extern "C" fn handle(_: c_int, _: *mut siginfo_t, context: *mut c_void) {
    // SAFETY: the system passes the state of the interrupted thread. The tiles belong to this thread, and
    // nothing else borrows them.
    unsafe {
        let registers = &mut (*context.cast::<ucontext_t>()).uc_mcontext.gregs;
        let done = TILES.with(|tiles| execute(registers, &mut *tiles.get()));
        if !done {
            // The instruction runs again, and now ends the process.
            let mut action: sigaction = std::mem::zeroed();
            action.sa_sigaction = SIG_DFL;
            sigaction(SIGILL, &raw const action, std::ptr::null_mut());
        }
    }
}

/// Executes the instruction at `RIP` and moves on. False if it is not one of ours.
unsafe fn execute(registers: &mut [i64; 23], tiles: &mut [Tile; 8]) -> bool {
    // SAFETY: the instruction's bytes can be read, since the CPU has just read them. Addresses are the
    // program's own.
    unsafe {
        let code = registers[REG_RIP as usize] as *const u8;
        let byte = |at: usize| code.add(at).read();
        // A VEX prefix of three bytes with the opcode map 0F38.
        if byte(0) != 0xc4 || byte(1) & 0x1f != 2 {
            return false;
        }
        let extension = |bit: u8| usize::from(byte(1) >> bit & 1 ^ 1) * 8;
        let (prefix, third) = (byte(2) & 3, usize::from(!byte(2) >> 3 & 15));
        let (opcode, modrm) = (byte(3), byte(4));
        let (mode, reg, rm) = (modrm >> 6, usize::from(modrm >> 3 & 7), usize::from(modrm & 7));
        // Address and length of an operand in memory; step from row to row.
        let memory = || {
            let (base, step, mut length) = if rm == 4 {
                let sib = byte(5);
                let index = usize::from(sib >> 3 & 7) + extension(6);
                let step = if index == 4 { 0 } else { registers[REGISTERS[index] as usize] << (sib >> 6) };
                (usize::from(sib & 7) + extension(5), step, 6)
            } else {
                (rm + extension(5), 0, 5)
            };
            let mut address = registers[REGISTERS[base] as usize];
            match mode {
                1 => {
                    address += i64::from(byte(length).cast_signed());
                    length += 1;
                }
                2 => {
                    address += i64::from(code.add(length).cast::<i32>().read_unaligned());
                    length += 4;
                }
                _ => assert!(base % 8 != 5, "no address without a base"),
            }
            (address as *mut u8, step as usize, length)
        };
        let length = match (opcode, prefix, mode) {
            // ldtilecfg; the kernels configure all tiles alike.
            (0x49, 0, 0..=2) => memory().2,
            // tilerelease
            (0x49, 0, 3) => 5,
            // tilezero
            (0x49, 3, 3) => {
                tiles[reg] = Tile::default();
                5
            }
            // tileloadd
            (0x4b, 3, 0..=2) => {
                let (address, step, length) = memory();
                for (row, words) in tiles[reg].iter_mut().enumerate() {
                    *words =
                        address.wrapping_add(row.wrapping_mul(step)).cast::<[u32; SIDE]>().read_unaligned();
                }
                length
            }
            // tilestored
            (0x4b, 2, 0..=2) => {
                let (address, step, length) = memory();
                for (row, words) in tiles[reg].iter().enumerate() {
                    address
                        .wrapping_add(row.wrapping_mul(step))
                        .cast::<[u32; SIDE]>()
                        .write_unaligned(*words);
                }
                length
            }
            // tdpbf16ps
            (0x5c, 2, 3) => {
                tiles[reg] = product(tiles[reg], &tiles[rm], &tiles[third], bf16_products);
                5
            }
            // tdpbusd
            (0x5e, 1, 3) => {
                tiles[reg] = product(tiles[reg], &tiles[rm], &tiles[third], byte_products);
                5
            }
            _ => return false,
        };
        registers[REG_RIP as usize] += length as i64;
        true
    }
}

/// Adds a product of tiles to `sums`. `add` adds the products of a row's words with a column's words.
fn product(
    mut sums: Tile,
    left: &Tile,
    right: &Tile,
    add: fn(u32, &mut dyn Iterator<Item = (u32, u32)>) -> u32,
) -> Tile {
    for (sums, left) in sums.iter_mut().zip(left) {
        for (column, sum) in sums.iter_mut().enumerate() {
            *sum = add(*sum, &mut left.iter().copied().zip(right.iter().map(|row| row[column])));
        }
    }
    sums
}

/// Even and odd neighbours have a sum each, and both are added to the earlier sum.
fn bf16_products(sum: u32, words: &mut dyn Iterator<Item = (u32, u32)>) -> u32 {
    let (mut even, mut odd) = (0.0_f32, 0.0_f32);
    let number = |half: u32| f32::from_bits(half << 16);
    for (left, right) in words {
        even = number(left & 0xffff).mul_add(number(right & 0xffff), even);
        odd = number(left >> 16).mul_add(number(right >> 16), odd);
    }
    (f32::from_bits(sum) + (even + odd)).to_bits()
}

/// Unsigned bytes on the left, signed bytes on the right.
fn byte_products(sum: u32, words: &mut dyn Iterator<Item = (u32, u32)>) -> u32 {
    words.fold(sum, |sum, (left, right)| {
        let pairs = left.to_le_bytes().into_iter().zip(right.to_le_bytes());
        let products = pairs.map(|(left, right)| i32::from(left) * i32::from(right.cast_signed()));
        sum.wrapping_add(products.sum::<i32>().cast_unsigned())
    })
}
