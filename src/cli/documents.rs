//! `kling-proxy completions` and `kling-proxy man`: what the command line says of itself, for shells
//! and for packages.

use std::io::{self, Write};
use std::path::Path;

use clap_complete::{Shell, generate};

use super::{Exit, Failure, command_line};

/// Prints the script that teaches a shell our commands and flags.
pub(super) fn completions(shell: Shell) {
    let mut command = command_line();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    generate(shell, &mut command, name, &mut script);
    // A reader that has gone, such as `head`, is no failure.
    let _ = io::stdout().write_all(&script);
}

/// Writes a manual page a command.
pub(super) fn man(folder: &Path) -> Result<(), Failure> {
    clap_mangen::generate_to(command_line(), folder).map_err(|error| {
        let folder = folder.display();
        Failure::new(Exit::Failed, format!("cannot write to {folder}: {error}"))
    })
}
