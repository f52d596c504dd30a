//! `sideways bench link --all-reduce`: the mean of all ranks' values, and `MPI_Iallreduce` of as many in the same run.
//!
//! Both are waited for at once. Ours scales the sums by 1 / R as well, and copies into links' buffers and out of them.

use std::time::Instant;

use super::super::{LinkArgs, TIMEOUT, show_bytes, wrong_size};
use super::{BATCH, LEAST, MOST, print_json};
use crate::Result;
use crate::comm::all_reduce::{AllReduce, Group};
use crate::comm::{World, connect};
use crate::sys::host::hostname;

pub fn run(args: &LinkArgs, world: &World) -> Result<()> {
    let ranks = world.size();
    if ranks < 2 {
        return Err(wrong_size("link --all-reduce", ranks, "use 2 or more"));
    }
    let prints = world.rank() == 0 && !args.json;
    if prints {
        outln!("An all-reduce among {ranks} ranks, rank 0 on {}, best of {} batches.\n", hostname(), args.repeat);
        outln!("{:>9} | {:>10} {:>10} {:>7}", "values", "us", "MPI us", "ratio");
    }
    let (mut bytes, mut rows) = (args.from, Vec::new());
    while bytes <= args.to {
        let (ours, raw) = measure(world, bytes, args.repeat.max(1))?;
        if prints {
            outln!("{:>9} | {:>10.1} {:>10.1} {:>7.3}", show_bytes(bytes), 1e6 * ours, 1e6 * raw, ours / raw);
        }
        rows.push(serde_json::json!({ "payload_bytes": bytes, "all_reduce_seconds": ours, "mpi_seconds": raw }));
        bytes = bytes.saturating_mul(4);
    }
    print_json(args, world, &rows)
}

/// Best seconds of an all-reduce of `bytes` on each rank, and of MPI's.
fn measure(world: &World, bytes: usize, repeat: usize) -> Result<(f64, f64)> {
    let (words, ranks) = (bytes / 4, world.size());
    let group = Group { first: 0, name: "nothing".into(), replicas: ranks, words, worker: &|r| r };
    let placement: Vec<usize> = (0..ranks).collect();
    let mut ends = connect(world, &placement, &group.links(world.rank()), TIMEOUT)?;
    let mut part = AllReduce::new(&mut ends, &group, world.rank())?;
    let mut values = vec![world.rank() as f32; words];
    let mut sums = world.sums(words)?;
    let rounds = (BATCH / bytes).clamp(LEAST, MOST);
    let (mut ours, mut raw) = (f64::INFINITY, f64::INFINITY);
    let mut count = 0;
    for _ in 0..=repeat {
        world.gather(&[])?;
        let start = Instant::now();
        for _ in 0..rounds {
            part.mean(&mut values, count, 0)?;
            count += 1;
        }
        ours = ours.min(start.elapsed().as_secs_f64() / rounds as f64);
        world.gather(&[])?;
        let start = Instant::now();
        if let Some(sums) = &mut sums {
            sums.run(rounds)?;
        }
        raw = raw.min(start.elapsed().as_secs_f64() / rounds as f64);
    }
    // All are done before any drops its ends.
    world.gather(&[])?;
    Ok((ours, raw))
}
