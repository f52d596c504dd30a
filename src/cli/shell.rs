//! `sideways completions` and `sideways man`: what a shell and `man` know of this program, from its own arguments.

use std::path::PathBuf;

use clap::{Args, CommandFactory};
use clap_complete::Shell;

use super::Cli;
use crate::{Error, Result};

/// Arguments of `sideways completions`.
#[derive(Args, Debug)]
pub struct CompletionsArgs {
    /// The shell.
    #[arg(value_enum)]
    pub shell: Shell,
}

/// Prints the completions of a shell.
///
/// # Errors
/// [`Error::Io`] if they cannot be printed.
pub fn completions(args: &CompletionsArgs) -> Result<()> {
    let mut text = Vec::new();
    clap_complete::generate(args.shell, &mut Cli::command(), "sideways", &mut text);
    outln!("{}", String::from_utf8_lossy(&text).trim_end());
    Ok(())
}

/// Arguments of `sideways man`.
#[derive(Args, Debug)]
pub struct ManArgs {
    /// The folder to write the pages into, a command each.
    #[arg(long, value_name = "DIR")]
    pub out: PathBuf,
}

/// Writes manual pages: `sideways.1`, `sideways-train.1`, …
///
/// # Errors
/// [`Error::Io`] if the folder cannot be written.
pub fn man(args: &ManArgs) -> Result<()> {
    let io = |e| Error::io(&args.out, e);
    std::fs::create_dir_all(&args.out).map_err(io)?;
    clap_mangen::generate_to(Cli::command(), &args.out).map_err(io)?;
    log::info!("man -l {} shows the program's page", args.out.join("sideways.1").display());
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bash takes the completions, and every command has a page.
    #[test]
    fn commands_are_completed_and_described() {
        let mut text = Vec::new();
        clap_complete::generate(Shell::Bash, &mut Cli::command(), "sideways", &mut text);
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("completions");
        std::fs::write(&file, &text).unwrap();
        let ask = "source \"$0\"; COMP_WORDS=(sideways trai); COMP_CWORD=1; _sideways sideways trai sideways; echo \"${COMPREPLY[@]}\"";
        let said = std::process::Command::new("bash").args(["-c", ask]).arg(&file).output().unwrap();
        assert_eq!(String::from_utf8_lossy(&said.stdout).trim(), "train", "{said:?}");

        let out = dir.path().join("pages");
        man(&ManArgs { out: out.clone() }).unwrap();
        for command in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let page = std::fs::read_to_string(out.join(format!("sideways-{}.1", command.get_name()))).unwrap();
            assert!(page.contains(".SH SYNOPSIS"), "{page}");
        }
    }
}
