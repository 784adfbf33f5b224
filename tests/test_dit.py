"""The generator's network, flow matching and the sampler, against formulas and against flows that are known exactly."""
import math

import pytest
import torch
from torch import nn

from model import (DIT_SIZES, DiTBlock, LightningDiT, ModulatedRMSNorm, SwiGLU, flow_matching_loss, cfg_velocity,
                   position_embedding, rope_table, rotate, sample_flow, shift_time)

SHAPE = (128, 8, 8)  # the paper's latent, (c, h, w)


def random_dit(size="32/2/2", channels=6, side=4, classes=10, seed=0):
    """A generator whose every weight is random: as it starts, its output is 0 whatever it is given."""
    torch.manual_seed(seed)
    model = LightningDiT(size, channels, side, classes).requires_grad_(False)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape) * (0.3 if p.ndim == 1 else p.shape[-1] ** -0.5))
    return model


# ----------------------------------------------------------------------------------------------------------------------
# The network


def test_the_paper_s_size_has_675_million_parameters():
    """Table 4's generator; also what makes an error in the width of an MLP or a modulation visible."""
    with torch.device("meta"):
        model = LightningDiT("XL", 128, 8, 1000)
    assert abs(sum(p.numel() for p in model.parameters()) - 675e6) < 1e6
    assert len(model.blocks) == 28 and model.embed.out_features == 1152 and model.blocks[0].attn.heads == 16


def test_sizes_are_names_or_numbers():
    """Each name of the table, and width/depth/heads; nonsense is a ValueError that names the constant."""
    for name, (width, depth, heads) in DIT_SIZES.items():
        with torch.device("meta"):
            model = LightningDiT(name, 8, 4, 10)
        assert (model.width, len(model.blocks), model.blocks[0].attn.heads) == (width, depth, heads)
    for size in "M", "32/2", "32/2/3", "32/0/2", "a/b/c", "24/2/4":  # the last one: heads of 6, rotary needs 4 k
        with pytest.raises(ValueError, match="size="):
            LightningDiT(size, 8, 4, 10)


def complex_rotation(x, height, width):
    """(height * width, d) float64, number by number: pair (k, k + d / 2) as a complex number, times e^{i angle}."""
    d = x.shape[1]
    out = torch.empty_like(x)
    for n in range(height * width):
        for k in range(d // 2):
            position, j = (n // width, k) if k < d // 4 else (n % width, k - d // 4)
            angle = position * 10000 ** (-j / (d // 4))
            turned = complex(x[n, k], x[n, k + d // 2]) * complex(math.cos(angle), math.sin(angle))
            out[n, k], out[n, k + d // 2] = turned.real, turned.imag
    return out


def test_rope_turns_pairs_as_complex_numbers():
    """On a grid that is not square, so that rows and columns can't be mixed up unseen. Lengths stay."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 15, 16)
    turned = rotate(x, rope_table((3, 5), 16, x.device))
    for b in range(2):
        for head in range(3):
            torch.testing.assert_close(turned[b, head].double(), complex_rotation(x[b, head].double(), 3, 5),
                                       rtol=0, atol=2e-6)
    torch.testing.assert_close(turned.norm(dim=-1), x.norm(dim=-1))
    assert torch.equal(turned[:, :, 0], x[:, :, 0])  # the origin is not turned
    half = rotate(x.bfloat16(), rope_table((3, 5), 16, x.device))
    assert half.dtype == torch.bfloat16


def test_rope_products_depend_on_the_distance_alone():
    """The same q and k everywhere: q·k is a function of (rows apart, columns apart), and of both."""
    torch.manual_seed(0)
    height, width, q, k = 4, 5, torch.randn(16), torch.randn(16)
    table = rope_table((height, width), 16, q.device)
    q, k = (rotate(x.expand(1, 1, height * width, 16), table)[0, 0] for x in (q, k))
    products = q @ k.T
    of = {}
    for a in range(height * width):
        for b in range(height * width):
            distance = b // width - a // width, b % width - a % width
            of.setdefault(distance, []).append(products[a, b].item())
    assert len(of) == (2 * height - 1) * (2 * width - 1)
    for values in of.values():
        assert max(values) - min(values) < 1e-5
    means = sorted(sum(values) / len(values) for values in of.values())
    assert min(b - a for a, b in zip(means, means[1:])) > 1e-5  # no two distances look the same
    assert abs(of[0, 1][0] - of[1, 0][0]) > 1e-2 and abs(of[0, 1][0] - of[0, -1][0]) > 1e-2


def test_swiglu_is_its_formula():
    """Number by number in float64: with hidden units that make it as large as the usual MLP."""
    torch.manual_seed(0)
    layer = SwiGLU(12).double().requires_grad_(False)
    assert layer.fc2.in_features == 32 and layer.fc1.out_features == 64
    x, W, b, V, c = torch.randn(12).double(), layer.fc1.weight, layer.fc1.bias, layer.fc2.weight, layer.fc2.bias
    hidden = []
    for i in range(32):
        gate = sum(W[i, k] * x[k] for k in range(12)) + b[i]
        value = sum(W[32 + i, k] * x[k] for k in range(12)) + b[32 + i]
        hidden.append(gate / (1 + math.exp(-gate)) * value)
    expected = torch.stack([sum(V[o, i] * hidden[i] for i in range(32)) + c[o] for o in range(12)])
    torch.testing.assert_close(layer(x[None])[0], expected)
    assert abs(sum(p.numel() for p in SwiGLU(1152).parameters()) / (2 * 4 * 1152**2) - 1) < 0.01


def test_a_block_is_its_formula():
    """adaLN: six modulations, in this order; RMSNorm, not LayerNorm; attention with the rotation on q and k alone."""
    torch.manual_seed(0)
    width, heads, side = 16, 2, 3
    block = DiTBlock(width, heads).requires_grad_(False)
    for p in block.parameters():
        p.copy_(torch.randn(p.shape) * 0.5)
    x, condition = torch.randn(2, side**2, width), torch.randn(2, width)
    ours = block(x, condition, rope_table((side, side), width // heads, x.device)).double()
    block, x, condition = block.double(), x.double(), condition.double()
    d = width // heads
    for b in range(2):
        silu = condition[b] / (1 + (-condition[b]).exp())
        modulation = block.modulation.weight @ silu + block.modulation.bias
        shift1, scale1, gate1, shift2, scale2, gate2 = (modulation[k * width:(k + 1) * width] for k in range(6))

        def modulated(y, norm, shift, scale):
            return y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight * (1 + scale) + shift

        y = x[b]
        qkv = modulated(y, block.norm1, shift1, scale1) @ block.attn.qkv.weight.T + block.attn.qkv.bias
        q, k, v = qkv.split(width, 1)
        mixed = []
        for head in range(heads):
            columns = slice(head * d, (head + 1) * d)
            turned = [complex_rotation(part[:, columns], side, side) for part in (q, k)]
            weights = (turned[0] @ turned[1].T / math.sqrt(d)).exp()
            mixed.append(weights / weights.sum(1, keepdim=True) @ v[:, columns])
        y = y + gate1 * (torch.cat(mixed, 1) @ block.attn.proj.weight.T + block.attn.proj.bias)
        y = y + gate2 * block.mlp(modulated(y, block.norm2, shift2, scale2))
        torch.testing.assert_close(ours[b], y, rtol=1e-4, atol=1e-4)


def test_at_first_every_block_is_the_identity_and_the_output_zero():
    """adaLN-Zero (DiT): training begins from the mean of all flows, not from noise."""
    torch.manual_seed(0)
    model = LightningDiT("32/3/2", 6, 4, 10)
    x, condition = torch.randn(2, 16, 32), torch.randn(2, 32)
    for block in model.blocks:
        assert torch.equal(block(x, condition, rope_table((4, 4), 16, x.device)), x)
    out = model(torch.randn(2, 6, 4, 4), torch.tensor([0.1, 0.9]), torch.tensor([0, 10]))
    assert out.shape == (2, 6, 4, 4) and not out.any()


def test_every_parameter_gets_a_gradient_once_the_gates_are_open():
    """DistributedDataParallel insists on it, and a layer that is left out trains nothing."""
    model = random_dit().requires_grad_(True)
    model(torch.randn(11, 6, 4, 4), torch.rand(11), torch.arange(11)).square().mean().backward()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, name
    assert (model.class_embed.weight.grad.abs().sum(1) > 0).all()  # all ten classes and the null class


def test_the_velocity_depends_on_time_label_and_place():
    """Each of them reaches the output; the null class is one more label than there are classes."""
    model = random_dit()
    assert model.class_embed.num_embeddings == 11 and model.null_class == 10
    z = torch.randn(1, 6, 4, 4)

    def at(t, label, z=z):
        return model(z, torch.tensor([t]), torch.tensor([label]))

    outputs = [at(0.5, 0), at(0.51, 0), at(0.0, 0), at(1.0, 0), at(0.5, 1), at(0.5, 10)]
    for i, a in enumerate(outputs):
        for b in outputs[:i]:
            assert (a - b).abs().mean() > 1e-3
    # a latent that is moved on the torus is not answered by a moved velocity: the network knows where things are
    assert (at(0.5, 0, z.roll(1, 3)).roll(-1, 3) - at(0.5, 0)).abs().mean() > 1e-2
    assert (at(0.5, 0, z.transpose(2, 3)).transpose(2, 3) - at(0.5, 0)).abs().mean() > 1e-2  # rows are not columns


def test_an_image_s_velocity_does_not_depend_on_its_batch():
    """No statistics over the batch: what makes sample i the same for any batch size."""
    model = random_dit()
    z, t, labels = torch.randn(5, 6, 4, 4), torch.rand(5), torch.tensor([0, 3, 10, 3, 9])
    together = model(z, t, labels)
    for i in range(5):
        torch.testing.assert_close(model(z[i:i + 1], t[i:i + 1], labels[i:i + 1]), together[i:i + 1],
                                   rtol=1e-4, atol=1e-5)


def test_the_random_frequencies_of_time_belong_to_the_weights():
    """They are drawn once: a checkpoint without them would be loaded into another network."""
    a, b = random_dit(seed=0), LightningDiT("32/2/2", 6, 4, 10)
    assert a.time_frequencies.shape == (256,) and not torch.equal(a.time_frequencies, b.time_frequencies)
    assert 0.8 < a.time_frequencies.std() < 1.2
    b.load_state_dict(a.state_dict())
    z, t, labels = torch.randn(2, 6, 4, 4), torch.rand(2), torch.tensor([1, 2])
    assert torch.equal(a(z, t, labels), b(z, t, labels))


def test_position_and_norm_are_where_the_recipe_has_them():
    """The head sees RMSNorm(x) (1 + scale) + shift of the condition, and the input its fixed 2-D sine-cosine places."""
    model = random_dit(size="32/1/2")
    seen = {}
    model.blocks[0].register_forward_pre_hook(lambda _, inputs: seen.update(x=inputs[0], condition=inputs[1]))
    model.norm.register_forward_hook(lambda _, inputs, output: seen.update(last=inputs[0], normed=output))
    z = torch.randn(2, 6, 4, 4)
    out = model(z, torch.tensor([0.2, 0.7]), torch.tensor([1, 10]))
    places = position_embedding((4, 4), 4, 32, z.device)
    torch.testing.assert_close(seen["x"], model.embed(z.flatten(2).transpose(1, 2)) + places)
    angles = 2 * math.pi * torch.tensor([[0.2], [0.7]]) * model.time_frequencies
    time = model.time_mlp(torch.cat([angles.sin(), angles.cos()], 1))
    torch.testing.assert_close(seen["condition"], time + model.class_embed.weight[[1, 10]], rtol=1e-4, atol=1e-4)
    shift, scale = model.modulation(nn.functional.silu(seen["condition"]))[:, None].split(32, 2)
    x = seen["last"] / (seen["last"].square().mean(-1, keepdim=True) + 1e-6).sqrt() * model.norm.weight
    torch.testing.assert_close(seen["normed"], x * (1 + scale) + shift)
    torch.testing.assert_close(out, model.head(seen["normed"]).transpose(1, 2).unflatten(2, (4, 4)))
    assert isinstance(model.norm, ModulatedRMSNorm)


# ----------------------------------------------------------------------------------------------------------------------
# Flow matching


def test_time_is_shifted_by_the_latent_s_size():
    """SD3's formula; both ends stay, the order stays, and 4096 numbers are the size up to which nothing moves."""
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    for shape in (128, 8, 8), (32, 8, 8), (6, 4, 4), (16, 32, 32):
        s = max(1, math.sqrt(math.prod(shape) / 4096))
        shifted = shift_time(t, shape)
        for a, b in zip(t.tolist(), shifted.tolist()):
            assert b == pytest.approx(s * a / (1 + (s - 1) * a), abs=1e-12)
        assert shifted[0] == 0 and shifted[-1] == pytest.approx(1, abs=1e-12) and (shifted.diff() > 0).all()
        assert (shifted[1:-1] > t[1:-1]).all() if s > 1 else torch.equal(shifted, t)  # a small latent's are not
    half = shift_time(torch.tensor(0.5), SHAPE).item()  # s = √2 in the paper's case
    assert half == pytest.approx(math.sqrt(2) / 2 / (1 + (math.sqrt(2) - 1) / 2)) and half > 0.58
    torch.testing.assert_close(shift_time(t, SHAPE, shift_base=1024), shift_time(t, (4 * SHAPE[0], *SHAPE[1:])))


def test_the_loss_is_the_mean_square_of_velocity_minus_noise_minus_data():
    """Number by number in float64, with a time per image; the model is shown z_t, t and the label."""
    torch.manual_seed(0)
    z, noise = torch.randn(2, 3, 2, 2, 2).double()
    t = torch.tensor([0.0, 0.3, 1.0]).double()
    labels, seen = torch.tensor([4, 5, 6]), []

    def model(z_t, t, labels):
        seen.append((z_t, t, labels))
        return torch.sin(3 * z_t) + t[:, None, None, None] * labels[:, None, None, None]

    total = 0.0
    for b in range(3):
        for c in range(2):
            for y in range(2):
                for x in range(2):
                    data, n, time = z[b, c, y, x].item(), noise[b, c, y, x].item(), t[b].item()
                    velocity = math.sin(3 * ((1 - time) * data + time * n)) + time * labels[b].item()
                    total += (velocity - (n - data)) ** 2
    assert flow_matching_loss(model, z, labels, noise, t).item() == pytest.approx(total / 24, rel=1e-12)
    z_t, seen_t, seen_labels = seen[0]
    assert torch.equal(z_t[0], z[0]) and torch.equal(z_t[2], noise[2])  # t = 0 is data, t = 1 is noise
    assert torch.equal(seen_t, t) and torch.equal(seen_labels, labels)


def test_the_loss_is_least_for_the_velocity_from_data_to_noise():
    """v = noise - data gives 0, its opposite does not: the sign on which the sampler's negative steps rely."""
    torch.manual_seed(0)
    z, noise, t, labels = torch.randn(4, 2, 3, 3), torch.randn(4, 2, 3, 3), torch.rand(4), torch.zeros(4).long()
    assert flow_matching_loss(lambda *_: noise - z, z, labels, noise, t) == 0
    assert flow_matching_loss(lambda *_: z - noise, z, labels, noise, t) > 1


def test_a_linear_model_that_is_trained_finds_the_optimal_velocity():
    """Loss and sampler belong together: least squares on the loss's own pairs gives the closed form used below."""
    torch.manual_seed(0)
    mu, sigma, t = 0.7, 0.5, 0.4
    z, noise, pairs = mu + sigma * torch.randn(50000, 1, 1, 1).double(), torch.randn(50000, 1, 1, 1).double(), []
    a, b = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def model(z_t, *_):
        pairs.append(z_t)
        return a + b * z_t

    loss = flow_matching_loss(model, z, None, noise, torch.full((50000,), t).double())
    gradient = torch.autograd.grad(loss, (a, b), create_graph=True)  # the loss is quadratic: one Newton step is exact
    hessian = torch.stack([torch.stack(torch.autograd.grad(g, (a, b), retain_graph=True)) for g in gradient])
    found = -torch.linalg.solve(hessian, torch.stack(gradient)).detach()
    exact = [gaussian_velocity(mu, sigma)(torch.tensor(z_t).double(), torch.tensor(t).double()) for z_t in (0.0, 1.0)]
    assert found[0].item() == pytest.approx(exact[0].item(), abs=0.03)
    assert found[1].item() == pytest.approx((exact[1] - exact[0]).item(), abs=0.03)


# ----------------------------------------------------------------------------------------------------------------------
# The sampler, driven by velocities that are known exactly


def gaussian_velocity(mu, sigma):
    """E[noise - data | z_t = z] for data N(mu, σ²), number by number.

    z_t has mean m = (1 - t) mu and variance S² = (1 - t)² σ² + t²; cov(noise - data, z_t) = t - (1 - t) σ². Hence
    v = -mu + (t - (1 - t) σ²) / S² · (z - m). Along it (z - m) / S does not change, so that z_0 = mu + σ z_1."""
    def velocity(z, t):
        t = t.to(z.dtype)
        variance = (1 - t) ** 2 * sigma**2 + t**2
        return -mu + (t - (1 - t) * sigma**2) / variance * (z - (1 - t) * mu)
    return velocity


def shifted_grid(steps, shape):
    """The times that a sampler must stop at, from the formula alone."""
    s = max(1, math.sqrt(math.prod(shape) / 4096))
    return [s * u / (1 + (s - 1) * u) for u in (1 - k / steps for k in range(steps + 1))]


@pytest.mark.parametrize("steps", [1, 7, 50])
def test_a_data_set_of_one_point_is_reached(steps):
    """The flow to x0 has the velocity (z - x0) / t, whose paths are straight: Euler is exact even in one step."""
    torch.manual_seed(0)
    x0, noise = torch.randn(1, *SHAPE), torch.randn(4, *SHAPE)
    reached = sample_flow(lambda z, t: (z - x0) / t, noise, steps)
    torch.testing.assert_close(reached, x0.expand(4, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps", [7, 50])
def test_a_data_set_of_one_point_is_reached_by_heun(steps):
    """At t = 0 the velocity jumps, from noise - x0 to -x0: a last step that asked for it would keep some noise."""
    torch.manual_seed(0)
    x0, noise = torch.randn(1, *SHAPE), torch.randn(4, *SHAPE)
    reached = sample_flow(lambda z, t: (z - x0) / t if t > 0 else -x0.expand_as(z), noise, steps, "heun")
    torch.testing.assert_close(reached, x0.expand(4, -1, -1, -1), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method, steps, tolerance", [("euler", 400, 0.01), ("heun", 50, 0.003)])
def test_gaussian_data_keeps_its_mean_and_variance(method, steps, tolerance):
    """Half a million numbers. A wrong sign, a step too few or one too many is off by more than the tolerance."""
    torch.manual_seed(0)
    mu, sigma = 0.7, 0.5
    noise = torch.randn(64, *SHAPE)
    z = sample_flow(gaussian_velocity(mu, sigma), noise, steps, method)
    assert z.mean().item() == pytest.approx(mu, abs=tolerance)
    assert z.std().item() == pytest.approx(sigma, abs=tolerance)
    torch.testing.assert_close(z, mu + sigma * noise, rtol=0, atol=5 * tolerance)  # each along its own path


@pytest.mark.parametrize("method, order", [("euler", 1), ("heun", 2)])
def test_the_error_shrinks_with_the_method_s_order(method, order):
    """Against the exact flow map of Gaussian data: half the step, half the error for Euler, a quarter for Heun."""
    torch.manual_seed(0)
    mu, sigma = 0.7, 0.5
    noise, errors = torch.randn(2, *SHAPE).double(), []
    for steps in 16, 32, 64, 128:
        z = sample_flow(gaussian_velocity(mu, sigma), noise, steps, method)
        errors.append((z - mu - sigma * noise).abs().mean().item())
    slopes = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert slopes[-1] == pytest.approx(order, abs=0.15), (errors, slopes)


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("shape", [SHAPE, (6, 4, 4)])
def test_the_sampler_is_the_textbook_s_on_the_shifted_grid(method, shape):
    """The times it asks for, how often it asks, and what it does with the answers, against a loop in float64."""
    torch.manual_seed(0)
    noise, steps, asked, exact = torch.randn(1, *shape), 6, [], gaussian_velocity(0.7, 0.5)

    def velocity(z, t):
        asked.append(float(t))
        return exact(z, torch.as_tensor(t))

    ours = sample_flow(velocity, noise, steps, method)
    grid, z = [torch.tensor(t).double() for t in shifted_grid(steps, shape)], noise.double()
    for t, t_next in zip(grid, grid[1:]):
        v = exact(z, t)
        if method == "heun" and t_next > 0:
            v = (v + exact(z + (t_next - t) * v, t_next)) / 2
        z = z + (t_next - t) * v
    torch.testing.assert_close(ours.double(), z, rtol=0, atol=1e-5)
    times = [t.item() for t in grid]
    expected = times[:-1] if method == "euler" else [t for pair in zip(times, times[1:]) for t in pair][:-1]
    assert asked == pytest.approx(expected, abs=1e-6) and len(asked) == (6 if method == "euler" else 11)


# ----------------------------------------------------------------------------------------------------------------------
# Guidance


class Recorder:
    """Calls a model, and keeps the (batch, time, labels) that it was called with."""

    def __init__(self, model):
        self.model, self.calls = model, []

    def __call__(self, z, t, labels):
        assert t.shape == labels.shape == (len(z),)
        self.calls.append((len(z), t[0].item(), labels.tolist()))
        return self.model(z, t, labels)


def test_guidance_of_scale_one_changes_nothing_and_costs_nothing():
    """One call a step, with the batch as it is."""
    model, labels = Recorder(random_dit()), torch.tensor([0, 3, 9])
    noise = torch.randn(3, 6, 4, 4)
    z = sample_flow(cfg_velocity(model, labels, 10, cfg_scale=1.0), noise, 5)
    assert [(count, seen) for count, _, seen in model.calls] == [(3, [0, 3, 9])] * 5
    plain = sample_flow(lambda z, t: model.model(z, t.expand(3), labels), noise, 5)
    assert torch.equal(z, plain)


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_guidance_goes_away_from_the_null_class(scale):
    """v_null + scale (v_class - v_null), image by image; both halves in one call."""
    model, labels = Recorder(random_dit()), torch.tensor([0, 3, 9])
    z, t = torch.randn(3, 6, 4, 4), torch.tensor(0.4)
    ours = cfg_velocity(model, labels, 10, cfg_scale=scale)(z, t)
    assert model.calls == [(6, pytest.approx(0.4), [0, 3, 9, 10, 10, 10])]
    for i in range(3):
        v_class, v_null = (model.model(z[i:i + 1], t[None], torch.tensor([k])) for k in (labels[i], 10))
        assert (v_class - v_null).abs().mean() > 1e-2
        torch.testing.assert_close(ours[i:i + 1], v_null + scale * (v_class - v_null), rtol=1e-4, atol=1e-4)


def test_guidance_acts_in_its_interval_alone():
    """Twice the work where it acts, once elsewhere, where the class's own velocity is followed."""
    model, labels = Recorder(random_dit()), torch.tensor([0, 3])
    sample_flow(cfg_velocity(model, labels, 10, 3.0, (0.25, 0.75)), torch.randn(2, 6, 4, 4), 10)
    assert [t for _, t, _ in model.calls] == pytest.approx(shifted_grid(10, (6, 4, 4))[:-1], abs=1e-6)
    assert {count for count, t, _ in model.calls if 0.25 <= t <= 0.75} == {4}
    assert {count for count, t, _ in model.calls if not 0.25 <= t <= 0.75} == {2}
    z, t = torch.randn(2, 6, 4, 4), torch.tensor(0.2)
    inside, outside = (cfg_velocity(model, labels, 10, 3.0, interval)(z, t) for interval in ((0.1, 0.3), (0.3, 0.9)))
    assert torch.equal(outside, model.model(z, t.expand(2), labels)) and (inside - outside).abs().mean() > 1e-2
    count = len(model.calls)
    everywhere = cfg_velocity(model, labels, 10, 3.0)  # by default at both ends too
    everywhere(z, torch.tensor(0.0)), everywhere(z, torch.tensor(1.0))
    assert [calls[0] for calls in model.calls[count:]] == [4, 4]


@pytest.mark.parametrize("scale", [1.0, 3.0])
@pytest.mark.parametrize("method", ["euler", "heun"])
def test_sampling_stays_on_the_model_s_device(scale, method):
    """All on the meta device, which takes tensors of the CPU as little as a GPU does."""
    with torch.device("meta"):
        model, noise, labels = LightningDiT("32/2/2", 6, 4, 10), torch.randn(3, 6, 4, 4), torch.zeros(3).long()
    with torch.no_grad():
        z = sample_flow(cfg_velocity(model, labels, model.null_class, scale), noise, 3, method)
    assert z.device.type == "meta" and z.shape == noise.shape
