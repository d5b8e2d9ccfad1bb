//! The output of the commands.

use std::io::{self, Write};

/// Writes a command's result to standard output. `print!` would panic on a closed pipe.
pub(super) fn print(result: &[u8]) -> anyhow::Result<()> {
    let mut stdout = io::stdout();
    stdout.write_all(result)?;
    Ok(stdout.flush()?)
}

/// Whether the error means only that the reader of our output closed the pipe.
#[must_use]
pub fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .chain()
        .filter_map(|cause| cause.downcast_ref::<io::Error>())
        .any(|cause| cause.kind() == io::ErrorKind::BrokenPipe)
}
