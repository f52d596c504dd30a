//! The `sideways` program: parse, log, run, exit code.

use clap::Parser;
use sideways::cli::{Cli, logging, run};

fn main() {
    let cli = Cli::parse();
    logging::init();
    if let Err(error) = run(cli) {
        log::error!("{error}");
        std::process::exit(error.exit_code());
    }
}
