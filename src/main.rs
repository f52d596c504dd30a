//! The `sideways` program: parse, log, run, exit code.

use clap::Parser;
use sideways::cli::{Cli, logging, run};

fn main() {
    sideways::kernels::keep_freed_memory();
    let cli = Cli::parse();
    logging::init();
    std::process::exit(run(cli));
}
