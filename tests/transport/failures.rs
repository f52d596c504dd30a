//! What goes wrong on links: messages out of place, ends that are gone, waits, workers and ranks that fail.

use super::*;

fn link(kind: Kind, from: usize, to: usize) -> LinkSpec {
    let id = (10 * from + to) as u32;
    LinkSpec { id, kind, from, to, words: 64, depth: 2, name: format!("module {} -> {}", from + 1, to + 1) }
}

fn two_workers(timeout: Duration) -> (Sender, Receiver, LinkSpec, Endpoints) {
    let link = link(Kind::Activation, 0, 1);
    let mut endpoints = connect(&World::Alone, &[0, 0], std::slice::from_ref(&link), timeout).unwrap();
    (endpoints.sender(1).unwrap(), endpoints.receiver(1).unwrap(), link, endpoints)
}

fn contains(error: &Error, parts: &[&str]) {
    let text = error.to_string();
    parts.iter().for_each(|part| assert!(text.contains(part), "{part:?} is not in: {text}"));
}

#[test]
fn a_message_out_of_place_shows_both_headers() {
    let (mut sender, mut receiver, link, _endpoints) = two_workers(MINUTE);
    sender.send(&link.header(4, 7, [8, 2, 1, 1]), &[0.0; 16]).unwrap();
    let error = receiver.wait(&link.header(4, 8, [8, 2, 1, 1])).unwrap_err();
    contains(&error, &["\"module 1 -> 2\"", "batch 4 step 8", "batch 4 step 7", "8x2x1x1", "step differ"]);
    assert_eq!(receiver.wait(&link.header(4, 7, [8, 2, 1, 1])).unwrap().len(), 16);
}

#[test]
fn misuse_is_refused() {
    let (mut sender, mut receiver, link, _endpoints) = two_workers(MINUTE);
    contains(&sender.send(&link.header(0, 0, [65, 1, 1, 1]), &[0.0; 65]).unwrap_err(), &["larger", "64 words"]);
    contains(&sender.send(&link.header(0, 0, [4, 1, 1, 1]), &[0.0; 5]).unwrap_err(), &["4 words", "given 5 words"]);
    let foreign = Header::new(Kind::Cotangent, 2, 0, 0, [1; 4]);
    contains(&sender.send(&foreign, &[0.0]).unwrap_err(), &["cotangent link 2", "activation messages on link 1"]);
    contains(&receiver.release().unwrap_err(), &["not held"]);
}

#[test]
fn lists_that_cannot_work_are_refused() {
    let connect = |ranks: &[usize], links: &[LinkSpec]| match connect(&World::Alone, ranks, links, MINUTE) {
        Ok(_) => panic!("accepted"),
        Err(error) => error,
    };
    let good = link(Kind::Activation, 0, 1);
    contains(&connect(&[0, 1], std::slice::from_ref(&good)), &["worker 1 is placed on rank 1", "only 1 ranks"]);
    contains(&connect(&[0, 0], &[good.clone(), good.clone()]), &["number is also that of"]);
    contains(&connect(&[0], std::slice::from_ref(&good)), &["worker 1 does not exist"]);
    contains(&connect(&[0, 0], &[LinkSpec { depth: 0, ..good.clone() }]), &["depth is 0"]);
    contains(&connect(&[0, 0], &[LinkSpec { words: 1 << 31, ..good }]), &["2147483648 words", "2147483631"]);
}

#[test]
fn a_wait_is_bounded_and_says_for_what() {
    let (mut sender, mut receiver, link, _endpoints) = two_workers(Duration::from_millis(30));
    let error = receiver.wait(&link.header(12, 5, [4, 1, 1, 1])).unwrap_err();
    contains(&error, &["rank 0", "link 1 \"module 1 -> 2\"", "batch 12 step 5", "waited 0.0 s"]);
    for step in 0..2 {
        sender.send(&link.header(1, step, [1; 4]), &[1.0]).unwrap();
    }
    contains(&sender.send(&link.header(1, 2, [1; 4]), &[1.0]).unwrap_err(), &["depth 2", "after sending", "step 1"]);
}

#[test]
fn an_end_that_is_gone_is_an_error_and_what_it_sent_still_counts() {
    let (mut sender, mut receiver, link, _endpoints) = two_workers(MINUTE);
    sender.send(&link.header(0, 0, [1; 4]), &[2.0]).unwrap();
    drop(sender);
    assert_eq!(receiver.wait(&link.header(0, 0, [1; 4])).unwrap(), [2.0]);
    receiver.release().unwrap();
    contains(&receiver.wait(&link.header(0, 1, [1; 4])).unwrap_err(), &["worker 0 ended without sending", "step 1"]);
    let (mut sender, receiver, link, _endpoints) = two_workers(MINUTE);
    drop(receiver);
    contains(&sender.send(&link.header(0, 0, [1; 4]), &[2.0]).unwrap_err(), &["worker 1 ended"]);
}

#[test]
fn a_failed_worker_stops_the_others() {
    let (_sender, mut receiver, link, endpoints) = two_workers(MINUTE);
    let start = Instant::now();
    let waiting = std::thread::spawn(move || receiver.wait(&link.header(0, 0, [1; 4])).map(|_| ()).unwrap_err());
    endpoints.breaker().trip("rank 0 tick 17: the loss is not a number");
    contains(&waiting.join().unwrap(), &["another worker", "tick 17: the loss"]);
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn a_panicking_worker_stops_the_others() {
    let (sender, mut receiver, link, _endpoints) = two_workers(MINUTE);
    let panicking = std::thread::spawn(move || {
        let _sender = sender;
        panic!("on purpose");
    });
    contains(&receiver.wait(&link.header(0, 0, [1; 4])).unwrap_err(), &["worker 0"]);
    assert!(panicking.join().is_err());
}

/// A chain in which rank 1 does as `fault` says at tick 3, while the others would wait for a minute.
fn faulty_chain(world: &World, kind: Kind, fault: impl Fn(&mut Sender, &LinkSpec) -> Result<()>) -> Result<()> {
    let size = world.size();
    let ranks: Vec<usize> = (0..size).collect();
    let links: Vec<LinkSpec> = (0..size).map(|from| link(kind, from, (from + 1) % size)).collect();
    let mut endpoints = connect(world, &ranks, &links, MINUTE)?;
    let (out, inward) = (&links[world.rank()], &links[(world.rank() + size - 1) % size]);
    let (mut sender, mut receiver) = (endpoints.sender(out.id).unwrap(), endpoints.receiver(inward.id).unwrap());
    for tick in 0..10_000 {
        if tick == 3 && world.rank() == 1 {
            fault(&mut sender, out)?;
        }
        sender.send(&out.header(0, tick, [1; 4]), &[0.0])?;
        receiver.wait(&inward.header(0, tick, [1; 4]))?;
        receiver.release()?;
    }
    sender.flush()
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_out_of_place() {
    rank(|world| faulty_chain(world, Kind::Activation, |sender, out| sender.send(&out.header(0, 99, [1; 4]), &[0.0])));
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_out_of_place_in_shared_memory() {
    rank(|world| faulty_chain(world, Kind::Gradient, |sender, out| sender.send(&out.header(0, 99, [1; 4]), &[0.0])));
}

#[test]
fn out_of_place_between_ranks() {
    for function in ["failures::rank_out_of_place", "failures::rank_out_of_place_in_shared_memory"] {
        fails(3, function, 1, &["rank 2 on", "batch 0 step 3", "batch 0 step 99", "step differ"]);
    }
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_error() {
    rank(|world| {
        faulty_chain(world, Kind::Activation, |_, _| Err(Error::input("edge 3 tick 17: there is no frame 9")))
    });
}

#[test]
fn a_failing_rank_ends_the_job() {
    fails(4, "failures::rank_error", 2, &["rank 1 on", "edge 3 tick 17: there is no frame 9"]);
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_panic() {
    rank(|world| faulty_chain(world, Kind::Activation, |_, _| panic!("on purpose")));
}

#[test]
fn a_panicking_rank_ends_the_job() {
    fails(3, "failures::rank_panic", 1, &["on purpose"]);
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_killed() {
    rank(|world| {
        faulty_chain(world, Kind::Gradient, |_, _| {
            // SAFETY: ends this process, as the out-of-memory killer would.
            unsafe { libc::raise(libc::SIGKILL) };
            Ok(())
        })
    });
}

#[test]
fn a_killed_rank_ends_the_job() {
    // Of a signal Open MPI's mpirun makes 128 and its number, MPICH's the number.
    let code = if std::env::var_os(LAUNCHER).is_some() { 9 } else { 137 };
    fails(4, "failures::rank_killed", code, &["signal 9"]);
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_timeout() {
    rank(|world| silence(world, Kind::Cotangent));
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_timeout_in_shared_memory() {
    rank(|world| silence(world, Kind::Gradient));
}

/// Rank 0 waits for a message that does not come.
fn silence(world: &World, kind: Kind) -> Result<()> {
    let link = link(kind, 1, 0);
    let mut endpoints = connect(world, &[0, 1], std::slice::from_ref(&link), Duration::from_millis(200))?;
    match endpoints.receiver(link.id) {
        Ok(mut receiver) => receiver.wait(&link.header(12, 5, [4, 4, 2, 2])).map(|_| ()),
        Err(_) => loop {
            std::thread::sleep(Duration::from_secs(1));
        },
    }
}

#[test]
fn a_wait_between_ranks_is_bounded() {
    let parts = ["rank 0, link 10 \"module 2 -> 1\"", "batch 12 step 5", "waited 0.2 s", "worker 1 on rank 1"];
    fails(2, "failures::rank_timeout", 1, &parts);
    fails(2, "failures::rank_timeout_in_shared_memory", 1, &parts);
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_fills_shared_memory() {
    rank(|world| {
        let link = link(Kind::Gradient, 0, 1);
        let mut endpoints = connect(world, &[0, 1], std::slice::from_ref(&link), Duration::from_millis(200))?;
        if let Ok(mut sender) = endpoints.sender(link.id) {
            contains(&sender.send(&link.header(0, 0, [65, 1, 1, 1]), &[0.0; 65]).unwrap_err(), &["64 words"]);
            for step in 0..2 {
                assert!(sender.ready()?);
                sender.send(&link.header(1, step, [1; 4]), &[step as f32])?;
            }
            assert!(!sender.ready()?);
            let late = sender.send(&link.header(1, 2, [1; 4]), &[2.0]).unwrap_err();
            contains(&late, &["depth 2", "after sending", "batch 1 step 1"]);
            sender.flush()?;
        }
        // The sender's end is gone, and what it sent is there.
        world.gather(&[])?;
        if let Ok(mut receiver) = endpoints.receiver(link.id) {
            contains(&receiver.release().unwrap_err(), &["not held"]);
            for step in 0..2 {
                assert!(receiver.ready()?);
                assert_eq!(receiver.wait(&link.header(1, step, [1; 4]))?, [step as f32]);
                receiver.release()?;
            }
            assert!(!receiver.ready()?);
        }
        Ok(())
    });
}

#[test]
fn shared_memory_holds_what_a_link_is_deep() {
    passes(2, "failures::rank_fills_shared_memory");
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_disagrees() {
    rank(|world| world.agree(if [1, 3].contains(&world.rank()) { 5 } else { 4 }, "the configuration"));
}

#[test]
fn ranks_that_disagree_are_named() {
    let output =
        fails(4, "failures::rank_disagrees", 2, &["the configuration is not the same", "rank 1 (", "rank 3 ("]);
    assert_eq!(output.matches("is not the same").count(), 1, "one rank prints: {output}");
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_lists_other_links() {
    rank(|world| {
        let words = if world.rank() == 2 { 63 } else { 64 };
        let links: Vec<LinkSpec> =
            (0..3).map(|from| LinkSpec { words, ..link(Kind::Activation, from, (from + 1) % 3) }).collect();
        // What each rank says of links that are not its own does not count, and need not be said.
        let own = links.into_iter().filter(|link| link.from == world.rank() || link.to == world.rank());
        connect(world, &[0, 1, 2], &own.collect::<Vec<_>>(), MINUTE).map(|_| ())
    });
}

#[test]
fn ends_that_know_a_link_differently_are_refused() {
    fails(
        3,
        "failures::rank_lists_other_links",
        2,
        &["the list of links between modules is not the same on all ranks"],
    );
}

#[test]
#[ignore = "one rank of an MPI test"]
fn rank_start_fails() {
    rank(|world| {
        let opened = if world.rank() == 2 { Err(Error::input("train-0.h5: no such file")) } else { Ok(()) };
        world.first_error(opened)
    });
}

#[test]
fn an_error_at_the_start_is_printed_once() {
    let output = fails(3, "failures::rank_start_fails", 2, &["rank 2: train-0.h5: no such file"]);
    assert_eq!(output.matches("no such file").count(), 1, "one rank prints: {output}");
}
