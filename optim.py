"""The optimizers of the training loops: AdamW, the paper's, or Muon for the matrices, which needs half of the steps.

    Optimizer            what the constant `optimizer` names
    Muon, orthogonal     its update
"""
import torch

OPTIMIZERS = ("adamw", "muon")
MATRICES = {"attn", "mlp", "fc1", "fc2"}  # in the dotted name of a weight that Muon takes: those inside blocks and MLPs


class Optimizer:
    """What the constant `optimizer` names, to a training loop one thing: "adamw", or "muon" for the matrices inside
    blocks and MLPs (also compression's, the bottleneck's and the SSL heads') and AdamW for the rest.

    The rest is what Muon is not made for. Embeddings, output heads, prototypes: each of their rows stands for itself.
    Convolutions, tokens, norms, biases: no matrices. Time MLP and adaLN's modulations: they see the condition alone,
    whose gradient has few directions, and the noise in all the others would be made as large.

    constants: optimizer, learning_rate, betas, weight_decay, muon_rate. undecayed(name, parameter): True for what has
    no weight decay.
    """

    def __init__(self, model, constants, dist, undecayed=lambda name, parameter: False):
        matrices, decayed, kept = [], [], []
        for name, p in model.named_parameters():
            muon = constants["optimizer"] == "muon" and p.ndim == 2 and MATRICES & set(name.split("."))
            if p.requires_grad:
                (matrices if muon else kept if undecayed(name, p) else decayed).append(p)
        groups = [group for group in ({"params": decayed}, {"params": kept, "weight_decay": 0.0}) if group["params"]]
        rate, decay = constants["learning_rate"], constants["weight_decay"]
        self.parts = {"adamw": torch.optim.AdamW(groups, lr=rate, betas=constants["betas"], weight_decay=decay,
                                                 fused=dist.device.type in ("cuda", "cpu"))}
        self.rates = {"adamw": 1.0, "muon": constants["muon_rate"]}  # times the learning rate
        if constants["optimizer"] == "muon":
            self.parts["muon"] = Muon(matrices, dist.dtype, weight_decay=decay)

    def step(self, learning_rate):
        """One update with the gradients there are, which are gone then."""
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
    """Muon (Jordan et al. 2024): W <- W - lr (0.2 √max(rows, columns) U Vᵀ + weight_decay W), where U S Vᵀ is the mean
    of W's gradients: all directions it points to count the same. With that factor, updates are as large as AdamW's
    (Moonlight, arXiv 2502.16982).

    It is torch.optim.Muon(adjust_lr_fn="match_rms_adamw") but for `dtype`, that of its products: PyTorch's are always
    in bfloat16, which takes a processor without such products sixteen times as long as float32. (q, k and v are one
    matrix here: taken apart they learn no better, beyond what two seeds differ by.)
    """

    def __init__(self, matrices, dtype, lr=1e-3, momentum=0.95, weight_decay=0.0):
        super().__init__(matrices, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.dtype = dtype

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if not self.state[p]:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(mean, group["momentum"]).to(self.dtype)  # Nesterov's momentum
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(orthogonal(update), alpha=-group["lr"] * 0.2 * max(p.shape) ** 0.5)


def orthogonal(matrix, steps=5):
    """U S Vᵀ -> about U Vᵀ, its singular values between 0.7 and 1.2, by Newton-Schulz: each step applies the odd
    polynomial a x + b x³ + c x⁵ to all of them. Jordan's coefficients are steep at 0, for the smallest to come up soon.
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # the smaller of its two products with itself
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x
