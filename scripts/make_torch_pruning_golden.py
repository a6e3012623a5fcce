"""Makes `tests/golden/torch_pruning.json`: the groups of coupled channels that Torch-Pruning finds.

    python3.11 -m venv /tmp/tpvenv
    /tmp/tpvenv/bin/pip install torch==2.14.1 torchvision==0.29.1 torch-pruning==1.6.1
    /tmp/tpvenv/bin/python scripts/make_torch_pruning_golden.py

For each network: the groups, all parameters, and what is left after pruning without training
(shapes only: nothing depends on the weights but `per_head`, and `default` of `vit_fused`).
`ABOUT` says what the fields mean. The transformers are small: 32 x 32 images, patches of 8 x 8,
width 48, 4 heads of 12, 2 blocks, MLPs of width 96. Takes less than a minute on two CPU cores.
"""

import argparse
import importlib.metadata
import json
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import torch
import torch_pruning as tp
import torchvision
from torch import nn

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "torch_pruning.json"
WIDTH, HEADS, BLOCKS, MLP = 48, 4, 2, 96
QUERIES = ("q", "k", "v", "qkv", "self_attention")
ABOUT = {
    "groups": "get_all_groups(root_module_types=[Conv2d, Linear], ignored_layers=[ignored])",
    "members": "[name, function, indices, type]: the root, then by name; no functional operations;"
    " the one function of normalizations, attention and parameters is called prune_out_channels",
    "pruned": "by MagnitudePruner(MagnitudeImportance(p=1), pruning_ratio=KEY), all groups alike",
    "shapes": "of all parameters with two axes or more; axis 0 of a layer is its out_channels",
    "macs": "by count_ops_and_params, one image: also additions of biases, 2 a value of BatchNorm,"
    " 1 a value of ReLU and pooling if they are modules; 1,814,073,344 of resnet18 are products",
    "attention": "ratio 0.5: `default` without num_heads, `num_heads` with it, `whole_heads` also"
    " with prune_num_heads=True, prune_head_dims=False, head_pruning_ratio=0.5; depends on the"
    " weights where heads lose different numbers, but for separate layers only in per_head",
    "per_head": "removed outputs of query, key and value, head by head (qkv: those of q, k, v)",
    "forward": "ok, or the error, of the network as the pruner leaves it; ok says that shapes fit",
    "forward_repaired": "the same after setting the attributes in `repairs`, as a user has to",
}


def lenet5() -> nn.Module:
    layers = {"conv1": nn.Conv2d(1, 20, 5), "pool1": nn.MaxPool2d(2)}
    layers |= {"conv2": nn.Conv2d(20, 50, 5), "pool2": nn.MaxPool2d(2), "flatten": nn.Flatten()}
    layers |= {"fc1": nn.Linear(800, 500), "relu": nn.ReLU(), "fc2": nn.Linear(500, 10)}
    return nn.Sequential(OrderedDict(layers))


class _Attention(nn.Module):
    """Attention with one dense layer for queries, keys and values (as timm's), or with three."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.num_heads, self.head_dim = HEADS, WIDTH // HEADS
        for name in ("qkv",) if fused else ("q", "k", "v"):
            setattr(self, name, nn.Linear(WIDTH, len(name) * WIDTH))
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, tokens, _ = x.shape
        if hasattr(self, "qkv"):
            qkv = self.qkv(x).reshape(batch, tokens, 3, self.num_heads, self.head_dim)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        else:
            shape = (batch, tokens, self.num_heads, self.head_dim)
            q, k, v = (d(x).reshape(shape).transpose(1, 2) for d in (self.q, self.k, self.v))
        weights = (q * self.head_dim**-0.5 @ k.transpose(-2, -1)).softmax(-1)
        y = (weights @ v).transpose(1, 2).reshape(batch, tokens, self.num_heads * self.head_dim)
        return self.proj(y)


class _Block(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn = _Attention(fused)
        self.fc1, self.fc2 = nn.Linear(WIDTH, MLP), nn.Linear(MLP, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))


class _ViT(nn.Module):
    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, WIDTH, 8, 8)
        self.cls_token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, 17, WIDTH))
        self.blocks = nn.Sequential(*(_Block(fused) for _ in range(BLOCKS)))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        return self.head(self.norm(self.blocks(x))[:, 0])


def torchvision_vit() -> nn.Module:
    return torchvision.models.VisionTransformer(32, 8, BLOCKS, HEADS, WIDTH, MLP, num_classes=10)


# network: how to make it, its classifier, shape of its input, ratios (transformers: see attention)
NETWORKS = {
    "resnet18": (torchvision.models.resnet18, "fc", (1, 3, 224, 224), (0.5,)),
    "resnet50": (torchvision.models.resnet50, "fc", (1, 3, 224, 224), (0.5,)),
    "lenet5_caffe": (lenet5, "fc2", (1, 1, 28, 28), (0.3, 0.5, 0.75)),
    "vit_separate": (lambda: _ViT(False), "head", (1, 3, 32, 32), ()),
    "vit_fused": (lambda: _ViT(True), "head", (1, 3, 32, 32), ()),
    "vit_torchvision": (torchvision_vit, "heads.head", (1, 3, 32, 32), ()),
}


def groups(model: nn.Module, x: torch.Tensor, ignored: nn.Module) -> tuple[list[dict], list[str]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        graph = tp.DependencyGraph().build_dependency(model, example_inputs=x)
    made, order = [], [name for name, _ in model.named_modules()]
    for group in graph.get_all_groups([ignored], root_module_types=[nn.Conv2d, nn.Linear]):
        root = group[0].dep.target.module
        made.append({"root": graph._module2name[root], "channels": graph.get_out_channels(root)})
        made[-1]["members"] = members = []
        for dep, indices in group:
            module = dep.target.module
            if name := graph._param_to_name.get(module) or graph._module2name.get(module):
                kind = type(module).__name__
                members.append([name, dep.handler.__name__, len(indices), kind])
        members[1:] = sorted(members[1:])
    return sorted(made, key=lambda g: order.index(g["root"])), [str(w.message) for w in caught]


def sizes(model: nn.Module, x: torch.Tensor) -> dict:
    shapes = {n: list(p.shape) for n, p in model.named_parameters() if p.ndim > 1}
    made = {"parameters": sum(p.numel() for p in model.parameters()), "shapes": shapes}
    made["forward"] = trial(lambda: model(x))
    if made["forward"] == "ok":
        made["macs"] = int(tp.utils.count_ops_and_params(model, x)[0])
    return made


def trial(run: Callable[[], object]) -> str:
    try:
        run()
        return "ok"
    except Exception as e:
        return f"{type(e).__name__}: {str(e).splitlines()[0]}"


def pruner(model: nn.Module, x: torch.Tensor, ignored: nn.Module, **options: object):
    # The defaults of these are dicts that all pruners of the process share, and write to.
    own = {"in_channel_groups": {}, "out_channel_groups": {}, "num_heads": {}} | options
    score = tp.importance.MagnitudeImportance(p=1)
    return tp.pruner.MagnitudePruner(model, x, score, ignored_layers=[ignored], **own)


def attention(model: nn.Module, x: torch.Tensor, ignored: nn.Module, case: str) -> dict:
    names = {m: n for n, m in model.named_modules() if n.rpartition(".")[2] in QUERIES}
    options = {"pruning_ratio": 0.5, "num_heads": {m: HEADS for m in names if case != "default"}}
    if case == "whole_heads":
        options |= {"prune_num_heads": True, "prune_head_dims": False, "head_pruning_ratio": 0.5}
    tool, per_head, left = pruner(model, x, ignored, **options), {}, {}

    def step() -> None:
        for group in tool.step(interactive=True):
            for dep, indices in group:
                name = names.get(dep.target.module)
                if name and tool.DG.is_out_channel_pruning_fn(dep.handler):
                    heads = HEADS * (3 if name.endswith("qkv") else 1)
                    removed = [i * HEADS // WIDTH for i in indices]
                    per_head[name] = [removed.count(head) for head in range(heads)]
            group.prune()

    made = {"step": trial(step), "per_head": per_head} | sizes(model, x)
    for m in model.modules():
        if isinstance(m, (_Attention, nn.MultiheadAttention)):
            width = m.proj.in_features if isinstance(m, _Attention) else m.embed_dim
            m.num_heads = left["num_heads"] = next(iter(tool.num_heads.values()), HEADS)
            m.head_dim = left["head_dim"] = width // m.num_heads
        elif isinstance(m, torchvision.models.VisionTransformer):
            m.hidden_dim = left["hidden_dim"] = m.conv_proj.out_channels
    return made | {"repairs": left, "forward_repaired": trial(lambda: model(x))}


def fresh(name: str) -> tuple[nn.Module, torch.Tensor, nn.Module]:
    torch.manual_seed(0)
    make, classifier, shape, _ = NETWORKS[name]
    model = make().eval()
    return model, torch.zeros(shape), model.get_submodule(classifier)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", type=Path, default=TARGET)
    target = parser.parse_args().target
    made = {}
    for name, (_, classifier, shape, ratios) in NETWORKS.items():
        found, caught = groups(*fresh(name))
        made[name] = {"groups": found, "num_groups": len(found), "warnings": caught}
        made[name] |= {"ignored": classifier, "input": shape} | sizes(*fresh(name)[:2])
        for ratio in ratios:
            model, x, ignored = fresh(name)
            pruner(model, x, ignored, pruning_ratio=ratio).step()
            made[name].setdefault("pruned", {})[str(ratio)] = sizes(model, x)
        for case in () if ratios else ("default", "num_heads", "whole_heads"):
            made[name].setdefault("attention", {})[case] = attention(*fresh(name), case)
        print(name, len(found), made[name]["parameters"])
    versions = {p: importlib.metadata.version(p) for p in ("torch", "torchvision", "torch-pruning")}
    made = {"about": ABOUT, "networks": made, "versions": versions}
    text = json.dumps(made, indent=1, sort_keys=True)
    flat = re.sub(r"\[\n[^][{}]*\]", lambda m: json.dumps(json.loads(m[0])), text)
    target.write_text(flat + "\n")


if __name__ == "__main__":
    main()
