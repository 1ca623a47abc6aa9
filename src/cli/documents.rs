//! `kling-proxy completions` and `kling-proxy man`: scripts for shells and manual pages for packages,
//! generated from the definition of the command line.

use std::fs;
use std::io::{self, Write};
use std::path::Path;

use clap_complete::{Shell, generate};

use super::{Exit, Failure, command_line};

/// Prints the script with which a shell completes our commands and flags.
pub(super) fn completions(shell: Shell) {
    let mut command = command_line();
    let name = command.get_name().to_owned();
    let mut script = Vec::new();
    generate(shell, &mut command, name, &mut script);
    // A pipe that its reader has closed, such as `head`, is no failure.
    let _ = io::stdout().write_all(&script);
}

/// Writes one manual page per command into a folder. Makes the folder if it is missing.
pub(super) fn man(folder: &Path) -> Result<(), Failure> {
    let made = fs::create_dir_all(folder);
    let written = made.and_then(|()| clap_mangen::generate_to(command_line(), folder));
    written.map_err(|error| {
        let folder = folder.display();
        Failure::new(Exit::Failed, format!("cannot write to {folder}: {error}"))
    })
}
