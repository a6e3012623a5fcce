"""Makes `tests/golden/pruning_at_init.npz`: scores of a small network by torch, in float64.

    python3.11 -m venv /tmp/torchv && /tmp/torchv/bin/pip install torch==2.14.1 numpy
    /tmp/torchv/bin/python scripts/make_pruning_at_init_golden.py

The definitions are those of the authors' code, written anew:

- `snip`: |∂L/∂c| of masks c = 1 that multiply the weights, divided by its sum
  (https://github.com/mil-ad/snip, to which the authors' TensorFlow code is equal but for biases);
- `grasp`: two halves of the batch; g is the sum of their gradients, Hg that of their products;
  -θ·Hg divided by the absolute value of its sum, temperature 200; here the sign is turned, so that
  higher = keep (https://github.com/alecwangcq/GraSP);
- `synflow`: all parameters replaced by absolute values, an input of ones, |θ·∂R/∂θ|
  (https://github.com/ganguli-lab/Synaptic-Flow), for the weights as they are, and with biases set
  to zero (`synflow_unbiased`);
- `fisher`: ½ θ² · mean of the squared gradients of single examples (Theis et al., 2018);
- `taylor_squared`: mean over three batches of (θ·g)² (https://github.com/NVlabs/Taylor_pruning,
  before it adds up over filters).

Keys: `params/LAYER/kernel` and `bias` (HWIO and inputs by outputs, as in Flax), `images` (NHWC),
`labels`, and for every criterion `CRITERION/LAYER`, in the layout of the kernel.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from torch.func import functional_call
from torch.nn import functional

TARGET = Path(__file__).resolve().parents[1] / "tests" / "golden" / "pruning_at_init.npz"
LAYERS = ("conv1", "conv2", "dense1", "dense2")
TEMPERATURE = 200


class Network(torch.nn.Module):
    """conv 4 - ReLU - max-pool 2 - conv 6 - ReLU - dense 12 - ReLU - dense 5, on 10x10x2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = torch.nn.Conv2d(2, 4, 3)
        self.conv2 = torch.nn.Conv2d(4, 6, 3)
        self.dense1 = torch.nn.Linear(24, 12)
        self.dense2 = torch.nn.Linear(12, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of images (batch, channels, height, width)."""
        x = functional.max_pool2d(functional.relu(self.conv1(x)), 2)
        x = functional.relu(self.conv2(x))
        # Channels last, as Flax flattens.
        x = x.permute(0, 2, 3, 1).flatten(1)
        return self.dense2(functional.relu(self.dense1(x)))


Weights = dict[str, torch.Tensor]


def weights_of(net: Network) -> Weights:
    return {f"{name}.weight": getattr(net, name).weight for name in LAYERS}


def snip(net: Network, x: torch.Tensor, y: torch.Tensor) -> Weights:
    weights = {k: w.detach() for k, w in weights_of(net).items()}
    gates = {k: torch.ones_like(w, requires_grad=True) for k, w in weights.items()}
    outputs = functional_call(net, {k: w * gates[k] for k, w in weights.items()}, (x,))
    loss = functional.cross_entropy(outputs, y)
    grads = torch.autograd.grad(loss, list(gates.values()))
    total = sum(g.abs().sum() for g in grads)
    return {k: g.abs() / total for k, g in zip(gates, grads, strict=True)}


def grasp(net: Network, x: torch.Tensor, y: torch.Tensor) -> Weights:
    weights = list(weights_of(net).values())
    half = len(x) // 2
    halves = [(x[:half], y[:half]), (x[half:], y[half:])]

    def loss(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(net(images) / TEMPERATURE, labels)

    g = [torch.zeros_like(w) for w in weights]
    for part in halves:
        g = [a + b for a, b in zip(g, torch.autograd.grad(loss(*part), weights), strict=True)]
    hg = [torch.zeros_like(w) for w in weights]
    for part in halves:
        grads = torch.autograd.grad(loss(*part), weights, create_graph=True)
        z = sum((a * b).sum() for a, b in zip(g, grads, strict=True))
        hg = [a + b for a, b in zip(hg, torch.autograd.grad(z, weights), strict=True)]
    scores = [(w * h).detach() for w, h in zip(weights, hg, strict=True)]
    norm = abs(sum(s.sum() for s in scores)) + 1e-10
    return {k: s / norm for k, s in zip(weights_of(net), scores, strict=True)}


def synflow(net: Network, x: torch.Tensor, *, biases: bool) -> Weights:
    positive = {
        k: (p.detach().abs() * (biases or not k.endswith("bias"))).requires_grad_()
        for k, p in net.named_parameters()
    }
    flow = functional_call(net, positive, (torch.ones_like(x[:1]),)).sum()
    chosen = {k: positive[k] for k in weights_of(net)}
    grads = torch.autograd.grad(flow, list(chosen.values()))
    return {k: (w * g).detach().abs() for (k, w), g in zip(chosen.items(), grads, strict=True)}


def gradients(net: Network, x: torch.Tensor, y: torch.Tensor) -> Weights:
    loss = functional.cross_entropy(net(x), y)
    weights = weights_of(net)
    return dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))


def fisher(net: Network, x: torch.Tensor, y: torch.Tensor) -> Weights:
    every = [gradients(net, x[i : i + 1], y[i : i + 1]) for i in range(len(x))]
    return {
        k: w.detach() ** 2 * sum(g[k] ** 2 for g in every) / len(every) / 2
        for k, w in weights_of(net).items()
    }


def taylor_squared(net: Network, x: torch.Tensor, y: torch.Tensor) -> Weights:
    every = [gradients(net, *part) for part in zip(x.chunk(3), y.chunk(3), strict=True)]
    return {
        k: sum((w.detach() * g[k]) ** 2 for g in every) / len(every)
        for k, w in weights_of(net).items()
    }


def layout(tensor: torch.Tensor) -> np.ndarray:
    """HWIO from OIHW, inputs by outputs from outputs by inputs."""
    array = tensor.detach().numpy()
    return array.transpose(2, 3, 1, 0) if array.ndim == 4 else array.T


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", type=Path, default=TARGET, help="default: %(default)s")
    target = parser.parse_args().target
    torch.manual_seed(0)
    # float32 values, so that nothing is lost on the way into the tests.
    net = Network().float().double()
    x = torch.randn(12, 2, 10, 10, dtype=torch.float32).double()
    y = torch.arange(12) % 5
    found = {
        "snip": snip(net, x, y),
        "grasp": grasp(net, x, y),
        "synflow": synflow(net, x, biases=True),
        "synflow_unbiased": synflow(net, x, biases=False),
        "fisher": fisher(net, x, y),
        "taylor_squared": taylor_squared(net, x, y),
    }
    arrays = {"images": x.permute(0, 2, 3, 1).numpy().astype(np.float32), "labels": y.numpy()}
    for name in LAYERS:
        layer = getattr(net, name)
        arrays[f"params/{name}/kernel"] = layout(layer.weight).astype(np.float32)
        arrays[f"params/{name}/bias"] = layer.bias.detach().numpy().astype(np.float32)
        for criterion, scores in found.items():
            arrays[f"{criterion}/{name}"] = layout(scores[f"{name}.weight"])
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(target, **arrays)
    print(f"{target}: {target.stat().st_size:,} bytes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
