"""How much of a machine's decoding `sideways data prepare` uses, and what a long list costs: made-up videos (ffmpeg's testsrc2 with
noise, H.264) are prepared, and decoded and scaled by the same ffmpeg processes alone (to RGB, which raw shards hold, to JPEG's
YCbCr, and to JPEG), in turns; then a list of Kinetics' form of which one clip in a hundred is there is prepared until the first is decoded.

    python3 benches/data/prepare.py [--rounds N] [--jobs N] [--size 340x256] [--program target/release/sideways] [--before PROGRAM]

Needs ffmpeg. `cores` is processor time over the clock: less than --jobs where others compute too, and then processor time compares better.
"""

import argparse
import os
import resource
import shlex
import shutil
import statistics
import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HEIGHT, WIDTH = 128, 171
# As src/data/prepare/ffmpeg.rs has them: for raw shards, and for JPEG.
SCALE = (
    f"setpts=PTS-STARTPTS,fps=25,scale=w='max({WIDTH},round({HEIGHT}*iw*sar/ih))':h='max({HEIGHT},round({WIDTH}*ih/(iw*sar)))'"
    ":flags=bicubic+accurate_rnd+bitexact"
)
# What is written, and what is said to the filter that scales: RGB, JPEG's own colours, and JPEG itself.
WAYS = {
    "RGB": ("-pix_fmt rgb24 -f rawvideo", ""),
    "YCbCr": ("-pix_fmt yuv444p -f rawvideo", ":out_color_matrix=bt601:out_range=pc"),
    "JPEG": ("-pix_fmt yuvj444p -f mpjpeg -c:v mjpeg -q:v 8 -huffman default -flags:v +bitexact -threads 1", ":out_color_matrix=bt601:out_range=pc"),
}


def film(path, size, seconds):
    path.parent.mkdir(parents=True, exist_ok=True)
    source = f"testsrc2=size={size}:rate=25:duration={seconds},noise=alls=8:allf=t"
    subprocess.run(["ffmpeg", "-v", "error", "-y", "-f", "lavfi", "-i", source, "-c:v", "libx264", "-preset", "veryfast", path], check=True)


def tables():
    """ffmpeg's options for JPEG's tables at quality 90, those of the JPEG files that `data prepare` writes."""
    luminance = [16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51, 87, 80, 62]
    luminance += [18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99]
    chrominance = [17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66] + [99] * 38
    text = lambda table: ",".join(str((20 * step + 50) // 100) for step in table)
    return ["-intra_matrix", text(luminance), "-chroma_intra_matrix", text(chrominance)]


def alone(videos, jobs, way):
    written, colours = WAYS[way]
    command = ["ffmpeg", "-nostdin", "-v", "error", "-threads", "1", "-filter_threads", "1", "-i", "@", "-map", "0:V:0", "-t", "30"]
    command += ["-vf", f"{SCALE}{colours},crop={WIDTH}:{HEIGHT}", *written.split()]
    command += (tables() if way == "JPEG" else []) + ["-y", "/dev/null"]
    files = "\n".join(map(str, videos))
    subprocess.run(["xargs", "-P", str(jobs), "-I@", *command], input=files, text=True, check=True)


def prepare(program, videos, out, *more):
    shutil.rmtree(out, ignore_errors=True)
    command = [program, "data", "prepare", "--videos", videos, "--out", out, *more]
    subprocess.run([str(word) for word in command], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measured(work):
    """Seconds by the clock, and of processors."""
    used = lambda: sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before, begun = used(), time.monotonic()
    work()
    return time.monotonic() - begun, used() - before


def decoding(args, folder):
    videos = [folder / f"films-{args.size}-{args.videos}/{'ab'[n % 2]}/{n}.mp4" for n in range(args.videos)]
    for n, path in enumerate(videos):
        if n < 2 and not path.exists():
            film(path, args.size, 10)
        elif not path.exists():
            os.link(videos[n % 2], path)
    def preparing(encoding, program=args.program):
        return lambda: prepare(program, videos[0].parents[1], folder / encoding, "--encoding", encoding, "--jobs", args.jobs)

    # Each beside what it is compared with.
    ways = {f"ffmpeg to {way}": lambda way=way: alone(videos, args.jobs, way) for way in ("YCbCr", "RGB")}
    ways["prepare, raw"] = preparing("raw")
    if args.before:
        ways["before, raw"] = preparing("raw", args.before)
    ways["ffmpeg to JPEG"] = lambda: alone(videos, args.jobs, "JPEG")
    ways["prepare, JPEG"] = preparing("jpeg")
    if args.before:
        ways["before, JPEG"] = preparing("jpeg", args.before)
    taken = {name: [] for name in ways}
    for round in range(args.rounds):
        # There and back, lest one way always follows the same other.
        for name in list(ways)[:: -1 if round % 2 else 1]:
            taken[name].append(measured(ways[name]))
    frames = 250 * len(videos)
    print(f"{len(videos)} videos of {args.size}, {args.jobs} at a time; medians of {args.rounds} rounds, with the least and the most of what is beside")
    print("ffmpeg alone in the same round, by the clock and by processor time")
    for name, all in taken.items():
        clock, used = (statistics.median(one[k] for one in all) for k in (0, 1))
        print(f"{name:15} {frames / clock:6.0f} frames/s  {used / frames * 1e3:.2f} ms of processors a frame  {used / clock:.2f} cores")
        for way in WAYS if "ffmpeg" not in name else []:
            of = [sorted(alone[k] / one[k] for alone, one in zip(taken[f"ffmpeg to {way}"], all)) for k in (0, 1)]
            clock, used = (f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})" for ratios in of)
            print(f"    of ffmpeg to {way:5}  {clock}  {used}")


def listed(args, folder, clips):
    """Until the first video is decoded, of a list of which one clip in so many is there; and the largest memory by then."""
    place = folder / f"list-{clips}-{args.one_in}"
    place.mkdir(exist_ok=True)
    # A file has no more than some ten thousand names.
    ones = [place / f"one-{n}.mp4" for n in range(clips // args.one_in // 30_000 + 1)]
    for one in ones:
        if one is ones[0] and not one.exists():
            film(one, "160x120", 1)
        elif not one.exists():
            shutil.copy(ones[0], one)
    if not (place / "lists").exists():
        (place / "lists").mkdir()
        (place / "videos").mkdir()
        with open(place / "lists/train.csv", "w") as file:
            file.write("label,youtube_id,time_start,time_end,split\n")
            for n in range(clips):
                file.write(f"class {n % 600},{n:011},{n % 500},{n % 500 + 10},train\n")
                if n % args.one_in == 0:
                    os.link(ones[n // args.one_in // 30_000], place / f"videos/{n:011}_{n % 500:06}_{n % 500 + 10:06}.mp4")
    # ffmpeg, which says when it is first asked for a video.
    first = place / "first"
    first.unlink(missing_ok=True)
    (place / "bin").mkdir(exist_ok=True)
    wrapper = place / "bin/ffmpeg"
    wrapper.write_text(f"#!/bin/sh\ncase \"$*\" in *file:*) : > {shlex.quote(str(first))};; esac\nexec {shutil.which('ffmpeg')} \"$@\"\n")
    wrapper.chmod(0o755)
    shutil.rmtree(place / "out", ignore_errors=True)
    command = [args.program, "data", "prepare", "--layout", "kinetics", "--videos", place / "videos", "--annotations", place / "lists"]
    command += ["--out", place / "out"]
    environment = dict(os.environ, PATH=f"{place / 'bin'}:{os.environ['PATH']}")
    begun = time.monotonic()
    run = subprocess.Popen([str(word) for word in command], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    seconds, peak = None, 0
    while run.poll() is None and (seconds is None or time.monotonic() - begun < seconds + 3):
        if seconds is None and first.exists():
            seconds = time.monotonic() - begun
        try:
            status = Path(f"/proc/{run.pid}/status").read_text()
            peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) / 1024)
        except (OSError, IndexError):
            pass  # it is just ending
        time.sleep(0.01)
    run.terminate()
    run.wait()
    print(f"{clips:9} clips listed, {clips // args.one_in:6} there: the first is decoded after {seconds:5.1f} s, memory up to {peak:5.0f} MiB")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", type=Path, default=ROOT / "target/release/sideways")
    parser.add_argument("--before", type=Path, help="an earlier build of the program, to run beside this one")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--videos", type=int, default=40)
    parser.add_argument("--size", default="340x256")
    parser.add_argument("--clips", type=int, nargs="*", default=[1_000, 10_000, 100_000])
    parser.add_argument("--one-in", type=int, default=100, help="of the listed clips one in so many is there")
    args = parser.parse_args()
    folder = ROOT / "target/bench-prepare"
    folder.mkdir(parents=True, exist_ok=True)
    if args.rounds:
        decoding(args, folder)
    for clips in args.clips:
        listed(args, folder, clips)


if __name__ == "__main__":
    main()
