"""@SOURCE@

    from model import load, normalise
    model = load()                 # weights from model.safetensors beside this file
    clip = normalise(frames)       # frames: uint8 [B, T, height, width, 3]
#if recognition
    logits = model(clip)           # [B, K], in the order of CLASSES
#end
#if future-frames
    predicted = model(clip)        # [B, T, 3, HEIGHT, WIDTH]; pixels(predicted) are within 0..1
#end

The network is a pipeline in time: module i (from 1) works on frame t of a clip, its step t, at tick t + i - 1, with what
other modules put out at earlier ticks. `Model.steps` goes through the ticks.
"""

from collections import OrderedDict
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn
#if functional
from torch.nn import functional as F
#end

FRAMES, STRIDE = @FRAMES@, @STRIDE@  # of a clip as trained: T, and source frames from one to the next
HEIGHT, WIDTH = @HEIGHT@, @WIDTH@
MEAN, STD = @MEAN@, @STD@  # of pixels within 0..1, by channel
#if recognition
CLASSES = @CLASSES@
#end
#if future-frames
HORIZON = @HORIZON@  # the frame that is predicted comes so many frames after the newest one seen,
AHEAD = @AHEAD@  # and so many after the step's own: step t predicts frame t + AHEAD
#end

# The modules: their layers, and their skips as (module that it comes from, ticks that it takes), by growing span.
MODULES = [
@MODULES@
]


def named(kind, layer):
    """A layer whose parameters are called `layers.N.kind.…`."""
    return nn.Sequential(OrderedDict([(kind, layer)]))
#if residual


class Residual(nn.Module):
    """relu(branch(x) + shortcut(x)). The branch is convolutions (channels, out, kernel, stride), each with a norm behind it and
    a relu between; the shortcut is x itself, or a 1x1 convolution (channels, out, stride) and a norm."""

    def __init__(self, branch, shortcut, norm):
        super().__init__()
        self.convolutions = len(branch)
        for n, (channels, out, kernel, stride) in enumerate(branch, 1):
            self.add_module(f"conv{n}", nn.Conv2d(channels, out, kernel, stride, kernel // 2, bias=False))
            self.add_module(f"norm{n}", norm(out))
        if shortcut:
            channels, out, stride = shortcut
            self.add_module("projection", nn.Conv2d(channels, out, 1, stride, bias=False))
            self.add_module("projection-norm", norm(out))

    def forward(self, x):
        part = dict(self.named_children())
        y = x
        for n in range(1, self.convolutions + 1):
            y = part[f"norm{n}"](part[f"conv{n}"](F.relu(y) if n > 1 else y))
        if "projection" in part:
            x = part["projection-norm"](part["projection"](x))
        return F.relu(x + y)
#end
#if linear


class Linear(nn.Linear):
    """Of all values of a sample [B, C, H, W], in the order height, width, channels (and not channels first)."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1).flatten(1))[:, :, None, None]
#end
#if upsample


class Upsample(nn.Module):
    """Every pixel `factor` times each way."""

    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x.repeat_interleave(self.factor, 2).repeat_interleave(self.factor, 3)
#end
#if skips


def fitted(x, like):
    """A skip's features brought to the height and width of `like`: averaged where they have more pixels, spread by nearest
    neighbour where they have fewer."""
    (height, width), (h, w) = x.shape[-2:], like.shape[-2:]
    if height >= h and width >= w:
        return F.adaptive_avg_pool2d(x, (h, w))
    return x[:, :, torch.arange(h) * height // h][:, :, :, torch.arange(w) * width // w]
#end


class Model(nn.Module):
    """The network. Parameters are called as in a checkpoint of sideways."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleDict({
@LAYERS@
        })
#if adapters
        # Where a skip from module j to module i has other channels than it is added to: `j_i`.
        self.skips = nn.ModuleDict({
@ADAPTERS@
        })
#end

    def module(self, i, main, skips):
        """Module i's output [B, C, H, W] for its main input and its skips."""
#if sum
        for (j, _), x in zip(MODULES[i - 1][1], skips):
            x = fitted(x, main)
#end
#if sum-adapters
            if f"{j}_{i}" in self.skips:
                x = self.skips[f"{j}_{i}"](x)
#end
#if sum
            main = main + x
#end
#if concat
        main = torch.cat([main] + [fitted(x, main) for x in skips], 1)
#end
        for n in MODULES[i - 1][0]:
            main = self.layers[str(n)](main)
        return main

    def steps(self, clip):
        """Goes through the ticks of clips [B, T, 3, HEIGHT, WIDTH]; yields the last module's output at each of its steps."""
        frames, modules = clip.shape[1], len(MODULES)
#if flow
        steps = {i: frames for i in range(1, modules + 1)}
#end
#if cut
        steps = {i: frames + 1 - i for i in range(1, modules + 1)}  # the clip lasts T ticks in all
#end
        longest = max([1] + [delay for _, skips in MODULES for _, delay in skips])
        outputs = {i: {} for i in range(1, modules + 1)}  # by module and step; those of the newest ticks
        for tick in range(frames + modules - 1):
            for i, (_, skips) in enumerate(MODULES, 1):
                t = tick - (i - 1)
                if not 0 <= t < steps[i]:
                    continue
                # The main input left module i - 1 one tick ago, at its step t. A skip's left module j `delay` ticks ago, at its
                # step t + (i - j) - delay; once j is through with the clip, its last output is held.
                main = clip[:, t] if i == 1 else outputs[i - 1][t]
                held = [outputs[j][min(t + i - j - delay, steps[j] - 1)] for j, delay in skips]
                outputs[i][t] = self.module(i, main, held)
                if i == modules:
                    yield outputs[i][t]
                outputs[i].pop(t - longest - 1, None)
#if recognition

    def forward(self, clip):
        """Logits [B, K] of clips [B, T, 3, HEIGHT, WIDTH]: the mean over the last module's steps."""
        return torch.stack([y.flatten(1) for y in self.steps(clip)]).mean(0)
#end
#if future-frames

    def forward(self, clip):
        """The frames [B, T, 3, HEIGHT, WIDTH] predicted at the steps of clips of the same shape: at step t, frame t + AHEAD."""
        return torch.stack(list(self.steps(clip)), 1)
#end


def normalise(frames):
    """What the network reads, [..., 3, HEIGHT, WIDTH], of the middle of frames, uint8 [..., height, width, 3]."""
    top, left = (frames.shape[-3] - HEIGHT) // 2, (frames.shape[-2] - WIDTH) // 2
    if top < 0 or left < 0:
        raise ValueError(f"frames of {frames.shape[-3]}x{frames.shape[-2]} pixels: {HEIGHT}x{WIDTH} are needed")
    frames = frames[..., top:top + HEIGHT, left:left + WIDTH, :] / 255
    mean, std = torch.tensor(MEAN, device=frames.device), torch.tensor(STD, device=frames.device)
    return ((frames - mean) / std).movedim(-1, -3)
#if future-frames


def pixels(frames):
    """Values within 0..1, [..., HEIGHT, WIDTH, 3], of frames as the network has them: the reverse of `normalise`."""
    mean, std = torch.tensor(MEAN, device=frames.device), torch.tensor(STD, device=frames.device)
    return (frames.movedim(-3, -1) * std + mean).clamp(0, 1)
#end


def load(weights=Path(__file__).with_name("model.safetensors")):
    """The network with its weights, for evaluation."""
    model = Model()
    model.load_state_dict(load_file(weights))
    return model.eval()


if __name__ == "__main__":
    with torch.inference_mode():
        print(tuple(load()(torch.zeros(1, FRAMES, 3, HEIGHT, WIDTH)).shape))
