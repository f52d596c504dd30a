"""`make bench-data`: frames/s from shards, beside h5py with Pillow on the same shards and ffmpeg on the videos themselves.

Makes the videos (zooms into the Mandelbrot set, 340x256, H.264) and shards of 128x171 frames of them if they are not
there. Every figure is of a process of its own, with the files in the page cache; see docs/performance.md.
"""

import argparse
import glob
import json
import os
import shlex
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
BASELINE = {"all": "h5py + Pillow", "all, numpy tuned": "h5py + Pillow, numpy tuned"}


def run(args, command, measured=True):
    """The standard output of a command."""
    full = (shlex.split(args.under) if measured else []) + command
    print("  " + " ".join(full), file=sys.stderr, flush=True)
    done = subprocess.run(full, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(f"compare.py: exit code {done.returncode} from: {' '.join(full)}")
    return done.stdout


def make(args):
    """Eight videos of ten seconds in two classes, and both kinds of shards of them."""
    for n in range(8):
        path = f"{args.data}/videos/{'ab'[n % 2]}/{n}.mp4"
        if os.path.exists(path):
            continue
        os.makedirs(os.path.dirname(path), exist_ok=True)
        source = f"mandelbrot=size=340x256:rate=25:start_scale={3 / (1 + n)}:end_scale={0.01 * (n + 1)}:end_pts=400:maxiter=2000"
        command = ["ffmpeg", "-nostdin", "-loglevel", "error", "-y", "-f", "lavfi", "-i", source, "-t", "10"]
        command += ["-vf", "hue=H=0.2*t", "-c:v", "libx264", "-crf", "23", "-pix_fmt", "yuv420p", "-f", "mp4"]
        run(args, command + [path + ".new"], False)
        os.rename(path + ".new", path)
    for encoding in ("jpeg", "raw"):
        if not glob.glob(f"{args.data}/{encoding}/*.h5"):
            command = [args.sideways, "data", "prepare", "--videos", f"{args.data}/videos", "--out", f"{args.data}/{encoding}"]
            run(args, command + ["--encoding", encoding, "--short-side", "128"], False)
    return sorted(glob.glob(f"{args.data}/videos/*/*.mp4"))


def compare(args, encoding, videos):
    shards = sorted(glob.glob(f"{args.data}/{encoding}/*.h5"))
    command = [args.sideways, "bench", "data", *shards, "--crop", str(args.crop), "--seconds", str(args.seconds), "--json"]
    if args.threads:
        command += ["--threads", args.threads]
    ours = json.loads(run(args, command + (["--videos", *videos] if encoding == "jpeg" else [])))
    command = [args.python, f"{HERE}/h5py_pillow.py", *shards, "--crop", str(args.crop), "--seconds", str(args.seconds)]
    theirs = json.loads(run(args, command))
    found = dict(ours["stages"])
    loader = next(rate for name, rate in ours["stages"] if name.startswith("loader"))

    print(f"\n{encoding}, frames of {ours['height']}x{ours['width']}, {os.path.getsize(shards[0]) / theirs['frames']:.0f} bytes each in "
          f"the shard; crop {ours['crop']}; h5py {theirs['h5py']}, Pillow {theirs['pillow']}")
    print(f"{'':<32} {'frames/s':>10} {'a core':>10} {'MB/s':>8} {'loader/it':>10}")
    for name, rate in ours["stages"]:
        ratio = loader["frames_per_core_second"] / rate["frames_per_core_second"]
        megabytes = f"{rate['bytes_per_second'] / 1e6:>8.0f}" if rate["bytes_per_second"] else f"{'':>8}"
        print(f"{name:<32} {rate['frames_per_second']:>10.0f} {rate['frames_per_core_second']:>10.0f} {megabytes} {ratio:>10.2f}")
    for stage, rate in theirs["frames_per_core_second"].items():
        name = BASELINE.get(stage, f"  its {stage}")
        if not (encoding == "raw" and stage == "decode"):
            print(f"{name:<32} {'':>10} {rate:>10.0f} {'':>8} {loader['frames_per_core_second'] / rate:>10.2f}")
    plain, read = (found[name]["bytes_per_second"] for name in ("plain read of the files", "read"))
    print(f"read over a plain read of the same file: {read / plain:.2f}")
    return {"encoding": encoding, "sideways": ours, "h5py_pillow": theirs}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="target/bench-data", help="folder of videos and shards; made if they are not there")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--threads", help="decode threads to measure, such as 1,2,4")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--sideways", default="target/release/sideways")
    parser.add_argument("--python", default=sys.executable, help="one that has h5py and Pillow")
    parser.add_argument("--under", default="", help="a command put in front of every measurement")
    parser.add_argument("--json", help="also write all figures there")
    args = parser.parse_args()
    videos = make(args)
    found = [compare(args, encoding, videos) for encoding in ("jpeg", "raw")]
    print("\n'a core': by processor time, of all threads and children. 'loader/it': the loader's frames/s a core with the fewest\n"
          "decode threads over that line's.")
    if args.json:
        with open(args.json, "w") as file:
            json.dump(found, file, indent=1)


if __name__ == "__main__":
    main()
