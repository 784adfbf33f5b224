"""What updates the weights: AdamW, the paper's, or Muon for the matrices, which took far fewer steps in our runs.

    Optimizer            both behind one step(), as the constant `optimizer` says
    Muon, orthogonal     Muon's update
    cosine, update_ema   the schedule of learning rate and teacher momentum; moving averages of weights
"""
import math
from collections import defaultdict

import torch

MATRICES = {"attn", "mlp", "compress", "expand"}  # Muon takes a weight if one is in its dotted name: add your module's


class Optimizer:
    """The constant `optimizer`: "adamw" for all weights, or "muon" for the matrices inside blocks and MLPs (those of
    bottleneck and SSL heads, too) and the convolutions of staged compression, and AdamW for the rest.

    Muon is not made for the rest. In embeddings, output heads and prototypes each row has a meaning of its own. Tokens,
    norms and biases are not matrices. The time MLP and adaLN's modulations see only the condition; their gradient has
    few directions, and Muon would amplify the noise in all others to the same size.

    constants: a script's, of which optimizer, learning_rate, betas, weight_decay and muon_rate are used.
    undecayed(name, parameter): True for parameters without weight decay.
    """

    def __init__(self, model, constants, dist, undecayed=lambda name, parameter: False):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        inner = [name for name, p in trained.items() if p.ndim > 1 and MATRICES & set(name.split("."))]
        matrices = [trained.pop(name) for name in inner] if constants["optimizer"] == "muon" else []
        groups = [{"params": [p for name, p in trained.items() if not undecayed(name, p)]},
                  {"params": [p for name, p in trained.items() if undecayed(name, p)], "weight_decay": 0.0}]
        groups = [group for group in groups if group["params"]]
        rate, decay = constants["learning_rate"], constants["weight_decay"]
        self.parts = {"adamw": torch.optim.AdamW(groups, lr=rate, betas=constants["betas"], weight_decay=decay,
                                                 fused=dist.device.type in ("cuda", "cpu"))}
        self.rates = {"adamw": 1.0, "muon": constants["muon_rate"]}  # factors of the learning rate
        if constants["optimizer"] == "muon":
            self.parts["muon"] = Muon(matrices, dist.dtype, weight_decay=decay)

    def step(self, learning_rate):
        """Updates the weights and clears their gradients."""
        for name, part in self.parts.items():
            for group in part.param_groups:
                group["lr"] = learning_rate * self.rates[name]
            part.step()
            part.zero_grad()

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state):
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024): W <- W - lr (0.2 √max(rows, columns) U Vᵀ + weight_decay W), where U S Vᵀ is the
    singular value decomposition of the gradient's moving average: the update is equally large in all its directions.
    The factor makes updates as large as AdamW's (Moonlight, arXiv 2502.16982).

    The same as torch.optim.Muon(adjust_lr_fn="match_rms_adamw"), except that its matrix products run in `dtype`.
    PyTorch's always run in bfloat16, which is 16 times slower than float32 on a CPU without bfloat16 instructions.
    q, k and v are one matrix here: splitting them made no difference beyond that between two seeds. A convolution's
    kernel (D, D', 3, 3) is a matrix of D rows: by Muon instead of AdamW it saves half of the steps again (docs/LOG.md).
    """

    def __init__(self, matrices, dtype, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            of_shape = defaultdict(list)  # weights of one shape share a batched product, which is faster
            for p in group["params"]:
                if p.grad is not None:
                    of_shape[p.shape].append(p)
            for shape, params in of_shape.items():
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["mean"] = torch.zeros_like(p)
                    mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
                    updates.append(p.grad.lerp(mean, group["momentum"]).to(self.dtype).flatten(1))  # Nesterov momentum
                updates = orthogonal(torch.stack(updates))  # (B, rows, columns)
                scale = 0.2 * max(updates.shape[1:]) ** 0.5
                for p, update in zip(params, updates):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.reshape(shape), alpha=-group["lr"] * scale)


def orthogonal(matrices, steps=5):
    """A stack (B, m, n) of U S Vᵀ -> about U Vᵀ, by Newton-Schulz iteration. Each step applies a polynomial,
    a x + b x³ + c x⁵, to every singular value x; they end between 0.7 and 1.2. Jordan's coefficients are steep at 0,
    so that small ones grow fast."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.mT if tall else matrices  # so that x xᵀ is the smaller of two products
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def cosine(step, steps, base, final, warmup=0):
    """Rises linearly from 0 to `base` over `warmup` steps, then falls along half a cosine to `final` at `steps`."""
    if step < warmup:
        return base * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return final + (base - final) * 0.5 * (1 + math.cos(math.pi * progress))


def update_ema(averaged, trained, momentum):
    """averaged <- momentum · averaged + (1 - momentum) · trained, for the parameters of two equal networks."""
    with torch.no_grad():
        torch._foreach_lerp_(list(averaged.parameters()), list(trained.parameters()), 1 - momentum)
