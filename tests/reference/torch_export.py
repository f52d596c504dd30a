"""Trains networks of many kinds for a few batches, exports them (`sideways export --torch`), and compares what their model.py computes in
PyTorch on the test clips with `sideways eval` and `sideways predict`. Prints a line a network; ends with exit code 1 where one is off by
more than TOLERANCE. Last, the weights of torchvision's ResNets go the other way.

    make test-torch        # in an environment of its own: torch, torchvision, safetensors, h5py, numpy, pillow
    python tests/reference/torch_export.py [--program target/release/sideways] [NETWORK…]
"""

import argparse
import csv
import importlib.util
import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import h5py
import numpy as np
import torch
from PIL import Image

TOLERANCE = 1e-4
# Five modules whose channels differ.
LAYERS = """[
    { kind = "conv2d", out = 8, kernel = 3, stride = 2, padding = 1 }, { kind = "relu" },
    { kind = "conv2d", out = 12, kernel = 3, padding = 1 }, { kind = "group-norm", groups = 2 }, { kind = "relu" },
    { kind = "conv2d", out = 12, kernel = 3, padding = 1, groups = 4 }, { kind = "gelu" },
    { kind = "max-pool", kernel = 3, stride = 2, padding = 2 },
    { kind = "conv2d", out = 8, kernel = 3, stride = 2, padding = 1, bias = false }, { kind = "batch-norm" }, { kind = "relu" },
    { kind = "dropout", rate = 0.1 }, { kind = "global-avg-pool" }, { kind = "linear", out = 8 },
]"""
# Outputs of 13x13, 7x7, 12x12, 12x12 pixels: skips are averaged by ratios that are no whole numbers, and spread.
UNEVEN = """[
    { kind = "conv2d", out = 4, kernel = 3, padding = 1 }, { kind = "relu" },
    { kind = "conv2d", out = 6, kernel = 3, stride = 2, padding = 1 }, { kind = "group-norm", groups = 2 }, { kind = "relu" },
    { kind = "conv2d", out = 6, kernel = 3, stride = 2, padding = 1 }, { kind = "gelu" }, { kind = "upsample", factor = 3 },
    { kind = "conv2d", out = 4, kernel = 3, padding = 1 }, { kind = "relu" },
    { kind = "avg-pool", kernel = 3, stride = 2, padding = 1 }, { kind = "linear", out = 16 }, { kind = "relu" },
    { kind = "linear", out = 8 },
]"""


def resnet_with_batch_norm(blocks, kind, widen):
    """torchvision's ResNets, layer by layer."""
    residual = ", ".join(
        f"{{ kind = 'residual', out = {(64 << s) * widen}, stride = {2 if s > 0 and n == 0 else 1}, block = '{kind}', norm = 'batch' }}"
        for s, count in enumerate(blocks) for n in range(count)
    )
    return (
        "[{ kind = 'conv2d', out = 64, kernel = 7, stride = 2, padding = 3, bias = false }, { kind = 'batch-norm' }, { kind = 'relu' }, "
        f"{{ kind = 'max-pool', kernel = 3, stride = 2, padding = 1 }}, {residual}, {{ kind = 'global-avg-pool' }}, "
        "{ kind = 'linear', out = 8 }]"
    )


RESNETS = {
    "resnet18": resnet_with_batch_norm([2, 2, 2, 2], "basic", 1),
    "resnet50": resnet_with_batch_norm([3, 4, 6, 3], "bottleneck", 4),
}
AUTOENCODER = ["model.task='future-frames'", "model.preset='autoencoder'", "model.modules=8", "train.boundary='flow'"]
U = "edges = [[1, 7], [2, 6], [3, 5]]"


def skip(text):
    return f"model.skip={{ {text} }}"


def layers(text):
    return "model.layers=" + text.replace("\n", " ")


CHAIN = [layers(LAYERS), "model.modules=5"]
NETWORKS = {
    "chain": CHAIN,
    "cut": CHAIN + ["train.boundary='cut'"],
    "sum": CHAIN + [skip("spans = [2, 3]")],
    "sum-delay": CHAIN + [skip("spans = [2], edges = [{ from = 1, to = 5, delay = 3 }]")],
    "concat-delay": CHAIN + [skip("spans = [2], edges = [{ from = 1, to = 4, delay = 2 }], fuse = 'concat'")],
    "held": CHAIN + [skip("edges = [[1, 5], [2, 5]]"), "data.frames=9", "train.batches=0"],
    "aligned": CHAIN + [skip("spans = [2, 3], delay = 'aligned'")],
    "uneven-sum": [layers(UNEVEN), "model.modules=5", "data.crop=13", skip("spans = [2, 3]")],
    "uneven-concat": [layers(UNEVEN), "model.modules=5", "data.crop=13", skip("spans = [2, 3], fuse = 'concat'")],
    "motion-small-ema": ["model.preset='motion-small'", "model.modules=6", skip("spans = [2]"), "train.ema=0.8"],
    "frames": AUTOENCODER,
    "frames-u-sum": AUTOENCODER + [skip(U)],
    "frames-u-concat": AUTOENCODER + [skip(U + ", fuse = 'concat', delay = 2"), "model.horizon=2"],
    "frames-u-aligned": AUTOENCODER + [skip(U + ", delay = 'aligned'"), "model.loss='absolute'"],
    "resnet18": ["model.preset='resnet18'", "model.modules=5", skip("spans = [2]"), "train.batches=3"],
    "resnet18-batch-norm": [layers(RESNETS["resnet18"]), "model.modules=5", "train.batches=3"],
    "resnet50": ["model.preset='resnet50'", "model.modules=5", "train.batches=1"],
}


def run(*command):
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def train(program, folder, sets):
    """A run of a few batches; its folder."""
    out = folder / f"run-{len(list(folder.glob('run-*')))}"
    base = [
        f"data.train='{folder}/data/train-*.h5'", f"data.test='{folder}/data/test-*.h5'", "data.frames=18", "data.batch=4",
        "train.batches=12", "train.optimizer={ kind = 'sgd', lr = 0.05 }", f"run.dir='{out}'", "run.device='cpu'",
    ]
    config = folder / "config.toml"
    config.write_text("")
    given = {text.split("=")[0] for text in sets}
    sets = [text for text in base if text.split("=")[0] not in given] + sets
    # A network as it was made: one batch, and its start's checkpoint.
    start = "train.batches=0" in sets
    sets = [text.replace("train.batches=0", "train.batches=1") for text in sets]
    run(program, "train", config, *[word for text in sets for word in ("--set", text)])
    return out / "checkpoints/step-00000000" if start else out


def exported(program, checkpoint):
    out = checkpoint / "export"
    run(program, "export", checkpoint, "--torch", "--out", out)
    spec = importlib.util.spec_from_file_location("model", out / "model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module, module.load()


def clips(folder, frames, stride):
    """Names and middle clips of the test videos, uint8 [B, T, H, W, 3]."""
    names, out = [], []
    for path in sorted((folder / "data").glob("test-*.h5")):
        with h5py.File(path) as shard:
            offsets = shard["video_offsets"][:]
            for v, name in enumerate(shard["video_ids"][:]):
                video = shard["frames"][offsets[v]:offsets[v + 1]]
                start = (len(video) - ((frames - 1) * stride + 1)) // 2
                names.append(name.decode())
                out.append(video[start:start + (frames - 1) * stride + 1:stride])
    return names, torch.from_numpy(np.stack(out))


def logits_are_off(program, folder, checkpoint):
    """The largest difference of logits (less their mean: scores are probabilities) over the largest of them; that of the loss."""
    module, model = exported(program, checkpoint)
    names, frames = clips(folder, module.FRAMES, module.STRIDE)
    with torch.inference_mode():
        logits = model(module.normalise(frames)).double()
    scores = checkpoint / "scores.csv"
    said, _ = run(program, "eval", checkpoint, "--scores", scores, "--json")
    with open(scores) as file:
        rows = list(csv.reader(file))[1:]
    assert [row[0] for row in rows] == names
    theirs = torch.tensor([[float(p) for p in row[3:]] for row in rows], dtype=torch.float64).log()
    centred = [x - x.mean(1, keepdim=True) for x in (logits, theirs)]
    return (centred[0] - centred[1]).abs().max().item() / centred[1].abs().max().item(), len(names)


def frames_are_off(program, folder, checkpoint):
    """The relative difference of the mean squared error of pixels; asserts that the pictures are the same but for rounding."""
    module, model = exported(program, checkpoint)
    _, frames = clips(folder, module.FRAMES, module.STRIDE)
    with torch.inference_mode():
        predicted = module.pixels(model(module.normalise(frames))).double()
    steps = module.FRAMES - module.AHEAD
    truth = frames[:, module.AHEAD:].double() / 255
    mse = ((predicted[:, :steps] - truth) ** 2).mean().item()
    said, _ = run(program, "eval", checkpoint, "--json")
    theirs = json.loads(said)["mse"]
    run(program, "predict", checkpoint, "--clips", 2, "--out", checkpoint / "pictures")
    for clip in range(2):
        strip = np.asarray(Image.open(checkpoint / f"pictures/clip-{clip:04}.png")).astype(int)
        ours = torch.cat(list(predicted[clip, :steps]), 1).mul(255).round().int().numpy()
        off = np.abs(strip[2 * module.HEIGHT:] - ours).max()
        assert off <= 1, f"pictures differ by {off} grey levels"
    return abs(mse - theirs) / theirs, len(frames)


def torchvision_is_taken(program, folder, name):
    """torchvision's network as initial weights of the same network here, which then computes the same; and of the preset, whose norms
    are others."""
    import torchvision
    from safetensors.torch import save_file
    torch.manual_seed(1)
    theirs = getattr(torchvision.models, name)(num_classes=8)
    for key, tensor in theirs.state_dict().items():
        if key.endswith("running_mean"):
            tensor.normal_(0, 0.1)
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
    file = folder / f"torchvision-{name}.safetensors"
    save_file(theirs.state_dict(), file)
    init = f"train.init='{file}'"
    checkpoint = train(program, folder, ["model.modules=4", layers(RESNETS[name]), init, "train.batches=0"])
    module, model = exported(program, checkpoint)
    _, frames = clips(folder, module.FRAMES, module.STRIDE)
    with torch.inference_mode():
        x = module.normalise(frames)
        logits = theirs.eval()(x.flatten(0, 1)).unflatten(0, x.shape[:2]).mean(1)
        off = ((model(x) - logits).abs().max() / logits.abs().max()).item()
    print(f"torchvision's {name}, taken here and exported again: logits off by {off:.1e}")
    config = folder / "config.toml"
    config.write_text("")
    sets = [f"model.preset='{name}'", "model.modules=4", init, "data.batch=4", f"data.train='{folder}/data/train-*.h5'", f"run.dir='{folder}/none'"]
    _, said = run(program, "train", config, "--dry-run", *[word for text in sets for word in ("--set", text)])
    for line in said.splitlines():
        if "train.init" in line:
            print(f"  by the preset: {line.split('.safetensors: ')[1][:120]}…")
    return off


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--program", type=Path, default=Path(__file__).parents[2] / "target/release/sideways")
    parser.add_argument("networks", nargs="*", metavar="NETWORK", help=", ".join(NETWORKS))
    args = parser.parse_args()
    os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
    worst = 0.0
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        run(args.program, "data", "synth", "--out", folder / "data", "--videos", 64, "--test-videos", 12, "--frames", 20)
        for name in args.networks or NETWORKS:
            checkpoint = train(args.program, folder, list(NETWORKS[name]))
            predicts = "model.task='future-frames'" in NETWORKS[name]
            off, videos = (frames_are_off if predicts else logits_are_off)(args.program, folder, checkpoint)
            print(f"{name:20} {'MSE of pixels' if predicts else 'logits':14} off by {off:.1e} over {videos} clips", flush=True)
            worst = max(worst, off if math.isfinite(off) else math.inf)
        if not args.networks:
            for name in RESNETS:
                worst = max(worst, torchvision_is_taken(args.program, folder, name))
    print(f"the worst: {worst:.1e}, of {TOLERANCE:.0e} allowed")
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
