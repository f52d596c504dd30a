"""Back-propagation in PyTorch on the networks of `sideways bench train`, for comparison.

The networks of nets.py, clips of T frames, the loss of a clip the mean of its frames' cross-entropies, SGD with momentum
once a clip. `--at-once` frames go through the network together: T of them are one batch of T * B images, fewer are
accumulated. Prints one line of JSON.
"""

import argparse
import json
import os
import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

from nets import NETS


def peak_mib():
    """Of this process, as /proc has it (getrusage would inherit its parent's)."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--net", choices=list(NETS), default="vgg8")
    parser.add_argument("--layout", choices=["nchw", "channels_last"], default="nchw")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--frames", type=int, default=16, help="T")
    parser.add_argument("--at-once", type=int, help="frames that go through the network together [default: T]")
    parser.add_argument("--batch", type=int, default=4, help="B, clips")
    parser.add_argument("--side", type=int, default=112)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--batches", type=int, default=3, help="batches that count, after two of warm-up")
    args = parser.parse_args()
    at_once = args.at_once or args.frames
    if args.frames % at_once:
        parser.error("--at-once must divide --frames")
    torch.set_num_threads(args.threads)
    torch.set_num_interop_threads(1)
    torch.manual_seed(1)
    layout = torch.channels_last if args.layout == "channels_last" else torch.contiguous_format
    net = nn.Sequential(*NETS[args.net](args.classes)).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.001, momentum=0.9)
    # Frames wait as bytes, as in a shard, and are scaled as they are used.
    clip = torch.randint(0, 256, (args.frames, args.batch, 3, args.side, args.side), dtype=torch.uint8)
    labels = torch.arange(args.batch) % args.classes

    def step():
        optimizer.zero_grad(set_to_none=True)
        for t in range(0, args.frames, at_once):
            x = clip[t : t + at_once].flatten(0, 1).to(torch.float32, memory_format=layout).div_(255).sub_(0.45).div_(0.225)
            loss = F.cross_entropy(net(x), labels.repeat(at_once)) * (at_once / args.frames)
            loss.backward()
        optimizer.step()

    step()
    step()
    seconds = []
    for _ in range(args.batches):
        begun = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - begun)
    frames = args.batch * args.frames
    print(json.dumps({
        "net": args.net, "layout": args.layout, "threads": args.threads, "frames": args.frames, "batch": args.batch,
        "at_once": at_once, "cores": len(os.sched_getaffinity(0)), "torch": torch.__version__,
        "frames_per_second": frames / statistics.mean(seconds), "best": frames / min(seconds), "peak_mib": peak_mib(),
        "parameters": sum(p.numel() for p in net.parameters()),
    }))


if __name__ == "__main__":
    main()
