//! The `sideways` program: parse, log, run, exit code.

use clap::Parser;
use sideways::backend::cpu::Recycling;
use sideways::cli::{Cli, logging, run};
use sideways::sys::files::refuse_writes_beyond_limit;

#[global_allocator]
static HEAP: Recycling = Recycling::new();

fn main() {
    let cli = Cli::parse();
    logging::init(cli.quiet);
    refuse_writes_beyond_limit();
    std::process::exit(run(cli));
}
