"""The presets vgg8, resnet18 and resnet50 as src/nn/presets.rs has them: group norm, no bias before a norm.

Each is a list with an entry for every layer of ours, so that a module's layers are a slice of it.
"""

from torch import nn
from torch.nn import functional as F


def unit(cin, out, kernel, stride, groups=32):
    return [nn.Conv2d(cin, out, kernel, stride, kernel // 2, bias=False), nn.GroupNorm(groups, out), nn.ReLU(inplace=True)]


def head(cin, classes):
    return [nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(cin, classes)]


def vgg8(classes):
    layers, cin = [], 3
    for stage in [(64,), (128,), (256, 256), (512, 512, 512)]:
        if layers:
            layers.append(nn.MaxPool2d(2))
        for out in stage:
            layers += unit(cin, out, 3, 1)
            cin = out
    return layers + head(cin, classes)


class Residual(nn.Module):
    def __init__(self, branch, cin, out, stride):
        super().__init__()
        self.branch = nn.Sequential(*branch)
        self.shortcut = nn.Identity()
        if stride != 1 or cin != out:
            self.shortcut = nn.Sequential(nn.Conv2d(cin, out, 1, stride, bias=False), nn.GroupNorm(32, out))

    def forward(self, x):
        return F.relu(self.branch(x) + self.shortcut(x), inplace=True)


def basic(cin, out, stride):
    return Residual(unit(cin, out, 3, stride) + unit(out, out, 3, 1)[:2], cin, out, stride)


def bottleneck(cin, out, stride):
    inner = out // 4
    return Residual(unit(cin, inner, 1, 1) + unit(inner, inner, 3, stride) + unit(inner, out, 1, 1)[:2], cin, out, stride)


def resnet(blocks, block, widen, classes):
    layers, cin = unit(3, 64, 7, 2) + [nn.MaxPool2d(3, 2, 1)], 64
    for stage, count in enumerate(blocks):
        for n in range(count):
            out = (64 << stage) * widen
            layers.append(block(cin, out, 2 if stage > 0 and n == 0 else 1))
            cin = out
    return layers + head(cin, classes)


NETS = {
    "vgg8": vgg8,
    "resnet18": lambda classes: resnet([2, 2, 2, 2], basic, 1, classes),
    "resnet50": lambda classes: resnet([3, 4, 6, 3], bottleneck, 4, classes),
}
