"""Shards read with h5py and decoded with Pillow, for comparison with `sideways bench data`.

The same work as the loader's: windows of T frames at random places of random videos, each cropped and mirrored at random,
one way for all of its frames, scaled to (u8/255 - mean)/std in float32. One process, one thread; each window is one read of
HDF5. The last stage is written the usual way, and with numpy working in place on long rows. Prints one line of JSON with
frames/s of each stage, by processor time.
"""

import argparse
import io
import json
import time

import h5py
import numpy as np
import PIL
from PIL import Image

MEAN = np.array([0.43216, 0.394666, 0.37645], np.float32)
STD = np.array([0.22803, 0.22145, 0.216989], np.float32)
SCALE, SHIFT = 1 / (255 * STD), -MEAN / STD


class Shard:
    def __init__(self, path):
        file = h5py.File(path, "r")
        self.videos = file["video_offsets"][:].astype(np.int64)
        self.jpeg = file.attrs["encoding"] in ("jpeg", b"jpeg")
        self.offsets = file["frame_offsets"][:].astype(np.int64) if self.jpeg else None
        self.data = file["jpeg" if self.jpeg else "frames"]

    def read(self, start, frames):
        """Stored frames: bytes of each, or one array."""
        if not self.jpeg:
            return self.data[start : start + frames]
        at = self.offsets[start : start + frames + 1]
        stored = self.data[at[0] : at[-1]]
        return [stored[a - at[0] : b - at[0]] for a, b in zip(at, at[1:])]


def decode(stored):
    if isinstance(stored, np.ndarray):
        return stored
    return [np.asarray(Image.open(io.BytesIO(jpeg))) for jpeg in stored]


class Augment:
    """Crop and mirror bytes, then scale rows of width * 3 values: numpy is slow where the last dimension is 3."""

    def __init__(self, frames, crop):
        self.crop, self.cut = crop, np.empty((frames, crop, crop, 3), np.uint8)
        self.scale, self.shift = np.tile(SCALE, crop), np.tile(SHIFT, crop)

    def __call__(self, frames, rng, out):
        crop, (height, width, _) = self.crop, frames[0].shape
        top, left, mirrored = rng.integers(height - crop + 1), rng.integers(width - crop + 1), rng.integers(2)
        for frame, to in zip(frames, self.cut):
            frame = frame[top : top + crop, left : left + crop]
            to[:] = frame[:, ::-1] if mirrored else frame
        rows = out.reshape(len(out), crop, crop * 3)
        np.multiply(self.cut.reshape(rows.shape), self.scale, out=rows, dtype=np.float32)
        rows += self.shift


def usual(frames, crop, rng):
    """The same as most write it."""
    height, width, _ = frames[0].shape
    top, left, mirrored = rng.integers(height - crop + 1), rng.integers(width - crop + 1), rng.integers(2)
    cut = np.stack([frame[top : top + crop, left : left + crop] for frame in frames])
    if mirrored:
        cut = cut[:, :, ::-1]
    return (cut.astype(np.float32) / 255 - MEAN) / STD


def rate(seconds, frames, work):
    work()
    begun, done = time.process_time(), 0
    while time.process_time() - begun < seconds:
        work()
        done += frames
    return done / (time.process_time() - begun)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shards", nargs="+")
    parser.add_argument("--crop", type=int, default=112)
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    shards, rng, frames = [Shard(path) for path in args.shards], np.random.default_rng(1), args.frames

    def read():
        shard = shards[rng.integers(len(shards))]
        video = rng.integers(len(shard.videos) - 1)
        first, end = shard.videos[video], shard.videos[video + 1]
        if end - first < frames:
            raise SystemExit(f"h5py_pillow.py: video {video} has only {end - first} frames, fewer than --frames")
        return shard.read(first + rng.integers(end - first - frames + 1), frames)

    out = np.empty((frames, args.crop, args.crop, 3), np.float32)
    stored = read()
    decoded = decode(stored)
    augment = Augment(frames, args.crop)
    stages = {
        "read": read,
        "decode": lambda: decode(stored),
        "crop, flip, scale": lambda: augment(decoded, rng, out),
        "all": lambda: usual(decode(read()), args.crop, rng),
        "all, numpy tuned": lambda: augment(decode(read()), rng, out),
    }
    found = {name: rate(args.seconds, frames, work) for name, work in stages.items()}
    versions = {"h5py": h5py.__version__, "pillow": PIL.__version__}
    total = int(sum(shard.videos[-1] for shard in shards))
    print(json.dumps({**versions, "frames": total, "frames_per_core_second": found}))


if __name__ == "__main__":
    main()
