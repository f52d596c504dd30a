"""Asks an exported model.py, where there is no PyTorch, for the names and shapes of its tensors and for what reaches which module when;
prints both as JSON. What stands in for torch and safetensors knows shapes alone. Usage: python3 torch_stub.py MODEL.PY FRAMES"""

import importlib.util
import json
import sys
import types


class Module:
    def __init__(self, *_, **__):
        self.tensors = {}

    def add_module(self, name, module):
        self.__dict__[name] = module

    def state(self, prefix=""):
        state = {prefix + name: shape for name, shape in self.tensors.items()}
        for name, module in vars(self).items():
            if isinstance(module, Module):
                state.update(module.state(f"{prefix}{name}."))
        return state


class ModuleDict(Module):
    def __init__(self, modules):
        super().__init__()
        for name, module in modules.items():
            self.add_module(name, module)


class Sequential(ModuleDict):
    def __init__(self, *modules):
        super().__init__(modules[0] if isinstance(modules[0], dict) else {str(n): m for n, m in enumerate(modules)})


class Conv2d(Module):
    def __init__(self, channels, out, kernel, stride=1, padding=0, groups=1, bias=True):
        super().__init__()
        self.tensors["weight"] = [out, channels // groups, kernel, kernel]
        if bias:
            self.tensors["bias"] = [out]


class Linear(Module):
    def __init__(self, inputs, out, bias=True):
        super().__init__()
        self.tensors["weight"] = [out, inputs]
        if bias:
            self.tensors["bias"] = [out]


class GroupNorm(Module):
    def __init__(self, groups, channels):
        super().__init__()
        assert channels % groups == 0
        self.tensors = {"weight": [channels], "bias": [channels]}


class BatchNorm2d(Module):
    def __init__(self, channels, momentum=0.1):
        super().__init__()
        self.tensors = {name: [channels] for name in ("weight", "bias", "running_mean", "running_var")}


def stand_in(name, **members):
    module = types.ModuleType(name)
    module.__dict__.update(members)
    sys.modules[name] = module
    return module


others = ["ReLU", "GELU", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "Dropout", "ConstantPad2d"]
nn = stand_in("torch.nn", **{name: type(name, (Module,), {}) for name in others})
nn.functional = stand_in("torch.nn.functional")
for layer in (Module, ModuleDict, Sequential, Conv2d, Linear, GroupNorm, BatchNorm2d):
    setattr(nn, layer.__name__, layer)
stand_in("torch", nn=nn)
stand_in("safetensors")
stand_in("safetensors.torch", load_file=None)
spec = importlib.util.spec_from_file_location("model", sys.argv[1])
model = importlib.util.module_from_spec(spec)
spec.loader.exec_module(model)


class Traced(model.Model):
    """Whose modules put out what they were given."""

    def module(self, i, main, skips):
        return f"{i}({' '.join([main] + skips)})"


class Clip:
    shape = (1, int(sys.argv[2]))

    def __getitem__(self, place):
        return f"x{place[1]}"


print(json.dumps({"tensors": model.Model().state(), "steps": list(Traced().steps(Clip()))}))
