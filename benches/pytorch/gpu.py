"""A module's tick on a GPU beside the same layers in PyTorch, in one run, on one GPU, and one table at the end.

A tick is a forward pass, a vector-Jacobian product with a given cotangent (and the input's cotangent, but for the first
module) and an update by SGD with momentum. Both sides make many ticks back to back and divide the time; PyTorch's by CUDA
events, ours as `sideways bench layers --ticks` has it. PyTorch has channels_last, cudnn.benchmark and fused SGD; its best is
the fastest of: launched, as a CUDA graph of the whole tick, torch.compile, and both. bf16 is autocast over float32
parameters, with the module's input in bfloat16 as between our modules.

    python benches/pytorch/gpu.py                                   # on a machine with a GPU
    python benches/pytorch/gpu.py --device cpu --library-path target/cuda-emulator --small   # a rehearsal without one
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import time
import warnings

import torch
from torch import nn

from nets import NETS

HERE = os.path.dirname(os.path.abspath(__file__))
BEGUN = time.perf_counter()


def spent():
    return time.perf_counter() - BEGUN


def sideways(args, net, side, batch, precision):
    """Ticks of every module, and which layers each has."""
    sets = [f"data.crop={side}", f"data.batch={batch}", f"run.precision={precision}", "run.device=cuda",
            f"model.modules={args.modules}", "train.rule=sideways"]
    command = [args.sideways, "bench", "layers", f"{HERE}/{net}.toml", "--ticks", "--json", "--classes", str(args.classes)]
    for setting in sets:
        command += ["--set", setting]
    path = [args.library_path] if args.library_path else []
    path += [folder for folder in [os.environ.get("LD_LIBRARY_PATH")] if folder]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          env={**os.environ, "LD_LIBRARY_PATH": ":".join(path)})
    if done.returncode:
        print(f"gpu.py: exit code {done.returncode} from: {' '.join(command)}\n{done.stderr}", file=sys.stderr)
        return None
    return json.loads(done.stdout.strip().splitlines()[-1])


class Tick:
    """One module's layers at work."""

    def __init__(self, args, layers, x, first, precision, compiled):
        self.device, self.precision = args.device, precision
        self.net = nn.Sequential(*layers)
        self.call = torch.compile(self.net) if compiled else self.net
        self.x = x.detach().requires_grad_(not first)
        fused = {"fused": True} if args.device == "cuda" else {}
        parameters = list(self.net.parameters())
        self.optimizer = torch.optim.SGD(parameters, lr=1e-6, momentum=0.9, **fused) if parameters else None
        with self.autocast(), torch.no_grad():
            y = self.net(self.x)
        self.gy = torch.randn_like(y) * 1e-3

    def autocast(self):
        if self.precision != "bf16":
            return contextlib.nullcontext()
        # Weights are rounded anew at every tick, since every tick changes them.
        return torch.autocast(self.device, dtype=torch.bfloat16)

    def __call__(self):
        self.x.grad = None
        self.net.zero_grad(set_to_none=True)
        with self.autocast():
            y = self.call(self.x)
        if y.requires_grad:
            y.backward(self.gy)
        if self.optimizer:
            self.optimizer.step()


def graph_of(tick):
    """The whole tick as one CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            tick()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tick()
    return graph.replay


def seconds(args, tick):
    """Of a tick: the best of several means over many back to back."""
    if args.device == "cpu":
        tick()
        begun = time.perf_counter()
        for _ in range(3):
            tick()
        return (time.perf_counter() - begun) / 3
    for _ in range(3):
        tick()
    from_, to = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def many(count):
        torch.cuda.synchronize()
        from_.record()
        for _ in range(count):
            tick()
        to.record()
        to.synchronize()
        return from_.elapsed_time(to) * 1e-3 / count

    count = max(5, min(500, int(0.05 / max(many(3), 1e-6))))
    return min(many(count) for _ in range(3))


def pytorch(args, net, modules, side, batch, precision):
    """Seconds of every module's tick in every way that works; the whole network's output shapes come from running it."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
    torch.manual_seed(1)
    layers = [layer.to(args.device, memory_format=torch.channels_last) for layer in NETS[net](args.classes)]
    kind = torch.bfloat16 if precision == "bf16" else torch.float32
    x = torch.randn(batch, 3, side, side, device=args.device).to(kind, memory_format=torch.channels_last)
    found = []
    for k, (first, end) in enumerate(modules):
        ways = {}
        for way in args.ways.split(","):
            compiled, graphed = "compile" in way, "graph" in way
            if graphed and args.device == "cpu" or compiled and spent() > args.compile_until:
                continue
            try:
                # Some ways fail for some layers or machines: those that work count.
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    tick = Tick(args, layers[first:end], x, k == 0, precision, compiled)
                    ways[way] = seconds(args, graph_of(tick) if graphed else tick)
            except Exception as error:
                text = str(error).splitlines()
                print(f"gpu.py: {net} module {k + 1} {precision}, {way}: {text[0] if text else error!r}", file=sys.stderr)
        found.append(ways)
        with torch.no_grad(), torch.autocast(args.device, dtype=torch.bfloat16, enabled=precision == "bf16"):
            for layer in layers[first:end]:
                x = layer(x)
            x = x.to(kind)
    return found


def measure(args, net, side, batch, precision):
    ours = sideways(args, net, side, batch, precision)
    if ours is None:
        return None
    modules = [tick["layers"] for tick in ours["ticks"]]
    theirs = pytorch(args, net, modules, side, batch, precision)
    best = [min(ways.values(), default=float("nan")) for ways in theirs]
    mine = [min(tick["launches"], tick["graphs"]) for tick in ours["ticks"]]
    eager = [ways.get("launched", float("nan")) for ways in theirs]
    names = [min(ways, key=ways.get) if ways else "-" for ways in theirs]
    return {
        "net": net, "side": side, "batch": batch, "precision": precision, "gpu": ours["gpu"]["name"],
        "torch": torch.__version__, "ours": ours["ticks"], "theirs": theirs, "modules": modules,
        "sideways_ms": 1e3 * sum(mine), "launched_ms": 1e3 * sum(t["launches"] for t in ours["ticks"]),
        "graphs_ms": 1e3 * sum(t["graphs"] for t in ours["ticks"]),
        "pytorch_ms": 1e3 * sum(best), "eager_ms": 1e3 * sum(eager), "ratio": sum(mine) / sum(best),
        "worst": max(m / b for m, b in zip(mine, best)), "best_way": max(set(names), key=names.count),
    }


def table(args, rows, left_out):
    where = torch.cuda.get_device_name() if args.device == "cuda" else "the CPU (a rehearsal: the ratios say nothing)"
    print(f"\nA tick of all modules (forward + vjp + update, one after the other), ms; PyTorch {torch.__version__} on {where}")
    print(f"{'network':<9} {'side':>4} {'B':>3} {'':<4} | {'launched':>9} {'graphs':>9} | {'PyTorch':>9} {'its best':>9} "
          f"{'by':<14} | {'ratio':>6} {'worst':>6}")
    for r in rows:
        print(f"{r['net']:<9} {r['side']:>4} {r['batch']:>3} {r['precision']:<4} | {r['launched_ms']:>9.3f} {r['graphs_ms']:>9.3f} | "
              f"{r['eager_ms']:>9.3f} {r['pytorch_ms']:>9.3f} {r['best_way']:<14} | {r['ratio']:>6.3f} {r['worst']:>6.3f}")
    print("'ratio': the better of ours over PyTorch's best, all modules together; 'worst': the largest of a single module.\n"
          "'by': the way that is PyTorch's best for most modules. To reach: at most 1.0 at B >= 16, at most 0.8 at B = 4.")
    if left_out:
        print(f"left out after {args.seconds:.0f} s (--seconds), or failed: {', '.join(left_out)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="PyTorch's; ours is always CUDA's")
    parser.add_argument("--nets", default="vgg8,resnet50")
    parser.add_argument("--sides", default="112,224")
    parser.add_argument("--batches", default="4,16,64")
    parser.add_argument("--precisions", default="bf16,tf32,f32")
    parser.add_argument("--modules", type=int, default=8)
    parser.add_argument("--classes", type=int, default=600)
    parser.add_argument("--ways", default="launched,graph,compile,compile+graph", help="PyTorch's")
    parser.add_argument("--seconds", type=float, default=240, help="no new row is begun after this time")
    parser.add_argument("--compile-until", type=float, default=0,
                        help="torch.compile is tried in rows before this time, in seconds (it takes long; 0: never)")
    parser.add_argument("--sideways", default="target/release/sideways", help="built with --features cuda")
    parser.add_argument("--library-path", help="a folder of CUDA's libraries for sideways")
    parser.add_argument("--small", action="store_true", help="one tiny row, for a rehearsal")
    parser.add_argument("--json", help="also write all figures there")
    args = parser.parse_args()
    if args.small:
        args.nets, args.sides, args.batches, args.precisions, args.modules, args.classes = "vgg8", "16", "1", "f32", 2, 5
    if args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("gpu.py: PyTorch finds no GPU here (--device cpu rehearses)")
    rows, left_out = [], []
    # What matters most first: the run may be cut short.
    for batch in map(int, args.batches.split(",")):
        for side in map(int, args.sides.split(",")):
            for net in args.nets.split(","):
                for precision in args.precisions.split(","):
                    row = None
                    if spent() < args.seconds:
                        print(f"  {net} {side} B = {batch} {precision} ({spent():.0f} s)", file=sys.stderr, flush=True)
                        row = measure(args, net, side, batch, precision)
                    if row:
                        rows.append(row)
                    else:
                        left_out.append(f"{net} {side} B = {batch} {precision}")
    table(args, rows, left_out)
    if args.json:
        with open(args.json, "w") as file:
            json.dump(rows, file, indent=1)
    if not rows:
        sys.exit(1)


if __name__ == "__main__":
    main()
