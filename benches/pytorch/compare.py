"""`make bench-pytorch`: sideways and back-propagation in PyTorch on the same network, on this machine, side by side.

Every figure is of a process of its own, pinned to the cores it is allowed (taskset); nothing runs beside it. PyTorch's
frames wait in memory, Sideways' come from a shard through its loader. See docs/performance.md for what the rows compare.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    # A core a rank: the figures are of bound ranks.
    "OMPI_MCA_rmaps_base_oversubscribe": "0",
    "OMPI_MCA_mpi_yield_when_idle": "0",
}


def run(args, command, cores=None):
    """The line of JSON that a command prints last."""
    pinned = ["taskset", "-c", ",".join(map(str, cores))] if cores else []
    full = shlex.split(args.under) + pinned + command
    print("  " + " ".join(full), file=sys.stderr, flush=True)
    done = subprocess.run(full, stdout=subprocess.PIPE, text=True, env={**os.environ, **MPI})
    if done.returncode:
        sys.exit(f"compare.py: exit code {done.returncode} from: {' '.join(full)}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def pytorch(args, net, threads, frames, at_once, layout, batches):
    command = [args.python, f"{HERE}/bp.py", "--net", net, "--threads", str(threads), "--frames", str(frames)]
    command += ["--at-once", str(at_once), "--layout", layout, "--batches", str(batches)]
    return run(args, command, range(threads))


def sideways(args, net, cores, sets, batches, ranks=1):
    command = [args.sideways, "bench", "train", f"{HERE}/{net}.toml", "--json", "--batches", str(batches)]
    for setting in sets:
        command += ["--set", setting]
    if ranks > 1:
        return run(args, ["mpirun", "-n", str(ranks), "--bind-to", "core"] + command)
    return run(args, command, cores)


def baseline(args, net):
    """PyTorch's rows: layouts, batches of frames, cores; and T = 64 in the layout that is faster."""
    rows = []
    for threads in (1, 2):
        for at_once, what in ((16, "all of T at once"), (1, "a frame at a time")):
            for layout in ("nchw", "channels_last"):
                found = pytorch(args, net, threads, 16, at_once, layout, args.batches)
                rows.append((f"PyTorch bp, {what}, {layout}", threads, 16, found))
    layout = max(rows[:2], key=lambda row: row[3]["frames_per_second"])[3]["layout"]
    rows.append((f"PyTorch bp, all of T at once, {layout}", 1, 64, pytorch(args, net, 1, 64, 64, layout, 1)))
    return rows


def pairs(args, net):
    """(speed of 2 ranks over 1, the 1 rank's figures, the 2 ranks' figures), slowest first. A shared host's speed changes
    within minutes, so the two of a pair run one after the other."""
    # A first run measures the layers, to cut by; the others find them measured.
    cuts = sideways(args, net, None, ["train.rule=sideways"], 1, ranks=2)["cuts"]
    cut = ["train.rule=sideways", f"model.cuts={cuts}"]
    found = []
    for _ in range(args.pairs):
        two = sideways(args, net, None, cut, 2 * args.batches, ranks=2)
        one = sideways(args, net, [0], cut, 2 * args.batches)
        found.append((two["frames_per_second"] / one["frames_per_second"], one, two))
    return sorted(found, key=lambda pair: pair[0])


def compare(args, net, known):
    modules = ["model.modules=8", "model.skip.spans=[2]"]
    whole = ["model.modules=1", "train.rule=sideways"]
    rows = [(row["what"], row["cores_used"], row["frames"], row) for row in known] or baseline(args, net)
    best, memory = {}, {}
    for _, cores, frames, found in rows:
        if frames == 16 and found["frames_per_second"] > best.get(cores, {}).get("frames_per_second", 0):
            best[cores] = found
        # Peak memory is compared with the batch of all frames, whichever is faster.
        if cores == 1 and found["at_once"] == frames:
            memory[frames] = min(found["peak_mib"], memory.get(frames, found["peak_mib"]))

    def add(what, cores, frames, found):
        rows.append((f"sideways, {what}", cores, frames, found))

    add("8 modules, spans [2], one process", 1, 16, sideways(args, net, [0], modules, args.batches))
    add("8 modules, spans [2], one process", 1, 64, sideways(args, net, [0], modules + ["data.frames=64"], 1))
    add("1 module (exact bp, frame by frame)", 1, 16, sideways(args, net, [0], whole, args.batches))
    add("8 modules, spans [2], one process", 2, 16, sideways(args, net, [0, 1], modules, args.batches))
    both = pairs(args, net)
    gain, one, two = both[len(both) // 2]
    add(f"cut before {two['cuts']}, 1 rank", 1, 16, one)
    add(f"cut before {two['cuts']}, 2 ranks", 2, 16, two)

    print(f"\n{net}, 112x112, B = 4, 600 classes, float32; PyTorch {best[1]['torch']}, sideways with {one['back_end']}")
    print(f"{'':<44} {'cores':>5} {'T':>3} {'frames/s':>9} {'/PyTorch':>9} {'peak MiB':>9} {'/PyTorch':>9} {'backward':>9}")
    for what, cores, frames, found in rows:
        speed = found["frames_per_second"] / best[cores]["frames_per_second"]
        size = found["peak_mib"] / memory[frames]
        share = 100 * found.get("backward_share", 1.0)
        print(f"{what:<44} {cores:>5} {frames:>3} {found['frames_per_second']:>9.2f} {speed:>9.2f} "
              f"{found['peak_mib']:>9.0f} {size:>9.2f} {share:>8.1f}%")
    gains = " ".join(f"{pair[0]:.3f}" for pair in both)
    print(f"2 ranks over 1 rank, cut before {two['cuts']}: {gain:.3f} of 2, the median of {len(both)} pairs of runs ({gains}); "
          f"an efficiency of {gain / 2:.3f}, mean/max of the ranks' busy time {two['balance']:.3f} "
          f"(of which {gain / 2 / two['balance']:.3f})")
    predicted = [(what, found) for what, _, _, found in rows if found.get("predicted_tick_ms")]
    for what, found in predicted:
        print(f"tick of {what}, {found['ranks']} rank(s) on {found['cores']} core(s), T = {found['frames']}: predicted "
              f"{found['predicted_tick_ms']:.1f} ms, measured {found['tick_ms']:.1f} ms, "
              f"ratio {found['tick_ms'] / found['predicted_tick_ms']:.3f}")
    return {"net": net, "rows": [dict(found, what=what, cores_used=cores) for what, cores, _, found in rows]}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nets", default="vgg8,resnet18")
    parser.add_argument("--sideways", default="target/release/sideways")
    parser.add_argument("--python", default=sys.executable, help="one that has torch")
    parser.add_argument("--batches", type=int, default=2, help="batches that count; of 2 ranks over 1 twice as many")
    parser.add_argument("--pairs", type=int, default=5, help="runs of 2 ranks, and of 1 rank with the same cut")
    parser.add_argument("--under", default="", help="a command put in front of every measurement")
    parser.add_argument("--json", help="also write all figures there")
    parser.add_argument("--again", help="take PyTorch's figures from what --json wrote before, and say so")
    args = parser.parse_args()
    if args.pairs < 1:
        parser.error("--pairs must be at least 1")
    if len(os.sched_getaffinity(0)) < 2:
        sys.exit("compare.py: two cores are needed for the rows of two")
    before = {}
    if args.again:
        with open(args.again) as file:
            before = {net["net"]: [row for row in net["rows"] if "torch" in row] for net in json.load(file)}
        print(f"PyTorch's figures are those of an earlier run ({args.again})")
    found = [compare(args, net, before.get(net, [])) for net in args.nets.split(",")]
    print("\n'/PyTorch': frames/s over PyTorch's best on as many cores; peak memory over PyTorch's with all frames of T at once.\n"
          "'backward': the share of modules' steps with backward work. Sideways does none in the first steps of a clip, so its\n"
          "T = 16 rows compute less than bp; the rows of T = 64 and of 1 module do (nearly) all of it.")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
